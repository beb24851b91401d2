from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from randomise import randomise, relative_error
from torch import nn

import vitkernels
from vitkernels.nn import LIM, HybridPerceptionBlock, StripSelfAttention

State = dict[str, torch.Tensor]


def plain_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """A batch norm in eval mode, of channels last."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_layer_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def plain_attention(state: State, x: torch.Tensor, heads: int, ratio: int, scale: float) -> torch.Tensor:
    """Strip self-attention from its definition, on a state_dict."""
    batch, height, width, dim = x.shape
    reduced = x
    if ratio > 1:
        # What does not fill a cell of R x R tokens has no part in keys and values.
        cells = x[:, : height // ratio * ratio, : width // ratio * ratio]
        cells = cells.reshape(batch, height // ratio, ratio, width // ratio, ratio, dim).transpose(2, 3)
        conv = "sr.conv.0" if "sr.conv.0.weight" in state else "sr.conv"
        weight, bias = state[f"{conv}.weight"], state[f"{conv}.bias"]
        if weight.shape[1] == 1:
            reduced = (cells * weight[:, 0].permute(1, 2, 0)).sum((3, 4)) + bias
        else:
            reduced = cells.mean((3, 4)) @ weight[:, :, 0, 0].T + bias
        if "sr.conv.1.weight" in state:
            reduced = plain_norm(state, "sr.conv.1", reduced)
        if "sr.norm.weight" in state:
            reduced = plain_layer_norm(state, "sr.norm", reduced)
        if "gelu" in state:
            reduced = F.gelu(reduced)
    q, k, v = (
        plain_linear(state, name, tokens).flatten(1, 2).unflatten(-1, (heads, -1))
        for name, tokens in (("q", x), ("k", reduced), ("v", reduced))
    )
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) * scale).softmax(-1)
    return plain_linear(state, "proj", torch.einsum("bhnm,bmhc->bnhc", weights, v).reshape(x.shape))


def shaken(module: nn.Module) -> Any:
    """Parameters that all count, and logits of some size."""
    randomise(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(spread * torch.randn(parameter.shape) + ("norm" in name and "weight" in name))
    return module.eval()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"qk_dim_per_head": 3, "qkv_bias": False},
    {"reduction": "pool", "norm": "layer", "act": "gelu", "qkv_bias": False},
    {"reduction": "pool"},
    {"norm": None},
    {"norm": "layer"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("size", "ratio"),
    [((57, 55), 8), ((15, 13), 2), ((4, 5), 1)],
    ids=["57x55 by 8", "15x13 by 2", "4x5 by 1"],
)
def test_equals_the_definition(options: dict[str, Any], size: tuple[int, int], ratio: int) -> None:
    layer, x = shaken(StripSelfAttention(24, 3, ratio, scale=1.7, **options)), torch.randn(2, *size, 24)
    extra = {"gelu": torch.ones(1)} if options.get("act") else {}
    with torch.no_grad():
        truth = plain_attention({**layer.double().state_dict(), **extra}, x.double(), 3, ratio, 1.7)
        assert relative_error(layer(x.double()), truth) < 1e-12
        assert relative_error(layer.float()(x), truth) < 1e-5


def test_tokens_of_an_unfilled_cell_are_no_keys() -> None:
    layer = shaken(StripSelfAttention(16, 2, 8, scale="value_dim"))
    x = torch.randn(1, 17, 23, 16)
    changed = x.clone()
    changed[:, 16:] += 1
    changed[:, :, 16:] += 1
    with torch.no_grad():
        got, expected = layer(changed), layer(x)
        torch.testing.assert_close(got[:, :16, :16], expected[:, :16, :16])
        changed[:, 15, 15] += 1
        assert relative_error(layer(changed)[:, :15, :15], expected[:, :15, :15]) > 1e-4


def test_scales() -> None:
    assert StripSelfAttention(48, 3, scale="value_dim").scale == 0.25
    assert StripSelfAttention(48, 3, scale="qk_dim").scale == 1
    assert StripSelfAttention(48, 3, scale="qk_dim", qk_dim_per_head=4).scale == 0.5
    assert StripSelfAttention(48, 3, scale=-2).scale == -2
    with pytest.raises(TypeError, match="scale"):
        StripSelfAttention(48, 3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="argument `scale`: expected 'value_dim' or 'qk_dim', or a number"):
        StripSelfAttention(48, 3, scale=None)  # type: ignore[arg-type]


def test_parameters() -> None:
    layer = StripSelfAttention(64, 4, 8, scale="value_dim")
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert shapes == {
        **{"q.weight": (4, 64), "q.bias": (4,), "k.weight": (4, 64), "k.bias": (4,)},
        **{"v.weight": (64, 64), "v.bias": (64,), "proj.weight": (64, 64), "proj.bias": (64,)},
        **{"sr.conv.0.weight": (64, 1, 8, 8), "sr.conv.0.bias": (64,)},
        **{"sr.conv.1.weight": (64,), "sr.conv.1.bias": (64,)},
    }
    assert not any("sr" in name for name, _ in StripSelfAttention(64, 4, scale=1).named_parameters())
    assert "num_heads=4, head_dim=16, qk_dim_per_head=1, sr_ratio=8, scale=0.25" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10}, r"argument `dim`: expected a multiple of num_heads = 4; got 10"),
        ({"sr_ratio": 0}, r"argument `sr_ratio`"),
        ({"qk_dim_per_head": 0}, r"argument `qk_dim_per_head`"),
        ({"scale": "dim"}, r"argument `scale`: expected 'value_dim' or 'qk_dim', or a number"),
        ({"scale": float("nan")}, r"argument `scale`: expected a finite number"),
        ({"reduction": "max"}, r"argument `reduction`: expected 'conv' or 'pool'; got 'max'"),
        ({"norm": "group"}, r"argument `norm`: expected 'batch' or 'layer' or None"),
        ({"act": "relu"}, r"argument `act`: expected 'gelu' or None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StripSelfAttention(**{"dim": 16, "num_heads": 4, "scale": 1.0, **arguments})


def test_bad_inputs() -> None:
    layer = StripSelfAttention(16, 4, 4, scale=1)
    with pytest.raises(ValueError, match=r"argument `x`: expected shape \[batch, H, W, 16\], channels last"):
        layer(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match=r"argument `x`: expected a map of at least 4 x 4"):
        layer(torch.zeros(1, 9, 3, 16))


def test_the_batch_norm_folds_into_the_reduction() -> None:
    layer, x = shaken(StripSelfAttention(16, 2, 4, scale=1)), torch.randn(2, 9, 8, 16)
    with torch.no_grad():
        expected = layer(x)
        report = vitkernels.apply(layer, verbose=False)
        assert ("sr.conv", "Sequential", "batch norm folded") in report.replaced
        assert ("", "StripSelfAttention", "calls its kernel itself") in report.skipped
        assert relative_error(layer(x), expected) < 1e-5
        layer.sr.conv[1].running_mean.add_(1)
        assert relative_error(layer(x), expected) > 1e-2
    vitkernels.revert(layer)


def test_empty_batch_and_gradients() -> None:
    layer = shaken(StripSelfAttention(16, 2, 2, scale=1))
    assert layer(torch.zeros(0, 4, 5, 16)).shape == (0, 4, 5, 16)
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64, requires_grad=True)
    layer = layer.double()
    names = [name for name, _ in layer.named_parameters()]
    parameters = [layer.get_parameter(name) for name in names]
    got = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    state = {**layer.state_dict(), **dict(zip(names, parameters, strict=True))}
    expected = torch.autograd.grad(plain_attention(state, x, 2, 2, 1.0).square().sum(), [x, *parameters])
    for name, ours, theirs in zip(["x", *names], got, expected, strict=True):
        # A bias of the keys shifts the logits of a query alike: its gradient is zero.
        limit = 1e-9 if name == "k.bias" else 1e-12 * theirs.norm()
        assert (ours - theirs).norm() < limit + 1e-11 * theirs.norm(), name


def test_block_equals_the_definition() -> None:
    block, x = shaken(HybridPerceptionBlock(16, 2, 2, scale=0.5, mlp_ratio=3)), torch.randn(2, 7, 6, 16)
    state = block.double().state_dict()

    def part(name: str) -> State:
        return {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}

    def depthwise(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        return F.conv2d(x.movedim(-1, 1), weight, bias, padding=1, groups=len(weight)).movedim(1, -1)

    with torch.no_grad():
        y = x.double()
        y = y + depthwise("local", y)
        y = y + plain_attention(part("attn"), plain_layer_norm(state, "norm1", y), 2, 2, 0.5)
        z = F.gelu(depthwise("lim.conv1", plain_layer_norm(state, "norm2", y)))
        y = y + depthwise("lim.conv2", plain_norm(state, "lim.norm", z))
        z = plain_linear(state, "mlp.fc1", plain_layer_norm(state, "norm3", y))
        y = y + plain_linear(state, "mlp.fc2", F.gelu(z))
        assert block.mlp.fc1.out_features == 48
        assert relative_error(block(x.double()), y) < 1e-12
        assert relative_error(block.float()(x), y) < 1e-5


def test_drop_path_skips_the_branches_of_a_sample() -> None:
    block = shaken(HybridPerceptionBlock(8, 1, scale=1, drop_path=0.999)).train()
    x = torch.randn(4, 3, 3, 8)
    expected = x + block.local(x)
    assert torch.equal(block(x), expected)
    assert isinstance(block.lim, LIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype: torch.dtype) -> None:
    layer = shaken(HybridPerceptionBlock(16, 2, 2, scale=1)).to(dtype)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 6, 16, dtype=dtype)
    results = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaf)))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < (1e-5 if dtype is torch.float32 else 2e-2)
