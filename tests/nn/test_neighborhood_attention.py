from __future__ import annotations

import copy
import sys
import types
from typing import Any

import plain_neighborhood
import pytest
import torch
from randomise import relative_error
from tolerance import FORWARD, GRADIENT, assert_close_to_truth
from torch import nn

import vitkernels
from vitkernels import ops
from vitkernels.nn import NeighborhoodAttention1D, NeighborhoodAttention2D

# map, kernel_size, dilation, is_causal, rel_pos_bias
CASES: dict[str, tuple[Any, ...]] = {
    "1d": ((11,), 3, 1, False, True),
    "1d dilated, even": ((13,), 4, 3, False, True),
    "1d causal": ((10,), 3, 2, True, False),
    "2d": ((8, 9), 7, 1, False, True),
    "2d dilated": ((7, 9), 3, 2, False, True),
    "2d dense groups": ((6, 6), 3, 2, False, True),
    "2d mixed": ((5, 8), (1, 4), (3, 2), False, True),
    "2d causal rows": ((6, 7), (3, 2), (2, 1), (True, False), False),
}


def layer(case: str, heads: int = 2, head_dim: int = 8) -> nn.Module:
    size, kernel_size, dilation, is_causal, rel_pos_bias = CASES[case]
    cls = NeighborhoodAttention1D if len(size) == 1 else NeighborhoodAttention2D
    module = cls(
        heads * head_dim,
        heads,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        rel_pos_bias=rel_pos_bias,
    )
    if rel_pos_bias:
        nn.init.normal_(module.rpb)
    return module


def tokens(case: str, width: int = 16) -> torch.Tensor:
    return torch.randn(2, *CASES[case][0], width)


def plain(module: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim)).unbind(-3)
    options = module.kernel_size, module.dilation, module.is_causal
    return module.proj(plain_neighborhood.attention(q, k, v, *options, module.scale, module.rpb).flatten(-2))


def results(forward, module: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    module, leaf = copy.deepcopy(module).to(dtype), x.to(dtype, copy=True).requires_grad_()
    out = forward(module, leaf)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad} | grads


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str) -> None:
    draws = []
    for seed in range(3):  # held to the rule together: of one, PyTorch's own error is a matter of luck
        torch.manual_seed(seed)
        module, x = layer(case), tokens(case)
        draws.append(
            [
                results(lambda m, leaf: m(leaf), module, x, torch.float32),
                results(plain, module, x, torch.float32),
                results(plain, module, x, torch.float64),
            ]
        )
    for name in draws[0][0]:
        got, baseline, truth = (torch.stack([draw[kind][name] for draw in draws]) for kind in range(3))
        count = 1 if name in ("out", "x") else x[..., 0].numel()
        factor = FORWARD if name == "out" else GRADIENT
        assert_close_to_truth(name, got, baseline, truth, factor=factor, reduced=count)


def test_the_projection_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls, packed = layer("2d"), [], []
    module.qkv.register_forward_hook(lambda _, __, output: packed.append(output))

    def spy(q, k, v, *args, **kwargs):
        calls.append((q, k, v))
        return original(q, k, v, *args, **kwargs)

    original = ops.neighborhood_attention
    monkeypatch.setattr(ops, "neighborhood_attention", spy)
    module(tokens("2d"))
    offsets = [view.data_ptr() - packed[0].data_ptr() for view in calls[0]]
    assert offsets == [0, 4 * 16, 4 * 32]
    assert {view.stride() for view in calls[0]} == {(8 * 9 * 48, 9 * 48, 48, 8, 1)}


def test_parameters_and_both_spellings() -> None:
    module = NeighborhoodAttention2D(dim=64, num_heads=2, kernel_size=7, dilation=None, rel_pos_bias=True)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "rpb": (2, 13, 13),
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
    }
    assert (module.dilation, module.is_causal, module.kernel_size) == ((1, 1), (False, False), (7, 7))
    oldest = NeighborhoodAttention2D(64, 2, kernel_size=7, bias=True, attn_drop=0.1, proj_drop=0.2)
    newest = NeighborhoodAttention2D(64, 2, 7, stride=1, dilation=(1, 2), is_causal=False, qk_scale=0.5)
    oldest.load_state_dict(module.state_dict())
    assert newest.rpb is None
    assert (newest.scale, newest.dilation) == (0.5, (1, 2))
    assert "rpb" not in newest.state_dict()
    assert not any(key == "qkv.bias" for key in NeighborhoodAttention1D(8, 1, 3, qkv_bias=False).state_dict())
    assert repr(oldest).startswith("NeighborhoodAttention2D(\n  num_heads=2, head_dim=32, kernel_size=(7, 7)")


def test_scale_and_projection_dropout() -> None:
    module, x = NeighborhoodAttention1D(16, 2, 3, qk_scale=0.0, proj_drop=0.5), torch.randn(1, 3, 16)
    module.eval()
    packed = module.qkv(x)[..., 32:]
    mean = module.proj(packed.mean(1, keepdim=True)).expand(
        1, 3, 16
    )  # a scale of 0 is no default: all keys equal
    torch.testing.assert_close(module(x), mean)
    module.train()
    assert (module(x) == 0).any()


def test_bad_arguments() -> None:
    cls = NeighborhoodAttention2D
    with pytest.raises(TypeError, match=r"NeighborhoodAttention2D: .*the fourth being 2.*dilation.*stride"):
        cls(64, 2, 7, 2)
    with pytest.raises(ValueError, match=r"argument `dim`: .*embed_dim = 64"):
        cls(64, 2, 7, dim=64)
    with pytest.raises(ValueError, match=r"argument `stride`: expected 1"):
        cls(64, 2, 7, stride=(1, 2))
    with pytest.raises(ValueError, match=r"argument `rel_pos_bias`: .*is_causal"):
        cls(64, 2, 7, rel_pos_bias=True, is_causal=(True, False))
    with pytest.raises(ValueError, match=r"argument `embed_dim`: expected a multiple of num_heads = 3"):
        cls(64, 3, 7)
    with pytest.raises(TypeError, match=r"argument `num_heads`: expected a positive int; got None"):
        cls(64, kernel_size=7)
    with pytest.raises(TypeError, match=r"argument `kernel_size`: expected 2 ints; got None"):
        cls(64, 2)
    with pytest.raises(TypeError, match=r"argument `is_causal`: expected a bool, or 2"):
        cls(64, 2, 7, is_causal=(True,))
    with pytest.raises(ValueError, match=r"argument `attn_drop`"):
        cls(64, 2, 7, attn_drop=1.5)


def test_bad_inputs() -> None:
    module = NeighborhoodAttention2D(16, 2, 3, dilation=2)
    with pytest.raises(ValueError, match=r"argument `x`: expected shape \[batch, X, Y, 16\], channels last"):
        module(torch.randn(2, 16, 8, 9))
    with pytest.raises(ValueError, match="dilation"):
        module(torch.randn(1, 5, 8, 16))


def test_dropout_on_the_weights_is_refused_in_training_and_never_ignored() -> None:
    module, x = NeighborhoodAttention2D(16, 2, 3, attn_drop=0.1), torch.randn(1, 4, 4, 16)
    with pytest.raises(NotImplementedError, match=r"attn_drop = 0\.1 in training"):
        module(x)
    assert module.eval()(x).shape == x.shape


def test_old_code_runs_on_these_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "natten", vitkernels.nn)
    code = types.ModuleType("users_model")
    exec(
        "from natten import NeighborhoodAttention2D as NeighborhoodAttention\n"
        "layer = NeighborhoodAttention(64, kernel_size=7, dilation=2, num_heads=2, qkv_bias=True,\n"
        "                              qk_scale=None, attn_drop=0.0, proj_drop=0.0, rel_pos_bias=True)\n",
        code.__dict__,
    )
    assert code.layer(torch.randn(1, 14, 15, 64)).shape == (1, 14, 15, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models(dtype: torch.dtype) -> None:
    module, x = layer("2d dilated"), tokens("2d dilated")
    exact = plain(module.double(), x.double())
    module.float()
    with torch.autocast("cpu", dtype):
        got, baseline = module(x), plain(module, x)
    assert got.dtype is dtype
    assert relative_error(got, exact) < 2 * relative_error(baseline, exact)
    half = copy.deepcopy(module).to(dtype)
    assert relative_error(half(x.to(dtype)), exact) < 2 * relative_error(plain(half, x.to(dtype)), exact)
    got.float().square().sum().backward()
    assert module.rpb.grad.dtype is torch.float32


@pytest.mark.parametrize("case", ["1d causal", "2d dilated"])
def test_compiles_as_one_graph(case: str) -> None:
    module, x = layer(case), tokens(case)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), module(x)) < 1e-5
    twin = copy.deepcopy(module)
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ["1d causal", "2d dilated"])
def test_traces(case: str) -> None:
    """A list of bools in the operator's schema once ended every torch.jit.trace."""
    module, x = layer(case).eval(), tokens(case)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert torch.equal(traced(x.flip(0)), module(x.flip(0)))


def test_equals_nattens_own_layers() -> None:
    natten = pytest.importorskip("natten", reason="natten is not installed")
    cases = [
        (NeighborhoodAttention1D, natten.NeighborhoodAttention1D, (13,), 4, 2, True),
        (NeighborhoodAttention1D, natten.NeighborhoodAttention1D, (11,), 5, 2, False),
        (NeighborhoodAttention2D, natten.NeighborhoodAttention2D, (9, 11), (3, 5), (2, 1), False),
        (NeighborhoodAttention2D, natten.NeighborhoodAttention2D, (15, 17), 7, 2, False),
        (NeighborhoodAttention2D, natten.NeighborhoodAttention2D, (8, 9), 3, 2, (True, False)),
    ]
    for ours, theirs, size, kernel_size, dilation, is_causal in cases:
        options = {"dilation": dilation, "is_causal": is_causal}
        reference = theirs(32, 2, kernel_size, **options)
        module = ours(32, 2, kernel_size, **options)
        module.load_state_dict(reference.state_dict())
        x = torch.randn(2, *size, 32)
        with torch.no_grad():  # natten from 0.20 on has no gradients on the CPU
            assert relative_error(module(x), reference(x)) < 1e-6
