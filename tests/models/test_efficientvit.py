from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from randomise import randomise, relative_error
from timm_import import import_timm
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from vitkernels import models
from vitkernels.nn import ConvNorm, NormLinear
from vitkernels.nn.conv_norm import fold_conv_norm, fold_norm_linear

# name: parameters, parameters with batch norms folded, MACs in millions
PUBLISHED = {
    "efficientvit_m0": (2_349_436, 2_334_916, 79.2),
    "efficientvit_m1": (2_980_560, 2_964_256, 167.1),
    "efficientvit_m2": (4_187_554, 4_168_338, 201.0),
    "efficientvit_m3": (6_900_722, 6_875_890, 262.7),
    "efficientvit_m4": (8_804_228, 8_776_340, 299.3),
    "efficientvit_m5": (12_473_772, 12_436_260, 521.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs(name: str) -> None:
    model = models.create_model(name).eval()
    parameters, folded, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters

    saved = 0
    for module in model.modules():
        if isinstance(module, ConvNorm):
            own, fold = module, fold_conv_norm(module.c, module.bn)
        elif isinstance(module, NormLinear):
            own, fold = module, fold_norm_linear(module.bn, module.l)
        else:
            continue
        saved += sum(p.numel() for p in own.parameters()) - sum(t.numel() for t in fold)
    assert parameters - saved == folded

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e6, 1) == macs


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_timm_with_converted_weights(name: str) -> None:
    theirs = randomise(import_timm().create_model(name)).eval()
    ours = models.create_model(name).eval()
    ours.load_state_dict(models.to_official_state_dict(theirs.state_dict()), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
    back = models.to_timm_state_dict(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.items())


def test_official_names() -> None:
    keys = models.efficientvit_m0().state_dict().keys()
    expected = [
        "patch_embed.6.c.weight",
        "blocks1.0.dw0.m.bn.running_mean",
        "blocks1.0.mixer.m.attn.attention_biases",
        "blocks2.0.0.m.c.weight",
        "blocks2.0.1.m.pw2.bn.bias",
        "blocks2.1.conv3.c.weight",
        "blocks2.1.se.fc2.bias",
        "blocks2.2.1.m.pw1.c.weight",
        "blocks3.5.mixer.m.attn.dws.3.c.weight",
        "blocks3.5.mixer.m.attn.proj.1.bn.weight",
        "head.bn.running_var",
        "head.l.bias",
    ]
    assert [key for key in expected if key not in keys] == []
    assert models.to_official_state_dict(dict.fromkeys(keys)).keys() == keys


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 192), (97, 130), (32, 512)])
def test_any_size_and_stage_maps(height: int, width: int) -> None:
    model = randomise(models.efficientvit_m0()).eval()
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == list(model.stage_channels) == [64, 128, 192]
        for stage_map, stride in zip(maps, model.stage_strides, strict=True):
            assert stage_map.shape[2:] == (-(-height // stride), -(-width // stride))
        assert torch.equal(model.forward_features(x), maps[-1])
        logits = model(x)
        assert logits.shape == (1, 1000)
        assert torch.equal(model.forward_head(maps[-1]), logits)


def test_classifier_and_channels() -> None:
    x = torch.randn(2, 1, 64, 64)
    model = models.create_model("efficientvit_m0", num_classes=0, in_chans=1).eval()
    assert model(x).shape == (2, 192)
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7)
    assert not model.head.training

    distilled = randomise(models.efficientvit_m0(in_chans=1, distillation=True))
    first, second = distilled.train()(x)
    assert not torch.equal(first, second)
    distilled.eval()
    features = distilled.forward_head(distilled.forward_features(x), pre_logits=True)
    torch.testing.assert_close(distilled(x), (distilled.head(features) + distilled.head_dist(features)) / 2)


def test_no_weight_decay_names_the_bias_tables() -> None:
    assert len(models.efficientvit_m0().no_weight_decay()) == 6


def test_larger_images_get_larger_windows_and_resized_biases(tmp_path) -> None:
    small = randomise(models.efficientvit_m0())
    torch.save(small.state_dict(), tmp_path / "m0.pth")
    large = models.create_model("efficientvit_m0", weights=tmp_path / "m0.pth", img_size=384, window_size=12)
    sides = [table.shape[1] ** 0.5 for name, table in large.named_parameters() if "attention_biases" in name]
    assert sides == [12, 12, 12, 6, 6, 6]
    assert torch.isfinite(large.eval()(torch.randn(1, 3, 384, 384))).all()


@pytest.fixture(scope="module")
def source() -> models.EfficientViT:
    return randomise(models.efficientvit_m0(num_classes=10))


FORMS = ("plain", "model", "state_dict", "model_ema", "module.", "args", "safetensors")


@pytest.mark.parametrize(
    ("form", "layout"), [*((form, "official") for form in FORMS), ("plain", "timm"), ("module.", "timm")]
)
def test_reads_weights(tmp_path, source: models.EfficientViT, form: str, layout: str) -> None:
    weights = dict(source.state_dict())
    if layout == "timm":
        weights = models.to_timm_state_dict(weights)
    else:
        weights["blocks1.0.mixer.m.attn.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.int64)
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    elif form == "plain":
        torch.save(weights, path)
    elif form == "module.":
        torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, path)
    elif form == "args":
        args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.999), nested=argparse.Namespace(name="m0"))
        torch.save({"model": weights, "args": args}, path)
    else:
        torch.save({form: weights, "epoch": 3}, path)
    model = models.create_model("efficientvit_m0", num_classes=10, weights=path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    headless = models.create_model("efficientvit_m0", num_classes=0, weights=path)
    assert torch.equal(headless.blocks3[5].dw1.m.c.weight, source.blocks3[5].dw1.m.c.weight)


def test_weights_that_do_not_fit_are_listed(tmp_path) -> None:
    path = tmp_path / "weights.pth"
    weights = models.efficientvit_m0(num_classes=10).state_dict()
    torch.save(weights, path)
    with pytest.raises(
        ValueError, match=r"(?s)head\.l\.weight: file \[10, 192\], model \[5, 192\].*reset_classifier"
    ):
        models.create_model("efficientvit_m0", num_classes=5, weights=path)
    weights["surprise"] = weights.pop("head.bn.weight")
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"(?s)1 missing.*head\.bn\.weight.*1 not of this model.*surprise"):
        models.create_model("efficientvit_m0", num_classes=10, weights=path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=r"argument `weights`: expected a state_dict"):
        models.create_model("efficientvit_m0", weights=path)
    with pytest.raises(FileNotFoundError, match="argument `weights`"):
        models.create_model("efficientvit_m0", weights=tmp_path / "absent.pth")


class _Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code in a weights file was run",))


def test_weights_run_no_code(tmp_path) -> None:
    torch.save({"model": _Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"(?s)argument `weights`.*Weights only load failed"):
        models.create_model("efficientvit_m0", weights=tmp_path / "weights.pth")


def _damaged(kind: str, folder: Path) -> Path:
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "object":
        torch.save({"model": {}, "args": path}, path)  # a pathlib.Path is not on torch's list
    elif kind == "truncated":
        torch.save({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_bytes(b"" if kind == "empty" else b"<!doctype html>")
    return path


@pytest.mark.parametrize("kind", ["object", "truncated", "empty", "html", "safetensors"])
def test_files_that_cannot_be_read_name_the_argument(tmp_path, kind: str) -> None:
    path = _damaged(kind, tmp_path)
    with pytest.raises(
        ValueError, match=r"(?s)argument `weights`: expected .*; got .*weights\..*torch\.save"
    ):
        models.create_model("efficientvit_m0", weights=path)


def test_unknown_model() -> None:
    assert [name for name in models.list_models() if name.startswith("efficientvit")] == sorted(PUBLISHED)
    with pytest.raises(ValueError, match=r"argument `name`.*'efficientvit_m7'.*Did you mean 'efficientvit_m"):
        vitkernels.models.create_model("efficientvit_m7")
