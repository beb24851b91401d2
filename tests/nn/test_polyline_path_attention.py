from __future__ import annotations

import copy
import pickle
from typing import Any

import plain_polyline
import pytest
import torch
import torch.nn.functional as F
from randomise import relative_error
from tolerance import FORWARD, GRADIENT, assert_close_to_truth
from torch import nn
from torch.nn.utils import prune

from vitkernels import ops
from vitkernels.nn import PolylinePathAttention, RasterRotation

MODES = ("whole", "criss_cross")
PLAIN = {
    "whole": plain_polyline.MambaAttentionAllDouble,
    "criss_cross": plain_polyline.MambaAttentionChunkDouble,
}


def layer(mode: str, heads: int = 2, head_dim: int = 8) -> PolylinePathAttention:
    """A layer whose parameters all count."""
    module = PolylinePathAttention(heads * head_dim, heads, mode=mode)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape))
            if name.endswith("dt_bias"):
                parameter.sub_(1)
    return module


def plain(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The same layer as the official code's class, on the module's own parameters."""
    theirs = PLAIN[module.mode](module.embed_dim, module.num_heads).to(x.dtype)
    rel_pos = plain_polyline.RotaryPositionEmbedding2D(module.head_dim).to(x.dtype)(x.shape[1:3])
    return torch.func.functional_call(theirs, dict(module.named_parameters()), (x, rel_pos))


def results(forward, module: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    module, leaf = copy.deepcopy(module).to(dtype), x.to(dtype, copy=True).requires_grad_()
    out = forward(module, leaf)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad} | grads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size",
    [(5, 7), (1, 6), (6, 1), *(pytest.param(s, marks=pytest.mark.thorough) for s in ((14, 14), (7, 23)))],
    ids=str,
)
def test_equals_the_definition(mode: str, size: tuple[int, int]) -> None:
    draws = []
    for seed in range(3):  # held to the rule together: of one, PyTorch's own error is a matter of luck
        torch.manual_seed(seed)
        module, x = layer(mode), torch.randn(2, *size, 16)
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


def test_official_parameters_and_their_initial_values() -> None:
    module = PolylinePathAttention(64, 4, mode="criss_cross")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    projections = {f"{name}_proj.weight": (64, 64) for name in ("q", "k", "v", "out")}
    projections |= {f"{name}_proj.bias": (64,) for name in ("q", "k", "v", "out")}
    assert shapes == projections | {
        "lepe.conv.weight": (64, 1, 5, 5),
        "lepe.conv.bias": (64,),
        "path_embed.dt_linear.weight": (2, 16),
        "path_embed.dt_bias": (4,),
        "path_embed.A_log": (4,),
    }
    embed = PolylinePathAttention(2000, 1000).path_embed
    step, rate = F.softplus(embed.dt_bias.detach()), embed.A_log.detach().exp()
    assert 0.00099 < step.min() < 0.0012
    assert 0.09 < step.max() < 0.1001
    assert step.log().mean() == pytest.approx(-4.6, abs=0.2)  # uniform in the logarithm
    assert 1 <= rate.min() < 1.01
    assert 1.09 < rate.max() < 1.1001
    assert repr(module).startswith("PolylinePathAttention(\n  num_heads=4, head_dim=16, mode='criss_cross'")


def test_positions_are_the_raster_index() -> None:
    rotation = RasterRotation(6)
    assert rotation.angle.tolist() == pytest.approx([1, 1, 0.01, 0.01, 0.0001, 0.0001])
    table = rotation(3, 4, torch.float64)
    assert table.shape == (3, 4, 1, 3, 2)
    angle = rotation.angle[::2].double()
    assert torch.equal(table[2, 1, 0], torch.stack(((9 * angle).cos(), (9 * angle).sin()), -1))


@pytest.mark.parametrize("mode", MODES)
def test_takes_the_table_the_official_pair_or_nothing(mode: str) -> None:
    module, x = layer(mode), torch.randn(2, 4, 5, 16)
    expected = module(x, RasterRotation(8)(4, 5))
    sin, cos = plain_polyline.RotaryPositionEmbedding2D(8)((4, 5))
    assert torch.equal(module(x), expected)
    assert relative_error(module(x, (sin, cos)), expected) < 1e-6
    assert relative_error(module(x, (cos, sin)), expected) > 1e-2


def test_the_table_is_kept_until_the_size_or_the_angles_change() -> None:
    rotation = RasterRotation(8)
    table = rotation(4, 6)
    assert rotation(4, 6) is table
    assert list(rotation.state_dict()) == ["angle"]
    assert rotation(6, 4).shape == (6, 4, 1, 4, 2)
    for copied in (copy.deepcopy(rotation), pickle.loads(pickle.dumps(rotation))):
        assert copied.__dict__.keys() == RasterRotation(8).__dict__.keys()
        assert torch.equal(copied(4, 6), table)
    with torch.no_grad():
        rotation.angle.mul_(2)
    assert not torch.equal(rotation(4, 6), table)
    assert rotation(4, 6, torch.float64).dtype is torch.float64


def test_angles_stay_in_float32_in_half_models() -> None:
    rotation = RasterRotation(16)
    exact, expected = rotation.angle.clone(), rotation(50, 84)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(RasterRotation(16).angle, exact)
    finally:
        torch.set_default_dtype(torch.float32)
    for half in (rotation.half(), rotation.bfloat16()):
        assert torch.equal(half.angle, exact)
        assert torch.equal(half(50, 84), expected)
    assert rotation.double().angle.dtype is torch.float64
    assert rotation.half().angle.dtype is torch.float64


def test_decays_of_zero_give_plain_attention() -> None:
    module, x = layer("whole"), torch.randn(2, 5, 6, 16)
    nn.init.constant_(module.path_embed.A_log, float("-inf"))
    rel_pos = plain_polyline.RotaryPositionEmbedding2D(8)((5, 6))
    heads = (linear(x).unflatten(-1, (2, 8)) for linear in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = heads
    q, k = plain_polyline.turned(q, *rel_pos), plain_polyline.turned(k, *rel_pos)
    mixed = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    mixed = mixed.transpose(1, 2).reshape(x.shape) + module.lepe(v.flatten(-2))
    assert relative_error(module(x), module.out_proj(mixed)) < 1e-5


def test_strong_decays_stay_finite() -> None:
    module, x = layer("whole"), torch.randn(1, 4, 5, 16, requires_grad=True)
    for bias in (50.0, -200.0):
        nn.init.constant_(module.path_embed.dt_bias, bias)
        out = module(x)
        out.square().sum().backward()
        assert all(t.isfinite().all() for t in (out, x.grad, module.path_embed.A_log.grad))


def test_v_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls, values = layer("whole"), [], []
    module.v_proj.register_forward_hook(lambda _, __, output: values.append(output))

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    original = ops.polyline_path_attention
    monkeypatch.setattr(ops, "polyline_path_attention", spy)
    module(torch.randn(1, 3, 4, 16))
    (_, _, v, log_decay_w, log_decay_h), options = calls[0]
    assert v.data_ptr() == values[0].data_ptr()
    assert options == {"mode": "whole", "scale": 8**-0.5, "backend": None}
    assert log_decay_w.shape == log_decay_h.shape == (1, 3, 4, 2)
    assert max(log_decay_w.max(), log_decay_h.max()) <= 0


def test_hooks_on_the_decays_are_called() -> None:
    module, x, seen = layer("whole"), torch.randn(2, 3, 4, 16), []
    expected = module(x)
    handle = module.path_embed.dt_linear.register_forward_hook(
        lambda _, __, output: seen.append(output.shape)
    )
    assert relative_error(module(x), expected) < 1e-6
    assert seen == [(2, 3, 4, 2, 2)]
    handle.remove()
    prune.l1_unstructured(module.path_embed.dt_linear, "weight", 8)  # recomputes the weight before every call
    assert relative_error(module(x), expected) > 1e-3
    module.path_embed.dt_linear.weight_orig.data.zero_()
    zeroed = module(x)
    module.path_embed.dt_linear = nn.Linear(8, 2, bias=False)
    nn.init.zeros_(module.path_embed.dt_linear.weight)
    assert relative_error(module(x), zeroed) < 1e-6


def test_a_replaced_layer_of_the_decays_is_called() -> None:
    class Adapted(nn.Module):
        """A layer and what an adapter adds to it; asked for its weight, it tells the layer's."""

        def __init__(self, base: nn.Linear, added: nn.Linear) -> None:
            super().__init__()
            self.base, self.added, self.weight = base, added, base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.added(x)

    module, x = layer("whole"), torch.randn(2, 3, 4, 16)
    base, added = module.path_embed.dt_linear, nn.Linear(8, 2, bias=False)
    module.path_embed.dt_linear = nn.Linear(8, 2, bias=False)
    module.path_embed.dt_linear.weight = nn.Parameter(base.weight.detach() + added.weight.detach())
    merged = module(x)
    module.path_embed.dt_linear = Adapted(base, added)
    assert relative_error(module(x), merged) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_half_models(mode: str, dtype: torch.dtype) -> None:
    module, x = layer(mode), torch.randn(2, 6, 7, 16)
    exact = plain(module.double(), x.double())
    module.float()
    with torch.autocast("cpu", dtype):
        got, baseline = module(x), plain(module, x)
    assert got.dtype is dtype
    assert relative_error(got, exact) < 2 * relative_error(baseline, exact)
    half = copy.deepcopy(module).to(dtype)
    assert half(x.to(dtype)).dtype is dtype
    assert relative_error(half(x.to(dtype)), exact) < 3 * relative_error(baseline, exact)
    got.float().square().sum().backward()
    assert module.path_embed.dt_bias.grad.dtype is torch.float32


@pytest.mark.parametrize("mode", [pytest.param("whole", marks=pytest.mark.thorough), "criss_cross"])
def test_compiles_as_one_graph(mode: str) -> None:
    module, rotation = layer(mode), RasterRotation(8)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return module(x, rotation(x.shape[1], x.shape[2]))

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((4, 5), (6, 3)):
        x = torch.randn(2, *size, 16)
        assert relative_error(compiled(x), forward(x)) < 1e-5
    twin = copy.deepcopy(module)
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, name


def test_bad_arguments_and_inputs() -> None:
    with pytest.raises(ValueError, match=r"argument `embed_dim`: expected a multiple of num_heads = 3"):
        PolylinePathAttention(64, 3)
    with pytest.raises(ValueError, match=r"argument `embed_dim`: expected an even number of channels a head"):
        PolylinePathAttention(15, 3)
    with pytest.raises(ValueError, match=r"argument `mode`: expected 'whole' or 'criss_cross'; got 'chunk'"):
        PolylinePathAttention(64, 2, mode="chunk")
    with pytest.raises(ValueError, match=r"argument `head_dim`: expected an even number"):
        RasterRotation(7)
    with pytest.raises(ValueError, match=r"argument `x`: expected shape \[batch, H, W, 16\], channels last"):
        layer("whole")(torch.randn(2, 16, 8, 9))
    module, x = layer("whole"), torch.randn(2, 4, 5, 16)
    one_row = RasterRotation(module.head_dim)(1, 5)
    pair = one_row.new_zeros(4, 1, module.head_dim), one_row.new_zeros(4, 1, module.head_dim)
    for rel_pos in (one_row, pair, RasterRotation(module.head_dim)(5, 4), RasterRotation(2)(4, 5)):
        with pytest.raises(
            ValueError, match="argument `rel_pos`: expected the rotation of a map 4 x 5 by heads"
        ):
            module(x, rel_pos)
