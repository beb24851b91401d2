from __future__ import annotations

import plain_neighborhood
import pytest
import torch
import torch.nn.functional as F
from randomise import relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import models

# name: parameters, GMACs at 224 pixels, smallest image
PUBLISHED = {
    "nat_mini": (19_984_174, 2.695, 193),
    "nat_tiny": (27_901_582, 4.295, 193),
    "nat_small": (50_743_297, 7.772, 193),
    "nat_base": (89_769_652, 13.677, 193),
    "dinat_mini": (19_984_174, 2.695, 221),
    "dinat_tiny": (27_901_582, 4.295, 221),
    "dinat_small": (50_719_681, 7.772, 221),
    "dinat_base": (89_769_652, 13.677, 221),
    "dinat_large": (200_943_514, 30.458, 221),
}
# DiNAT-mini, four times narrower and with 3 x 3 neighborhoods: maps of 24, 12, 6 and 3 at 96 pixels
SMALL = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "kernel_size": 3, "img_size": 96, "num_classes": 10}


# What each flavour takes that the other does not; the rest are wider or deeper.
FEW = ("nat_mini", "dinat_mini", "dinat_small", "dinat_base", "dinat_large")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.thorough) for name in PUBLISHED]
)
def test_parameters_macs_and_smallest_image(name: str) -> None:
    parameters, macs, smallest = PUBLISHED[name]
    with torch.device("meta"):
        model = models.create_model(name).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 3) == macs
    assert model.minimum_size == smallest


def test_official_names() -> None:
    with torch.device("meta"):
        keys = models.create_model("dinat_base").state_dict()
        assert "levels.0.blocks.0.gamma1" not in models.create_model("dinat_small").state_dict()
        assert "levels.0.blocks.0.gamma1" in models.create_model("nat_small").state_dict()
    block = "norm1.weight norm1.bias attn.rpb attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
    block += "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias gamma1 gamma2"
    expected = {f"patch_embed.proj.{i}.{name}" for i in range(2) for name in ("weight", "bias")}
    expected |= {"patch_embed.norm.weight", "patch_embed.norm.bias", "norm.weight", "norm.bias"}
    expected |= {"head.weight", "head.bias"}
    for level, depth in enumerate((3, 4, 18, 5)):
        expected |= {f"levels.{level}.blocks.{i}.{name}" for i in range(depth) for name in block.split()}
        if level < 3:
            parts = ("reduction.weight", "norm.weight", "norm.bias")
            expected |= {f"levels.{level}.downsample.{name}" for name in parts}
    assert keys.keys() == expected
    assert keys["levels.3.blocks.4.attn.rpb"].shape == (32, 13, 13)


def test_dilations_of_the_published_models() -> None:
    depths = (3, 4, 18, 5)
    expected = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert models.dilations_for(224, depths) == expected
    assert models.dilations_for(384, depths, 11) == expected
    assert models.dilations_for(384, depths) == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    with torch.device("meta"):
        model = models.create_model("dinat_large", img_size=384)
        plain = models.create_model("nat_mini")
    assert [block.attn.dilation for block in model.levels[0].blocks] == [(1, 1), (13, 13), (1, 1)]
    assert {block.attn.dilation for level in plain.levels for block in level.blocks} == {(1, 1)}


def plain_nat(model: models.NAT, x: torch.Tensor) -> torch.Tensor:
    """The network from its definition, on the tensors of a state_dict."""
    state = model.state_dict()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def half(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=2, padding=1)

    x = norm("patch_embed.norm", half("patch_embed.proj.1", half("patch_embed.proj.0", x)).movedim(1, -1))
    for i, level in enumerate(model.levels):
        for j, block in enumerate(level.blocks):
            name, options = f"levels.{i}.blocks.{j}", block.attn
            rpb = state[f"{name}.attn.rpb"]
            y = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
            q, k, v = y.unflatten(-1, (3, len(rpb), -1)).unbind(-3)
            y = plain_neighborhood.attention(
                q, k, v, options.kernel_size, options.dilation, (False, False), q.shape[-1] ** -0.5, rpb
            )
            y = linear(f"{name}.attn.proj", y.flatten(-2))
            x = x + state.get(f"{name}.gamma1", 1) * y
            y = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
            x = x + state.get(f"{name}.gamma2", 1) * linear(f"{name}.mlp.fc2", F.gelu(y))
        if i + 1 < len(model.levels):
            y = half(f"levels.{i}.downsample.reduction", x.movedim(-1, 1)).movedim(1, -1)
            x = norm(f"levels.{i}.downsample.norm", y)
    return linear("head", norm("norm", x).mean((1, 2)))


def shaken(model: nn.Module) -> nn.Module:
    """Parameters that all count: fresh biases, norms and layer scales would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("rpb"):
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["dinat_mini", "nat_base"])
def test_equals_the_definition(name: str) -> None:
    options = {**SMALL, "depths": (2, 2, 2, 1)}
    model = shaken(models.create_model(name, **options)).eval()
    if name == "dinat_mini":
        assert [level.blocks[-1].attn.dilation[0] for level in model.levels] == [8, 4, 2, 1]
    x = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        expected = plain_nat(model.double(), x.double())
        assert relative_error(model(x.double()), expected) < 1e-12
        assert relative_error(model.float()(x), expected) < 1e-5


def test_stage_maps_classifier_and_smallest_image() -> None:
    model = models.create_model("dinat_mini", **{**SMALL, "in_chans": 1})
    assert model.minimum_size == 93
    model.eval()
    x = torch.randn(2, 1, 93, 110)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == list(model.stage_channels) == [16, 32, 64, 128]
        for stage_map, stride in zip(maps, model.stage_strides, strict=True):
            assert stage_map.shape[2:] == (-(-93 // stride), -(-110 // stride))
        features = model.forward_features(x)
        assert features.shape == maps[-1].shape
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.double().reset_classifier(7)
        assert model(x.double()).shape == (2, 7)
    assert not model.head.training
    with pytest.raises(ValueError, match=r"argument `x`: expected images of at least 93 x 93.*dilation"):
        model(x[:, :, :92].double())
    names = model.no_weight_decay()
    assert len(names) == 18
    assert all(name.endswith("attn.rpb") for name in names)


def test_drop_path_and_drop_rate() -> None:
    model = models.create_model(
        "nat_mini", drop_path_rate=0.5, drop_rate=0.1, **{**SMALL, "depths": (2, 1, 1, 1)}
    )
    rates = [block.drop_path.p for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert {block.attn.proj_drop.p for level in model.levels for block in level.blocks} == {0.1}
    x = torch.randn(1, 3, 96, 96)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("heads", [(6, 12, 24, 48), (4, 8, 16, 32)], ids=["current", "first revision"])
@pytest.mark.parametrize("kernel_size", [7, 11])
def test_heads_and_kernel_size_come_from_the_checkpoint(
    tmp_path, heads: tuple[int, ...], kernel_size: int
) -> None:
    narrow = {"embed_dim": 48, "depths": (2, 2, 2, 1), "num_classes": 5}
    source = models.create_model("dinat_large", num_heads=heads, kernel_size=kernel_size, **narrow)
    torch.save(source.state_dict(), tmp_path / "large.pth")
    model = models.create_model("dinat_large", weights=tmp_path / "large.pth", img_size=384, **narrow)
    attention = model.levels[1].blocks[1].attn
    assert attention.num_heads == heads[1]
    assert attention.kernel_size == (kernel_size, kernel_size)
    assert attention.dilation == ((6, 6) if kernel_size == 7 else (4, 4))
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    headless = models.create_model(
        "dinat_large", weights=tmp_path / "large.pth", **{**narrow, "num_classes": 0}
    )
    assert "head.weight" not in headless.state_dict()
    with pytest.raises(ValueError, match=r"(?s)attn\.rpb: file .*, model"):
        models.create_model("dinat_large", weights=tmp_path / "large.pth", num_heads=(1, 2, 4, 8), **narrow)


def test_weights_that_do_not_fit_are_listed(tmp_path) -> None:
    torch.save({"model": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"(?s)does not fit NAT.*missing.*levels\.0.*not of this model.*encoder"
    ):
        models.create_model("nat_mini", weights=tmp_path / "other.pth", **SMALL_NAT)


SMALL_NAT = {key: value for key, value in SMALL.items() if key != "img_size"}


def test_compiles_as_one_graph_and_trains() -> None:
    model = models.create_model("dinat_mini", drop_path_rate=0.0, **{**SMALL, "depths": (1, 2, 1, 1)})
    x = torch.randn(2, 3, 96, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-5
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"argument `dilations`: expected one int a layer"):
        models.create_model("nat_mini", dilations=[[1, 2]])
    with pytest.raises(ValueError, match=r"argument `num_heads`: expected 4 ints"):
        models.create_model("nat_mini", num_heads=(1, 2))
