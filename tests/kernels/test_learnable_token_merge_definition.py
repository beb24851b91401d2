"""What learnable token merging is: its algebra, the chain through the normalisation, the corners."""

from __future__ import annotations

import pytest
import torch

from vitkernels import MergePlan, ops
from vitkernels.core.operator import REGISTRY

has_cpu = "cpu" in REGISTRY["learnable_token_merge"].backends
each_backend = pytest.mark.parametrize("backend", ["reference", *(["cpu"] if has_cpu else [])])
each_normalize = pytest.mark.parametrize("normalize", [None, "sum", "softmax", "softmax_rows"])
each_sharing = pytest.mark.parametrize("shared", [True, False])


def random_call(shared: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, x = (torch.randn(3, 11, width, dtype=torch.float64, requires_grad=True) for width in (6, 4))
    g = 0.2 + torch.rand(*([] if shared else [3]), 11, 5, dtype=torch.float64)
    return z, g.requires_grad_(), x


def mask_of(g: torch.Tensor, normalize: str | None) -> torch.Tensor:
    if normalize is None:
        return g
    weights = g if normalize == "sum" else g.exp()
    return weights / weights.sum(-1 if normalize == "softmax_rows" else -2, keepdim=True)


@each_backend
@each_normalize
@each_sharing
def test_the_definition_and_its_gradients(shared: bool, normalize: str | None, backend: str) -> None:
    z, g, x = random_call(shared)
    y, y_x = ops.learnable_token_merge(z, g, x, normalize=normalize, backend=backend)
    mask = mask_of(g, normalize).expand(3, 11, 5)
    torch.testing.assert_close(y, torch.einsum("bnp,bnd->bpd", mask, z))
    torch.testing.assert_close(y_x, torch.einsum("bnp,bnd->bpd", mask, x))

    dy, dy_x = torch.randn_like(y), torch.randn_like(y_x)
    dz, dg, dx = torch.autograd.grad((y, y_x), (z, g, x), (dy, dy_x))
    torch.testing.assert_close(dz, mask @ dy)
    torch.testing.assert_close(dx, mask @ dy_x)
    d_mask = z @ dy.mT + x @ dy_x.mT
    if normalize == "sum":
        want = (d_mask - (mask * d_mask).sum(1, keepdim=True)) / g.sum(-2, keepdim=True)
    elif normalize == "softmax":
        want = mask * (d_mask - (mask * d_mask).sum(1, keepdim=True))
        torch.testing.assert_close(want.sum(1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12, rtol=0)
        # without a further pass over the tokens
        short = (y * dy).sum(2) + (y_x * dy_x).sum(2)
        torch.testing.assert_close((mask * d_mask).sum(1), short)
    elif normalize == "softmax_rows":
        want = mask * (d_mask - (mask * d_mask).sum(2, keepdim=True))
    else:
        want = d_mask
    torch.testing.assert_close(dg, want.sum(0) if shared else want)


@each_backend
def test_a_hard_mask_is_the_mean_merge(backend: str) -> None:
    z = torch.randn(2, 7, 3, dtype=torch.float64)
    rows = torch.tensor([[2, 0, 1, 2, 3, 2, 1], [0, 0, 0, 1, 3, 2, 3]])
    hard = torch.nn.functional.one_hot(rows, 4).double()
    y = ops.learnable_token_merge(z, hard, normalize="sum", backend=backend)
    want, _ = ops.token_merge(z, MergePlan.from_rows(rows, 4), mode="mean", backend="reference")
    torch.testing.assert_close(y, want)


@each_backend
def test_worked_values(backend: str) -> None:
    z = torch.tensor([[[1.0], [2.0], [6.0]]])
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    for normalize, want in ((None, [15.0, 0.0]), ("sum", [15 / 4, 0.0])):
        y = ops.learnable_token_merge(z, g, normalize=normalize, backend=backend)
        torch.testing.assert_close(y.flatten(), torch.tensor(want))
    logs = torch.tensor([[1.0, 3.0], [1.0, 1.0], [2.0, 6.0]]).log()
    for normalize, want in (
        ("softmax", [15 / 4, 4.1]),
        ("softmax_rows", [1 / 4 + 1 + 3 / 2, 3 / 4 + 1 + 9 / 2]),
    ):
        y = ops.learnable_token_merge(z, logs, normalize=normalize, backend=backend)
        torch.testing.assert_close(y.flatten(), torch.tensor(want))


@each_backend
def test_the_identity(backend: str) -> None:
    z = torch.randn(2, 5, 3)
    assert torch.equal(ops.learnable_token_merge(z, torch.eye(5), backend=backend), z)
    torch.testing.assert_close(
        ops.learnable_token_merge(z, torch.eye(5), normalize="sum", backend=backend), z
    )


@each_backend
def test_an_empty_column_stays_finite(backend: str) -> None:
    z, g = torch.randn(1, 4, 2), torch.rand(4, 3)
    g[:, 1] = 0
    g.requires_grad_()
    y = ops.learnable_token_merge(z, g, normalize="sum", backend=backend)
    assert (y[:, 1] == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), g)
    torch.testing.assert_close(grad[:, 1], z.sum((0, 2)))  # as without normalisation


@each_backend
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_operands(count: int, backend: str) -> None:
    z, g, _ = random_call(False)
    others = [torch.randn(3, 11, i, dtype=torch.float64, requires_grad=True) for i in range(1, count + 1)]
    merged = ops.learnable_token_merge(z, g, *others, normalize="softmax", backend=backend)
    assert [m.shape for m in merged] == [(3, 5, 6), *((3, 5, i) for i in range(1, count + 1))]
    for got, operand in zip(merged, (z, *others), strict=True):
        torch.testing.assert_close(
            got, ops.learnable_token_merge(operand, g, normalize="softmax", backend=backend)
        )
    grads = torch.autograd.grad(sum(m.sum() for m in merged), (z, g, *others))
    assert all(grad.abs().sum() > 0 for grad in (grads[0], *grads[2:]))


@each_backend
@pytest.mark.parametrize(
    ("wrong", "kind", "expected"),
    [
        (lambda x: x.float(), TypeError, "expected dtype float64; got float32"),
        (lambda x: x[:1], ValueError, r"expected shape \[batch, N, D\] = \[3, 11, \*\]"),
        (lambda x: x[:, 1:], ValueError, r"expected shape \[batch, N, D\] = \[3, 11, \*\]"),
        (lambda x: x[..., :0], ValueError, "expected at least one channel"),
        (lambda x: x.to("meta"), ValueError, "expected device cpu, as `z`"),
        (lambda x: "text", TypeError, "expected a tensor"),
    ],
    ids=["dtype", "batch", "tokens", "channels", "device", "type"],
)
def test_later_operands_are_held_to_the_first(wrong, kind, expected, backend: str) -> None:
    """Each pair of them is a call, in which one of them stands for z."""
    z, g, _ = random_call(False)
    for operands, name in (((z, wrong(z)), "1"), ((z, z, wrong(z)), "2")):
        with pytest.raises(kind, match=rf"argument `others\[{name}\]`: {expected}"):
            ops.learnable_token_merge(z, g, *operands, backend=backend)


@each_backend
def test_a_float32_mask_under_half_precision(backend: str) -> None:
    z, g = torch.randn(2, 9, 4), torch.randn(9, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.learnable_token_merge(z, g, normalize="softmax", backend=backend)
    assert y.dtype is torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), g)
    assert grad.dtype is torch.float32
    with pytest.raises(TypeError, match=r"argument `others\[1\]`"):
        ops.learnable_token_merge(z, g, z, None)
