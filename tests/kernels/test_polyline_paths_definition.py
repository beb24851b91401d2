"""What the polyline mask is, and what follows from it, on small grids in float64: the reference and the CPU kernels."""

from __future__ import annotations

import pytest
import torch
from polyline_calls import decays, path_sums, scan_inputs

from vitkernels import ops
from vitkernels.nn.functional import polyline_path_attention_unnormalized

F64 = torch.float64
GRIDS = [(1, 1), (1, 6), (6, 1), (3, 4), (7, 7), pytest.param((25, 42), marks=pytest.mark.thorough)]
each_grid = pytest.mark.parametrize("grid", GRIDS)
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@each_grid
@each_backend
def test_the_mask_is_the_sum_along_every_path(grid, backend):
    tensors = decays(2 if grid != (25, 42) else 1, *grid, 2 if grid != (25, 42) else 1, F64)
    mask = ops.polyline_path_mask(**tensors, backend=backend)
    close(mask, path_sums(**tensors).flatten(4).flatten(2, 3))
    assert (mask.diagonal(dim1=-2, dim2=-1) == 0).all()
    transposed = ops.polyline_path_mask(**tensors, transpose=True, backend=backend)
    close(transposed, mask.mT)
    for m, transpose in ((mask, False), (transposed, True)):
        close(ops.polyline_path_mask(**tensors, log=False, transpose=transpose, backend=backend), m.exp())


@each_grid
@each_backend
def test_the_mask_is_a_product_of_rows_and_columns(grid, backend):
    """L = L_H L_V, and its transpose L_V L_H, where each factor decays along one axis and forbids the other."""
    tensors = decays(1, *grid, 1, F64)
    tokens = torch.arange(grid[0] * grid[1])
    row, column = tokens // grid[1], tokens % grid[1]
    mask = ops.polyline_path_mask(**tensors, log=False, backend=backend)
    along = mask * (row[:, None] == row[None, :])
    down = mask * (column[:, None] == column[None, :])
    close(along @ down, mask)
    close(down @ along, mask.mT)


@each_backend
def test_one_row_is_symmetric_and_turning_the_grid_transposes(backend):
    row = ops.polyline_path_mask(**decays(2, 1, 9, 3, F64), backend=backend)
    close(row, row.mT)
    tensors = decays(2, 4, 5, 3, F64)
    mask = ops.polyline_path_mask(**tensors, transpose=True, backend=backend)
    turned = ops.polyline_path_mask(
        tensors["log_decay_h"].transpose(1, 2), tensors["log_decay_w"].transpose(1, 2), backend=backend
    )
    order = torch.arange(20).view(4, 5).T.flatten()
    close(turned, mask[:, :, order][..., order])


@each_backend
def test_what_comes_before_a_line_plays_no_part(backend):
    tensors = {name: t.requires_grad_() for name, t in decays(1, 4, 5, 2, F64).items()}
    x = torch.randn(1, 4, 5, 2, 3, dtype=F64)
    changed = {name: t.detach().clone() for name, t in tensors.items()}
    for run in (
        *(
            lambda log=log, turn=turn, **t: ops.polyline_path_mask(
                **t, log=log, transpose=turn, backend=backend
            )
            for log in (True, False)
            for turn in (False, True)
        ),
        lambda **t: ops.polyline_path_scan(x, **t, backend=backend),
    ):
        out = run(**tensors)
        weights = torch.randn_like(out)
        grad_w, grad_h = torch.autograd.grad(out, list(tensors.values()), weights)
        assert not grad_w[:, :, 0].any()
        assert not grad_h[:, 0].any()
        for value in (-3.0, -1e30, -torch.inf, torch.nan):
            changed["log_decay_w"][:, :, 0] = changed["log_decay_h"][:, 0] = value
            assert torch.equal(run(**changed), out), value


@each_backend
def test_no_decay_keeps_its_gradient(backend):
    """By the order of the indices, not by the sign of a difference, which is 0."""
    tensors = {name: torch.zeros_like(t).requires_grad_() for name, t in decays(1, 3, 4, 1, F64).items()}
    for log in (True, False):
        mask = ops.polyline_path_mask(**tensors, log=log, backend=backend)
        grad_w, grad_h = torch.autograd.grad(mask.sum(), list(tensors.values()))
        # A decay of a row counts for the pairs on either side of it: 3 rows of keys, 2 directions.
        close(grad_w[0, :, :, 0], 3 * 2 * torch.tensor([0, 1 * 3, 2 * 2, 3 * 1], dtype=F64).expand(3, 4))
        close(grad_h[0, :, :, 0], 4 * 2 * torch.tensor([0, 1 * 2, 2 * 1], dtype=F64)[:, None].expand(3, 4))


@each_grid
@each_backend
@pytest.mark.parametrize("transpose", [False, True])
def test_the_scan_is_the_product_with_the_mask(grid, backend, transpose):
    tensors = scan_inputs(1, *grid, 2, 3, F64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    mask = ops.polyline_path_mask(
        leaves["log_decay_w"], leaves["log_decay_h"], log=False, transpose=transpose, backend="reference"
    )
    values = leaves["x"].movedim(3, 1).flatten(2, 3)
    want = (mask @ values).unflatten(2, grid).movedim(1, 3)
    got = ops.polyline_path_scan(**leaves, transpose=transpose, backend=backend)
    close(got, want)
    weights = torch.randn_like(got)
    inputs = list(leaves.values())
    for a, b in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(want, inputs, weights), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@each_backend
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_unnormalized_attention_is_its_dense_form(grid, backend, kind):
    batch, heads, d, dv, scale = 2, 2, 4, 3, 0.7
    q, k = torch.randn(2, batch, *grid, heads, d, dtype=F64).requires_grad_()
    v = torch.randn(batch, *grid, heads, dv, dtype=F64, requires_grad=True)
    tensors = {name: t.requires_grad_() for name, t in decays(batch, *grid, heads, F64).items()}
    got = polyline_path_attention_unnormalized(q, k, v, **tensors, kind=kind, scale=scale, backend=backend)

    paths = path_sums(**{name: t.detach() for name, t in tensors.items()}).flatten(4).flatten(2, 3).exp()
    flat_q, flat_k, flat_v = (t.movedim(3, 1).flatten(2, 3) for t in (q, k, v))
    scores = scale * flat_q @ flat_k.mT
    weights = (scores.softmax(-1) if kind == "softmax" else scores) * (paths + paths.mT)
    close(got, (weights @ flat_v).unflatten(2, grid).movedim(1, 3))
    grads = torch.autograd.grad(got.square().sum(), (v, *tensors.values()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_linear_attention_makes_no_matrix_of_tokens():
    """64 x 64 tokens: the largest tensor has tokens * head_dim * value_dim elements."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    q = torch.randn(1, 64, 64, 1, 4)
    tensors = decays(1, 64, 64, 1)
    with Watch():
        polyline_path_attention_unnormalized(q, q, q, **tensors, kind="linear", backend="cpu")
    assert max(sizes) == 64 * 64 * 4 * 4


def test_bad_input_to_unnormalized_attention():
    q, tensors = torch.randn(1, 3, 4, 2, 4), decays(1, 3, 4, 2)
    with pytest.raises(ValueError, match="argument `kind`: expected 'softmax' or 'linear'; got 'sigmoid'"):
        polyline_path_attention_unnormalized(q, q, q, **tensors, kind="sigmoid")
    turned = tensors["log_decay_w"].transpose(1, 2)  # as many tokens, on another map
    for kind in ("softmax", "linear"):
        for change, error, message in (
            ({"k": q[:, 1:]}, ValueError, "argument `k`: expected shape"),
            ({"k": q.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": q.half()}, TypeError, "argument `v`: expected dtype float32"),
            ({"v": q.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"q": q[..., :0], "k": q[..., :0]}, ValueError, "argument `q`: expected a last dimension"),
            ({"log_decay_w": turned, "log_decay_h": turned}, ValueError, "argument `log_decay_w`: expected"),
        ):
            with pytest.raises(error, match=message):
                polyline_path_attention_unnormalized(
                    **{"q": q, "k": q, "v": q, **tensors, **change}, kind=kind
                )
