from __future__ import annotations

import argparse
import copy

import plain_polyline
import pytest
import torch
import torch.nn.functional as F
from randomise import randomise, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import models
from vitkernels.nn import PolylinePathAttention

# name: parameters, GMACs at 224 x 224 and at 800 x 1280
PUBLISHED = {
    "ppma_t": (14_335_272, 2.696, 131.8),
    "ppma_s": (26_969_472, 4.896, 129.5),
    "ppma_b": (54_158_524, 10.593, 271.4),
}
DEPTHS = {"ppma_t": (2, 2, 8, 2), "ppma_s": (3, 4, 18, 4), "ppma_b": (4, 8, 25, 8)}
SMALL = {
    "embed_dims": (16, 16, 32, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 1, 2, 1),
    "projection": 24,
    "num_classes": 10,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs(name: str) -> None:
    parameters, *macs = PUBLISHED[name]
    with torch.device("meta"):
        model = models.create_model(name).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        for size, digits, expected in (((224, 224), 3, macs[0]), ((800, 1280), 1, macs[1])):
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                model(torch.empty(1, 3, *size))
            assert round(counter.get_total_flops() / 2e9, digits) == expected
    assert "criss_cross" in {m.mode for m in model.modules() if isinstance(m, PolylinePathAttention)}


_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def documented_keys(name: str, features_only: bool = False) -> set[str]:
    keys = {f"patch_embed.proj.{i}.{part}" for i in (0, 3, 6, 9) for part in ("weight", "bias")}
    keys |= {f"patch_embed.proj.{i}.{part}" for i in (1, 4, 7, 10) for part in _NORM}
    layers = ["retention_layer_norm", "final_layer_norm", "retention.lepe.conv", "pos.conv"]
    layers += [f"retention.{part}_proj" for part in ("q", "k", "v", "out")]
    layers += ["ffn.fc1", "ffn.fc2", "ffn.dwconv.conv"]
    block = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    block |= {f"retention.path_embed.{part}" for part in ("dt_linear.weight", "dt_bias", "A_log")}
    for stage, depth in enumerate(DEPTHS[name]):
        keys.add(f"layers.{stage}.Relpos.angle")
        gammas = {"gamma_1", "gamma_2"} if name == "ppma_b" and stage > 1 else set()
        keys |= {f"layers.{stage}.blocks.{i}.{key}" for i in range(depth) for key in block | gammas}
        if stage < 3:
            step = f"layers.{stage}.downsample"
            keys |= {f"{step}.reduction.{part}" for part in ("weight", "bias")}
            keys |= {f"{step}.norm.{part}" for part in _NORM}
    if features_only:
        return keys | {f"outnorm{stage}.{part}" for stage in range(4) for part in ("weight", "bias")}
    keys |= {f"{layer}.{part}" for layer in ("proj", "head") for part in ("weight", "bias")}
    return keys | {f"norm.{part}" for part in _NORM}


@pytest.mark.parametrize("name", PUBLISHED)
def test_documented_keys(name: str) -> None:
    with torch.device("meta"):
        state = models.create_model(name).state_dict()
        backbone = models.create_model(name, features_only=True).state_dict()
    assert state.keys() == documented_keys(name)
    assert backbone.keys() == documented_keys(name, features_only=True)
    block = "layers.1.blocks.0"
    width, heads = (160, 5) if name == "ppma_b" else (128, 4)
    hidden = width * (3 if name == "ppma_t" else 4)
    assert state["layers.1.Relpos.angle"].shape == (32,)
    assert state[f"{block}.retention.path_embed.A_log"].shape == (heads,)
    assert state[f"{block}.ffn.dwconv.conv.weight"].shape == (hidden, 1, 3, 3)
    assert state["proj.weight"].shape == (1024, 512)


def test_modes_and_drop_paths() -> None:
    with torch.device("meta"):
        tiny, base = (models.create_model(name) for name in ("ppma_t", "ppma_b"))
    modes = [[stage.blocks[-1].retention.mode for stage in model.layers] for model in (tiny, base)]
    assert modes == [["criss_cross"] * 2 + ["whole"] * 2, ["criss_cross"] * 3 + ["whole"]]
    rates = [block.drop_path.p for stage in tiny.layers for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 13 for i in range(14)])
    assert base.layers[3].blocks[7].drop_path.p == pytest.approx(0.4)


def test_official_initial_values() -> None:
    model = models.create_model("ppma_b", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3), name
            assert module.bias is None or not module.bias.any(), name
    assert torch.equal(model.layers[3].blocks[0].gamma_1, torch.full((1, 1, 1, 512), 1e-6))
    embed = model.layers[0].blocks[0].retention.path_embed
    step = F.softplus(embed.dt_bias.detach())
    assert 0.001 * 0.99 < step.min() < step.max() < 0.1 * 1.01
    assert len(model.no_weight_decay()) == 8
    assert {name.rpartition(".")[2] for name in model.no_weight_decay()} == {"dt_bias", "A_log"}


def plain_norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def plain_layer_norm(state: dict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_ppma(model: models.PPMA, x: torch.Tensor, modes: tuple[str, ...]) -> list[torch.Tensor]:
    """The network from its definition, on the tensors of a state_dict: the maps of the stages, then the logits."""
    state, maps = model.state_dict(), []

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    def depthwise(name: str, x: torch.Tensor) -> torch.Tensor:
        return conv(f"{name}.conv", x.movedim(-1, 1)).movedim(1, -1)

    def attention(name: str, x: torch.Tensor, angle: torch.Tensor, mode: str) -> torch.Tensor:
        rate = -state[f"{name}.path_embed.A_log"].exp()
        heads, (_, height, width, _) = len(rate), x.shape
        q, k, values = (linear(f"{name}.{part}_proj", x) for part in "qkv")
        phase = torch.arange(height * width).to(angle).view(height, width, 1) * angle
        sin, cos = phase.sin(), phase.cos()
        q, k, v, tokens = (t.unflatten(-1, (heads, -1)) for t in (q, k, values, x))
        z = tokens @ state[f"{name}.path_embed.dt_linear.weight"].T
        steps = (1 + (z + state[f"{name}.path_embed.dt_bias"][:, None]).exp()).log()
        decays = (steps * rate[:, None]).unbind(-1)
        q, k = (plain_polyline.turned(t, sin, cos) for t in (q, k))
        out = plain_polyline.attention(q, k, v, *decays, mode, q.shape[-1] ** -0.5)
        return linear(f"{name}.out_proj", out.flatten(-2) + depthwise(f"{name}.lepe", values))

    for i, stride in enumerate((2, 1, 2, 1)):
        x = conv(f"patch_embed.proj.{3 * i}", F.gelu(x) if i else x, stride)
        x = plain_norm(state, f"patch_embed.proj.{3 * i + 1}", x)
    x = x.movedim(1, -1)
    for i, mode in enumerate(modes):
        for j in range(len(model.layers[i].blocks)):
            name = f"layers.{i}.blocks.{j}"
            x = x + depthwise(f"{name}.pos", x)
            y = plain_layer_norm(state, f"{name}.retention_layer_norm", x, 1e-6)
            y = attention(f"{name}.retention", y, state[f"layers.{i}.Relpos.angle"], mode)
            x = x + state.get(f"{name}.gamma_1", 1) * y
            y = plain_layer_norm(state, f"{name}.final_layer_norm", x, 1e-6)
            y = F.gelu(linear(f"{name}.ffn.fc1", y))
            y = linear(f"{name}.ffn.fc2", y + depthwise(f"{name}.ffn.dwconv", y))
            x = x + state.get(f"{name}.gamma_2", 1) * y
        out = x if "proj.weight" in state else plain_layer_norm(state, f"outnorm{i}", x, 1e-5)
        maps.append(out.movedim(-1, 1))
        if i < 3:
            x = conv(f"layers.{i}.downsample.reduction", x.movedim(-1, 1), 2)
            x = plain_norm(state, f"layers.{i}.downsample.norm", x).movedim(1, -1)
    if "proj.weight" not in state:
        return maps
    y = plain_norm(state, "norm", linear("proj", x).movedim(-1, 1))
    return [*maps, linear("head", (y * torch.sigmoid(y)).mean((2, 3)))]


def shaken(name: str = "ppma_t", **options) -> models.PPMA:
    """A small model whose parameters and statistics all count."""
    model = randomise(models.create_model(name, **{**SMALL, **options}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key or parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_definition(name: str) -> None:
    options = {"layer_scales": (None, 0.5, 1.0, None)} if name == "ppma_b" else {}
    model, x = shaken(name, **options), torch.randn(2, 3, 65, 98)
    modes = ("criss_cross", "criss_cross", "whole" if name == "ppma_t" else "criss_cross", "whole")
    with torch.no_grad():
        *maps, logits = plain_ppma(model.double(), x.double(), modes)
        for got, expected in zip(model.forward_intermediates(x.double()), maps, strict=True):
            assert relative_error(got, expected) < 1e-12
        assert relative_error(model(x.double()), logits) < 1e-12
        assert relative_error(model.float()(x), logits) < 1e-4
        assert relative_error(model(x), logits) < 10 * relative_error(plain_ppma(model, x, modes)[-1], logits)


def test_backbones_return_normalised_maps() -> None:
    model, x = shaken(features_only=True), torch.randn(1, 3, 70, 45)
    with torch.no_grad():
        maps = model(x)
        expected = plain_ppma(model.double(), x.double(), ("criss_cross", "criss_cross", "whole", "whole"))
    assert model.stage_channels == (16, 16, 32, 32)
    assert model.stage_strides == (4, 8, 16, 32)
    for got, truth, stride in zip(maps, expected, model.stage_strides, strict=True):
        assert got.shape[2:] == (-(-70 // stride), -(-45 // stride))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got, truth) < 1e-4
    with pytest.raises(ValueError, match=r"argument `num_classes`.*features_only has no classifier"):
        model.reset_classifier(5)


def test_features_classifier_and_the_smallest_images() -> None:
    model = shaken(in_chans=1)
    with torch.no_grad():
        for size in ((1, 1), (3, 40), (64, 64)):
            x = torch.randn(2, 1, *size)
            features = model.forward_features(x)
            assert features.shape == (2, 24, -(-size[0] // 32), -(-size[1] // 32))
            assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.double().reset_classifier(7)
        assert model(x.double()).shape == (2, 7)
    assert not model.head.training
    with pytest.raises(ValueError, match=r"argument `modes`: expected 4 values, one a stage"):
        models.create_model("ppma_t", modes=("whole",))


def test_channels_last_input_and_maps_between_the_blocks() -> None:
    model, x, strides = shaken(), torch.randn(2, 3, 64, 96), []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(
                lambda _, args: strides.append(args[0].movedim(1, -1).stride(-1))
            )
    with torch.no_grad():
        expected = model(x)
        got = model(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(got, expected)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    seen = []
    for conv in depthwise:
        conv.register_forward_hook(
            lambda _, args, out: seen.append((args[0].permute(0, 2, 3, 1).is_contiguous(), out.stride(1)))
        )
    with torch.no_grad():
        model(x)
    assert seen == [(True, 1)] * 3 * 5  # no copy before and none after


@pytest.mark.parametrize("entry", ["model", "models", "model_ema", "state_dict", None])
def test_reads_checkpoints(tmp_path, entry: str | None) -> None:
    source = shaken()
    content: dict = dict(source.state_dict())
    if entry is not None:
        content = {entry: content, "epoch": 299, "args": argparse.Namespace(lr=1e-3), "lr_scheduler": {}}
    if entry == "model_ema":  # whose accuracies are the published ones
        content["models"] = {key: torch.zeros_like(value) for key, value in content[entry].items()}
    torch.save(content, tmp_path / "best.pth")
    model = models.create_model("ppma_t", weights=tmp_path / "best.pth", **SMALL)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_backbones_read_classifiers_and_detectors(tmp_path) -> None:
    source = shaken()
    torch.save({"models": source.state_dict()}, tmp_path / "best.pth")
    backbone = models.create_model("ppma_t", weights=tmp_path / "best.pth", features_only=True, **SMALL)
    for key, value in backbone.state_dict().items():
        expected = source.state_dict().get(key, torch.full_like(value, key.endswith("weight")))
        assert torch.equal(value, expected), key
    shaken_backbone = shaken(features_only=True)
    detector = {f"backbone.{key}": value for key, value in shaken_backbone.state_dict().items()}
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(8, 16, 1, 1), "rpn_head.bias": torch.ones(3)}
    torch.save(
        {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": detector}, tmp_path / "epoch_12.pth"
    )
    loaded = models.create_model("ppma_t", weights=tmp_path / "epoch_12.pth", features_only=True, **SMALL)
    for key, value in shaken_backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(
        ValueError, match=r"(?s)missing from the file.*head\.bias.*not of this model.*outnorm0"
    ):
        models.create_model("ppma_t", weights=tmp_path / "epoch_12.pth", **SMALL)
    with pytest.raises(
        ValueError, match=r"(?s)head\.weight: file \[10, 24\], model \[3, 24\].*reset_classifier"
    ):
        models.create_model("ppma_t", weights=tmp_path / "best.pth", **{**SMALL, "num_classes": 3})


def test_compiles_as_one_graph_and_trains() -> None:
    model = shaken(depths=(1, 1, 1, 1), drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad.isfinite().all()
        assert (a.grad - b.grad).norm() < 1e-3 * b.grad.norm() + 1e-5, name


def test_drop_path_drops() -> None:
    model, x = shaken(drop_path_rate=0.9).train(), torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
