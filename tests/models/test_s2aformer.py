from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from randomise import randomise, relative_error
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from vitkernels import models
from vitkernels.models.s2aformer import CONFIGS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import search_s2aformer as search

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "projection": 48}


def small(**options: object) -> models.S2AFormer:
    return randomise(models.create_model("s2aformer_t", **{**SMALL, "num_classes": 10, **options})).eval()


@pytest.mark.parametrize("name", search.PUBLISHED)
def test_parameters_and_macs_meet_the_published_ones(name: str) -> None:
    """Of the modules themselves, at both image sizes; and the search counts what they have."""
    with torch.device("meta"):
        model = models.create_model(name).eval()
    parameters = sum(p.numel() for p in model.parameters())
    published, *billions = search.PUBLISHED[name]
    print(f"\n{name}: {parameters / 1e6:.2f} M parameters, published {published:.2f}")
    assert parameters / 1e6 == pytest.approx(published, rel=search.TOLERANCE)
    for size, expected in zip((224, 256), billions, strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size, device="meta"))
        macs = counter.get_total_flops() / 2
        print(f"  {size} x {size}: {macs / 1e9:.3f} G MACs, published {expected:.3f}")
        assert macs / 1e9 == pytest.approx(expected, rel=search.TOLERANCE)
        counted = search.count(*CONFIGS[name], search.Family(4, 1280, False), size)
        assert (counted.parameters, counted.macs) == (parameters, macs)
        assert counted.layers / 1e9 == pytest.approx(expected, rel=search.TOLERANCE)


def test_the_search_finds_these_networks() -> None:
    family, members = search.search()
    assert family == search.Family(mlp_ratio=4, projection=1280, narrow_stem=False)
    found = [(member.widths, member.depths, member.heads) for member in members]
    assert found == list(CONFIGS.values())


def test_nothing_claims_more_than_a_reconstruction() -> None:
    texts = [models.s2aformer.__doc__, models.S2AFormer.__doc__, vitkernels.nn.StripSelfAttention.__doc__]
    texts += [vitkernels.nn.HybridPerceptionBlock.__doc__, vitkernels.nn.LIM.__doc__]
    for text in texts:
        assert "nferred" in text
        assert "official" not in text
        assert "compatible" not in text


@pytest.mark.parametrize("size", [(224, 224), (57, 55), (31, 90)], ids=str)
def test_shapes(size: tuple[int, int]) -> None:
    model, x = small(), torch.randn(2, 3, *size)
    expected = [
        (2, width, -(-size[0] // 2) * 2 // stride, -(-size[1] // 2) * 2 // stride)
        for width, stride in zip(model.stage_channels, model.stage_strides, strict=True)
    ]
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert [tuple(m.shape) for m in maps] == expected
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
        features = model.forward_features(x)
        assert features.shape == expected[-1]
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, 48)
        assert torch.equal(model.forward_head(features), model(x))
        assert model(x).shape == (2, 10)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
    assert model.stage_strides == (4, 8, 16, 32)


def test_published_sizes_run() -> None:
    model = models.create_model("s2aformer_mini").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_too_small_images() -> None:
    model = small()
    assert model.minimum_size == 31
    with pytest.raises(ValueError, match=r"argument `x`: expected images of at least 31 x 31"):
        model(torch.zeros(1, 3, 64, 30))
    with pytest.raises(ValueError, match=r"argument `depths`: expected 4 values, one a stage"):
        small(depths=(1, 2))


def test_backbones_return_normalised_maps() -> None:
    model, x = small(features_only=True), torch.randn(1, 3, 64, 40)
    with torch.no_grad():
        maps = model(x)
    assert [m.shape[1:] for m in maps] == [(8, 16, 10), (16, 8, 5), (24, 4, 2), (32, 2, 1)]
    for stage, got in enumerate(maps):
        norm = model.get_submodule(f"outnorm{stage}")
        plain = (got - norm.bias[:, None, None]) / norm.weight[:, None, None]
        assert plain.mean(1).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"argument `num_classes`.*features_only has no classifier"):
        model.reset_classifier(5)


def test_trains_and_switches_reach_the_blocks() -> None:
    model = small(scale="qk_dim", qk_dim_per_head=2, reduction="pool", norm="layer", act="gelu").train()
    block = model.layers[0].blocks[0].attn
    assert (block.scale, block.qk_dim_per_head) == (2**-0.5, 2)
    assert block.sr.pool.kernel_size == 8
    model(torch.randn(3, 3, 57, 55)).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_folding_changes_nothing() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, verbose=False)
        folded = [name for name, _, what in report.replaced if what == "batch norm folded"]
        assert len(folded) == 4  # the reductions of the first three stages
        assert relative_error(model(x), expected) < 1e-5


def test_compiles_whole() -> None:
    two = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (4, 1)}
    model, x = small(**two), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    got, expected = compiled(x), model(x)
    assert relative_error(got, expected) < 1e-5
    got.square().sum().backward()
    expected.square().sum().backward()
    name = "layers.0.blocks.0.attn.q.weight"
    gradients = [net.get_parameter(name).grad for net in (compiled, model)]
    assert relative_error(*gradients) < 1e-4


def test_reads_checkpoints(tmp_path: Path) -> None:
    source = small()
    torch.save({"model": source.state_dict(), "epoch": 299}, tmp_path / "best.pth")
    arguments = {**SMALL, "num_classes": 10, "weights": tmp_path / "best.pth"}
    model = models.create_model("s2aformer_t", **arguments)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    headless = models.create_model("s2aformer_t", **{**arguments, "num_classes": 0}).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))


def test_the_search_has_a_help_that_does_not_search(monkeypatch, capsys) -> None:
    monkeypatch.setattr(search, "search", lambda: pytest.fail("searched"))
    with pytest.raises(SystemExit) as ended:
        search.main(["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out
