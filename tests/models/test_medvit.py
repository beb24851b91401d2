from __future__ import annotations

import plain_neighborhood
import pytest
import torch
import torch.nn.functional as F
from randomise import randomise, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import models
from vitkernels.models.medvit import make_divisible

# name: parameters, entries of the state_dict, parameters never used, GMACs at 224 pixels
PUBLISHED = {
    "medvit_tiny": (11_719_845, 585, 0.984, 2.636),
    "medvit_small": (30_087_295, 652, 2.750, 3.909),
    "medvit_base": (66_995_571, 658, 6.141, 7.940),
    "medvit_large": (118_291_477, 658, 10.874, 13.003),
}
SMALL = {"depths": (1, 2, 3, 1), "dims": (32, 128, 160, 192), "num_classes": 10}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_entries_and_macs(name: str) -> None:
    parameters, entries, unused, macs = PUBLISHED[name]
    with torch.device("meta"):
        model = models.create_model(name).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    dead = sum(model.get_parameter(key).numel() for key in model.unused_parameters())
    assert round(dead / 1e6, 3) == unused
    assert round(counter.get_total_flops() / 2e9, 3) == macs


_NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def documented_keys() -> set[str]:
    """The keys of MedViT-tiny, block by block, as the spec lists them."""

    def norms(*names: str) -> set[str]:
        return {f"{name}.{part}" for name in names for part in _NORM}

    def embed(name: str) -> set[str]:
        return {f"{name}.conv.weight"} | norms(f"{name}.norm")

    def feed_forward(name: str) -> set[str]:
        keys = {f"{name}.conv.{i}.weight" for i in (0, 3, 7)} | norms(
            *(f"{name}.conv.{i}" for i in (1, 4, 8))
        )
        return keys | {f"{name}.conv.6.fc.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}

    keys = {f"stem.{i}.conv.weight" for i in range(4)} | norms(*(f"stem.{i}.norm" for i in range(4)), "norm")
    keys |= {"proj_head.0.weight", "proj_head.0.bias"}
    for i, kind in enumerate(["LFP"] * 2 + ["LFP", "GFP"] + ["LFP", "LFP", "GFP"] * 2 + ["GFP"]):
        name = f"features.{i}"
        keys |= norms(f"{name}.norm1", f"{name}.norm2") | feed_forward(f"{name}.conv")
        if kind == "GFP" or i in (2, 4):  # where the width changes or the map is halved
            keys |= embed(f"{name}.patch_embed")
        elif i == 7:  # after a global block of the same width
            pass
        if kind == "LFP":
            keys |= {f"{name}.attn.rpb"}
            keys |= {
                f"{name}.attn.{layer}.{part}" for layer in ("qkv", "proj") for part in ("weight", "bias")
            }
            continue
        keys |= {
            f"{name}.e_mhsa.{layer}.{part}"
            for layer in ("q", "k", "v", "proj")
            for part in ("weight", "bias")
        }
        keys |= norms(f"{name}.e_mhsa.norm") if i < 10 else set()
        keys |= embed(f"{name}.projection") | norms(f"{name}.mhca.norm")
        keys |= {f"{name}.mhca.group_conv3x3.weight", f"{name}.mhca.projection.weight"}
        parts = ("layernorm.weight", "layernorm.bias", "rbf.grid", "spline_linear.weight")
        keys |= {f"{name}.kan.layers.{layer}.{part}" for layer in range(2) for part in parts}
    return keys


def test_documented_keys() -> None:
    with torch.device("meta"):
        state = models.create_model("medvit_tiny").state_dict()
    assert state.keys() == documented_keys()
    assert state["features.3.conv.conv.3.weight"].shape == (256, 1, 3, 3)
    assert state["features.0.conv.conv.3.weight"].shape == (192, 1, 7, 7)
    assert state["features.0.conv.conv.6.fc.0.weight"].shape == (3, 192)
    assert state["features.3.kan.layers.0.spline_linear.weight"].shape == (256, 8 * 128)


def test_shares_of_the_channels() -> None:
    widths = {128: 96, 192: 160, 256: 192, 384: 288, 512: 384, 768: 576, 1024: 768}
    assert {width: make_divisible(0.75 * width, 32) for width in widths} == widths


def plain_norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    shape = (-1,) + (1,) * (x.ndim - 2)
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def plain_embed(state: dict, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    if stride == 2:  # averages over what a 2 x 2 patch has inside the map
        ones = torch.ones_like(x[:1, :1])
        pad = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        x = F.avg_pool2d(F.pad(x, pad), 2) / F.avg_pool2d(F.pad(ones, pad), 2)
    if f"{name}.conv.weight" not in state:
        return x
    return plain_norm(state, f"{name}.norm", F.conv2d(x, state[f"{name}.conv.weight"]))


def plain_linear(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return (x + 3).clamp(0, 6) / 6


def plain_local(state: dict, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    x = plain_embed(state, f"{name}.patch_embed", x, stride)
    _, channels, height, width = x.shape
    normed = plain_norm(state, f"{name}.norm1", x)
    # Z[i, j, m] = n1[f div HW, (f mod HW) div W, f mod W] with f = (i W + j) C + m
    flat = torch.arange(channels * height * width).view(height, width, channels)
    area = height * width
    tokens = normed[:, flat // area, flat % area // width, flat % width]
    rpb = state[f"{name}.attn.rpb"]
    q, k, v = plain_linear(state, f"{name}.attn.qkv", tokens).unflatten(-1, (3, len(rpb), 32)).unbind(-3)
    mixed = plain_neighborhood.attention(q, k, v, (7, 7), (1, 1), (False, False), 32**-0.5, rpb)
    mixed = plain_linear(state, f"{name}.attn.proj", mixed.flatten(-2))
    # the element that the token map holds at f goes back to where it came from
    back = torch.empty_like(normed)
    back[:, flat // area, flat % area // width, flat % width] = mixed
    x = x + back
    u = plain_norm(state, f"{name}.norm2", x)
    conv = f"{name}.conv.conv"
    y = plain_norm(state, f"{conv}.1", F.conv2d(u, state[f"{conv}.0.weight"]))
    y = y * hard_sigmoid(y)
    weight = state[f"{conv}.3.weight"]
    y = plain_norm(state, f"{conv}.4", F.conv2d(y, weight, padding=weight.shape[-1] // 2, groups=len(weight)))
    y = y * hard_sigmoid(y)
    gate = plain_linear(state, f"{conv}.6.fc.2", plain_linear(state, f"{conv}.6.fc.0", y.mean((2, 3))).relu())
    y = y * hard_sigmoid(gate)[:, :, None, None]
    return x + u + plain_norm(state, f"{conv}.8", F.conv2d(y, state[f"{conv}.7.weight"]))


def plain_kan(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    for layer in range(2):
        part = f"{name}.layers.{layer}"
        centred = x - x.mean(-1, keepdim=True)
        u = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        u = u * state[f"{part}.layernorm.weight"] + state[f"{part}.layernorm.bias"]
        basis = 1 - torch.tanh((u[..., None] - state[f"{part}.rbf.grid"]) / 0.33) ** 2
        x = basis.flatten(-2) @ state[f"{part}.spline_linear.weight"].T
    return x


def plain_global(state: dict, name: str, x: torch.Tensor, stride: int, run: int) -> torch.Tensor:
    x = plain_embed(state, f"{name}.patch_embed", x, stride)
    batch, channels, height, width = x.shape
    tokens = plain_norm(state, f"{name}.norm1", x).permute(0, 2, 3, 1).reshape(batch, -1, channels)
    pooled, attn = tokens, f"{name}.e_mhsa"
    if run > 1:
        count = tokens.shape[1] // run
        pooled = tokens[:, : count * run].reshape(batch, count, run, channels).mean(2)
        pooled = plain_norm(state, f"{attn}.norm", pooled.transpose(1, 2)).transpose(1, 2)
    q, k, v = (
        plain_linear(state, f"{attn}.{layer}", source).view(batch, -1, channels // 32, 32)
        for layer, source in (("q", tokens), ("k", pooled), ("v", pooled))
    )
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * 32**-0.5
    mixed = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).reshape(batch, -1, channels)
    mixed = plain_linear(state, f"{attn}.proj", mixed)
    x = x + mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)
    c = plain_embed(state, f"{name}.projection", x, 1)
    weight = state[f"{name}.mhca.group_conv3x3.weight"]
    y = F.conv2d(c, weight, padding=1, groups=len(weight) // 32)
    y = plain_norm(state, f"{name}.mhca.norm", y).relu()
    c = c + F.conv2d(y, state[f"{name}.mhca.projection.weight"])
    x = torch.cat([x, c], 1)
    normed = plain_norm(state, f"{name}.norm2", x)
    # R[r, m] = n2.flat[r C + m], back in the same order
    flat = torch.arange(normed[0].numel()).view(-1, normed.shape[1])
    place = flat // (height * width), flat // width % height, flat % width
    back = torch.empty_like(normed)
    back[(slice(None), *place)] = plain_kan(state, f"{name}.kan", normed[(slice(None), *place)])
    return x + back


def plain_medvit(model: models.MedViT, x: torch.Tensor) -> torch.Tensor:
    """The network from its definition, on the tensors of a state_dict."""
    state = model.state_dict()
    for i, stride in enumerate((2, 1, 1, 2)):
        x = F.conv2d(x, state[f"stem.{i}.conv.weight"], stride=stride, padding=1)
        x = plain_norm(state, f"stem.{i}.norm", x).relu()
    # kind, stride, length of the pooled runs
    blocks = [("local", 1, 0), ("local", 2, 0), ("global", 1, 16)]
    blocks += [("local", 2, 0), ("local", 1, 0), ("global", 1, 4), ("global", 2, 1)]
    for i, (kind, stride, run) in enumerate(blocks):
        name = f"features.{i}"
        x = (
            plain_local(state, name, x, stride)
            if kind == "local"
            else plain_global(state, name, x, stride, run)
        )
    x = plain_norm(state, "norm", x).mean((2, 3))
    return plain_linear(state, "proj_head.0", x)


def shaken(**options) -> nn.Module:
    """A model of three and a half blocks a kind, whose parameters and statistics all count."""
    model = randomise(models.create_model("medvit_tiny", **{**SMALL, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4 or "spline" in name or "fc" in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
            elif "rpb" in name or "layernorm" in name or ("bias" in name and "norm" not in name):
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif name.endswith("grid"):
                parameter.add_(0.1 * torch.randn(parameter.shape))  # what a checkpoint says goes
    return model.eval()


@pytest.mark.parametrize("size", [(97, 97), (112, 130)])
def test_equals_the_definition(size: tuple[int, int]) -> None:
    model, x = shaken(), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = plain_medvit(model.double(), x.double())
        assert relative_error(model(x.double()), expected) < 1e-11
        model.float()
        assert relative_error(model(x), expected) < 1e-4
        assert relative_error(model(x), expected) < 20 * relative_error(plain_medvit(model, x), expected)


def test_channels_last_input_gives_the_same() -> None:
    model, x = shaken(), torch.randn(2, 3, 97, 112)
    with torch.no_grad():
        expected = model.double()(x.double())
        model.to(memory_format=torch.channels_last)
        got = model(x.double().contiguous(memory_format=torch.channels_last))
        stage = model.forward_intermediates(x.double().contiguous(memory_format=torch.channels_last))[0]
    assert stage.is_contiguous(memory_format=torch.channels_last)  # else this would test nothing
    assert relative_error(got, expected) < 1e-12


def test_stage_maps_classifier_and_smallest_image() -> None:
    model, x = shaken(in_chans=1), torch.randn(2, 1, 97, 110)
    assert model.minimum_size == 97
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == list(model.stage_channels) == [32, 128, 160, 192]
        for stage_map, stride in zip(maps, model.stage_strides, strict=True):
            assert stage_map.shape[2:] == (-(-97 // stride), -(-110 // stride))
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.double().reset_classifier(7)
        assert model(x.double()).shape == (2, 7)
    assert not model.proj_head.training
    with pytest.raises(ValueError, match=r"argument `x`: expected images of at least 97 x 97"):
        model(x[:, :, :96].double())
    with pytest.raises(ValueError, match=r"argument `depths`.*the third a multiple of 3"):
        models.create_model("medvit_tiny", depths=(2, 2, 5, 1))


def test_drop_paths() -> None:
    with torch.device("meta"):
        blocks = list(models.create_model("medvit_tiny").features)
    assert blocks[1].drop_path.p == pytest.approx(0.01)
    last = blocks[-1]
    rates = (last.mhsa_path_dropout.p, last.mhca_path_dropout.p, last.mlp_path_dropout.p)
    assert rates == pytest.approx((0.075, 0.025, 0.1))


def test_gradients_reach_all_but_the_unused_parameters() -> None:
    model = shaken().train()
    model(torch.randn(2, 3, 97, 97)).square().sum().backward()
    grids = {name for name, _ in model.named_parameters() if name.endswith("rbf.grid")}
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == model.unused_parameters() | grids
    assert not any(model.get_parameter(name).requires_grad for name in grids)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["backbone", "per dataset"])
def test_reads_checkpoints(tmp_path, form: str) -> None:
    import numpy as np

    source = shaken()
    content: dict = dict(source.state_dict())
    if form == "per dataset":
        optimizer = torch.optim.AdamW(source.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        content = {
            "model": content,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
        }
        content |= {"acc": np.float64(0.97), "epoch": 99}
    torch.save(content, tmp_path / "medvit.pth")
    model = models.create_model("medvit_tiny", weights=tmp_path / "medvit.pth", **SMALL)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    headless = models.create_model(
        "medvit_tiny", weights=tmp_path / "medvit.pth", **{**SMALL, "num_classes": 0}
    )
    assert not any(key.startswith("proj_head") for key in headless.state_dict())
    with pytest.raises(
        ValueError, match=r"(?s)proj_head\.0\.weight: file \[10, 192\], model \[2, 192\].*reset_classifier"
    ):
        models.create_model("medvit_tiny", weights=tmp_path / "medvit.pth", **{**SMALL, "num_classes": 2})


def test_compiles_as_one_graph() -> None:
    model, x = shaken(), torch.randn(2, 3, 97, 97)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5
