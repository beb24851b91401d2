"""What must hold of polyline path attention whatever computes it, on the reference and on the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch

from vitkernels import ops

F64 = torch.float64
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
each_mode = pytest.mark.parametrize("mode", ["whole", "criss_cross"])
GRIDS = [(1, 1), (1, 7), (6, 1), (3, 4), (7, 9)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")


def inputs(height: int, width: int, heads: int = 2, d: int = 8, dv: int = 6) -> list[torch.Tensor]:
    lead = (2, height, width, heads)
    q, k, v = (torch.randn(*lead, c, dtype=F64) for c in (d, d, dv))
    return [q, k, v, *(-torch.rand(*lead, dtype=F64) for _ in "wh")]


def lines(t: torch.Tensor, vertical: bool) -> torch.Tensor:
    """[B, H, W, heads, d] -> [B, heads, line, token, d]."""
    return t.permute(0, 3, 2, 1, 4) if vertical else t.permute(0, 3, 1, 2, 4)


def line_attention(q, k, v, vertical: bool, mask=0.0) -> torch.Tensor:
    q, k, v = (lines(t, vertical) for t in (q, k, v))
    out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + mask, dim=-1) @ v
    return out.permute(0, 3, 2, 1, 4) if vertical else out.permute(0, 2, 3, 1, 4)


def path_mask(along: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """M of one head by walking: down the key's column, then along the query's row; the smaller index not included."""
    height, width = along.shape
    mask = torch.zeros(height, width, height, width, dtype=along.dtype)
    for i, j, r, c in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        mask[i, j, r, c] = (
            along[i, min(j, c) + 1 : max(j, c) + 1].sum() + down[min(i, r) + 1 : max(i, r) + 1, c].sum()
        )
    return mask.reshape(height * width, height * width)


@each_backend
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 1), (3, 4)], ids=str)
def test_the_mask_is_a_product_along_the_path(grid, backend):
    q, k, v, along, down = inputs(*grid, heads=1)
    out = ops.polyline_path_attention(q, k, v, along, down, backend=backend)
    for b in range(2):
        mask = path_mask(along[b, ..., 0], down[b, ..., 0])
        assert (mask.diagonal() == 0).all()
        scores = q[b].flatten(0, 2) @ k[b].flatten(0, 2).T * q.shape[-1] ** -0.5
        weights = (torch.softmax(scores + mask, -1) + torch.softmax(scores + mask.T, -1)) / 2
        torch.testing.assert_close(out[b].flatten(0, 2), weights @ v[b].flatten(0, 2))


@each_backend
@each_grid
def test_no_decay_is_plain_attention(grid, backend):
    q, k, v, *_ = inputs(*grid)
    zeros = torch.zeros(q.shape[:-1], dtype=F64)
    out = ops.polyline_path_attention(q, k, v, zeros, zeros, backend=backend)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    )
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), want)
    out = ops.polyline_path_attention(q, k, v, zeros, zeros, mode="criss_cross", backend=backend)
    rows, columns = line_attention(q, k, v, False), line_attention(q, k, v, True)
    want = (line_attention(q, k, rows, True) + line_attention(q, k, columns, False)) / 2
    torch.testing.assert_close(out, want)


@each_backend
@each_grid
def test_constant_decay_is_the_manhattan_attention_of_rmt(grid, backend):
    q, k, v, *_ = inputs(*grid)
    decay = torch.tensor([math.log(1 - 2.0**-2), math.log(1 - 2.0**-4)], dtype=F64)
    constant = decay.expand(q.shape[:-1])
    y, x = (t.flatten() for t in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
    out = ops.polyline_path_attention(q, k, v, constant, constant, backend=backend)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)), attn_mask=decay[:, None, None] * distance
    )
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), want)
    out = ops.polyline_path_attention(q, k, v, constant, constant, mode="criss_cross", backend=backend)

    def attend(values, vertical):
        n = torch.arange(grid[0 if vertical else 1])
        mask = decay[:, None, None, None] * (n[:, None] - n).abs()
        return line_attention(q, k, values, vertical, mask)

    torch.testing.assert_close(out, (attend(attend(v, False), True) + attend(attend(v, True), False)) / 2)


@each_backend
def test_on_one_row_both_softmaxes_coincide(backend):
    q, k, v, along, down = inputs(1, 9)
    total = along.cumsum(2).transpose(2, 3)[:, 0]  # [B, heads, W]
    order = torch.arange(9)
    sign = torch.where(order[:, None] >= order, 1.0, -1.0).double()
    mask = (total[..., :, None] - total[..., None, :]) * sign
    want = line_attention(q, k, v, False, mask[:, :, None])
    for mode in ("whole", "criss_cross"):
        out = ops.polyline_path_attention(q, k, v, along, down, mode=mode, backend=backend)
        torch.testing.assert_close(out, want)


@each_backend
@each_mode
@each_grid
def test_a_transposed_grid_exchanges_the_decays(grid, mode, backend):
    tensors = inputs(*grid)
    q, k, v, along, down = (t.transpose(1, 2) for t in tensors)
    out = ops.polyline_path_attention(*tensors, mode=mode, backend=backend)
    other = ops.polyline_path_attention(q, k, v, down, along, mode=mode, backend=backend)
    torch.testing.assert_close(other.transpose(1, 2), out)


@each_backend
@each_mode
@each_grid
def test_the_first_of_a_line_has_no_influence_and_gradient_zero(grid, mode, backend):
    tensors = [t.requires_grad_() for t in inputs(*grid)]
    out = ops.polyline_path_attention(*tensors, mode=mode, backend=backend)
    along, down = torch.autograd.grad(out.square().sum(), tensors[3:])
    assert (along[:, :, 0] == 0).all()
    assert (down[:, 0] == 0).all()
    for value in (-5.0, -1e30, -math.inf, math.nan):
        with torch.no_grad():
            tensors[3][:, :, 0] = tensors[4][:, 0] = value
        changed = ops.polyline_path_attention(*tensors, mode=mode, backend=backend)
        assert torch.equal(changed, out), value


@each_backend
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [-50.0, 0.0], ids=["strong", "underflowed"])
def test_strong_and_underflowed_decays(decay, dtype, mode, backend):
    """A decay that underflowed to 0 has no sign, but its gradient goes by the order of the indices."""
    q, k, v, *_ = (t.to(dtype) for t in inputs(6, 21))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    tensors += [torch.full(q.shape[:-1], decay, requires_grad=True) for _ in "wh"]
    out = ops.polyline_path_attention(*tensors, mode=mode, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads)
    if decay:
        torch.testing.assert_close(out.float(), v.float(), atol=1e-2, rtol=1e-2)  # each sees itself alone
    else:
        assert all((g[:, 1:, 1:] != 0).all() for g in grads[3:])


@each_mode
def test_gradients_at_zero_decays_agree_with_finite_differences(mode):
    """Positive steps are no decays, but the mask is linear in them: no |.| bends it at 0."""
    q, k, v, along, down = inputs(3, 4, heads=1, d=4, dv=3)
    zeros = [torch.zeros_like(t).requires_grad_() for t in (along, down)]

    def run(along, down):
        return ops.polyline_path_attention(q, k, v, along, down, mode=mode, backend="cpu")

    assert torch.autograd.gradcheck(run, zeros)


@each_backend
@each_mode
def test_decays_come_from_another_input(mode, backend):
    """Gradients of q, k and v and those of the decays do not meet."""
    tensors = [t.requires_grad_() for t in inputs(4, 5)]
    other = [torch.rand_like(t).neg().requires_grad_() for t in tensors[3:]]
    out = ops.polyline_path_attention(*tensors[:3], *other, mode=mode, backend=backend)
    assert all(g.any() for g in torch.autograd.grad(out.square().sum(), [*tensors[:3], *other]))
