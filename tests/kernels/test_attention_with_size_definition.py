"""What proportional attention is: duplicates counted, SDPA with a bias, the corners."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitkernels import ops
from vitkernels.core.operator import REGISTRY

has_cpu = "cpu" in REGISTRY["attention_with_size"].backends
each_backend = pytest.mark.parametrize("backend", ["reference", *(["cpu"] if has_cpu else [])])


def random_call(queries: int = 11, keys: int = 7, d: int = 4, dv: int = 6) -> list[torch.Tensor]:
    sizes = ((queries, d), (keys, d), (keys, dv))
    return [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


@each_backend
def test_equals_the_attention_of_the_duplicates(backend: str) -> None:
    q, k, v = random_call()
    repeats = torch.tensor([3, 1, 1, 5, 2, 1, 4])
    long = [t.repeat_interleave(repeats, 2) for t in (k, v)]
    want = F.scaled_dot_product_attention(q, *long)
    got = ops.attention_with_size(q, k, v, repeats.double().expand(2, 7), backend=backend)
    torch.testing.assert_close(got, want)
    grad_out = torch.randn_like(got)
    grads, wants = (torch.autograd.grad(out, (q, k, v), grad_out) for out in (got, want))
    for grad, expected in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, expected)


@each_backend
def test_equals_sdpa_with_the_logarithms(backend: str) -> None:
    q, k, v = random_call()
    size = torch.rand(2, 7, dtype=torch.float64) * 196 + 1
    got = ops.attention_with_size(q, k, v, size, scale=-0.7, backend=backend)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None], scale=-0.7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ops.attention_with_size(q, k, v, 9 * size, scale=-0.7, backend=backend), got)


@each_backend
def test_sizes_of_one_and_of_zero(backend: str) -> None:
    q, k, v = (t.detach() for t in random_call())
    size = torch.ones(2, 7, dtype=torch.float64)
    plain = ops.attention_with_size(q, k, v, size, backend=backend)
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v))
    size[:, 4:] = 0
    hidden = ops.attention_with_size(q, k, v, size, backend=backend)
    torch.testing.assert_close(hidden, F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4]))
    size[1] = 0
    blind = ops.attention_with_size(q, k, v, size, backend=backend)
    assert blind[1].isnan().all()
    torch.testing.assert_close(blind[0], hidden[0])


@each_backend
def test_worked_values(backend: str) -> None:
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, math.log(2.0)]).view(1, 1, 2, 1)
    v = torch.tensor([[10.0], [0.0]]).view(1, 1, 2, 1)
    out = ops.attention_with_size(q, k, v, torch.tensor([[3.0, 1.0]]), backend=backend)
    torch.testing.assert_close(out.item(), 6.0)  # weights 3 * 1 and 1 * 2


@each_backend
def test_no_query_and_no_batch(backend: str) -> None:
    for batch, queries in ((0, 5), (2, 0)):
        q = torch.zeros(batch, 3, queries, 4, requires_grad=True)
        k = torch.randn(batch, 3, 7, 4, requires_grad=True)
        out = ops.attention_with_size(q, k, k, torch.ones(batch, 7), backend=backend)
        assert out.shape == (batch, 3, queries, 4)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k)))
