"""What strip attention is: worked values, the identities of its definition, SDPA's own output."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import ops
from vitkernels.core import native as extension

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(bool(extension.why_missing()), reason="the extension is missing")
    ),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_width = pytest.mark.parametrize("r", [1, 3])
attend = functools.partial(ops.strip_attention, return_lse=True)


def random_call(r: int, queries: int = 11, keys: int = 7, dv: int = 6) -> dict[str, torch.Tensor]:
    sizes = {"q": (queries, r), "k": (keys, r), "v": (keys, dv)}
    return {n: torch.randn(2, 3, *size, dtype=torch.float64).requires_grad_() for n, size in sizes.items()}


@each_backend
def test_worked_values(backend: str) -> None:
    q = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 4, 1)
    k = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]], dtype=torch.float64).view(1, 1, 2, 2)
    out, lse = attend(q, k, v, backend=backend)
    second = torch.tensor([3 / 4, 1 / 4, 1 / 2, 9 / 10], dtype=torch.float64)  # the weight of the second key
    torch.testing.assert_close(out[0, 0], torch.stack((4 * (1 - second), 8 * second), 1))
    torch.testing.assert_close(lse[0, 0].exp(), torch.tensor([4, 4 / 3, 2, 10], dtype=torch.float64))
    halved, _ = attend(q, k, v, scale=0.5, backend=backend)
    torch.testing.assert_close(halved[0, 0, 3], out[0, 0, 0])


@each_backend
def test_default_scale_is_that_of_the_channels(backend: str) -> None:
    for r in (1, 4):
        call = random_call(r)
        for got, want in zip(
            attend(**call, backend=backend), attend(**call, scale=r**-0.5, backend=backend), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_row_maximum_from_the_extreme_keys(sign: float) -> None:
    """The rule by which the kernels of one channel know the largest logit, bit for bit."""
    q, k = torch.randn(3, 200), torch.randn(3, 50)
    for keys in (k, k.abs(), -k.abs(), torch.zeros_like(k), k * 1e4):
        scaled = sign * 0.37 * q
        extreme = torch.where(scaled >= 0, keys.amax(1, keepdim=True), keys.amin(1, keepdim=True))
        assert torch.equal(scaled * extreme, (scaled[:, :, None] * keys[:, None]).amax(2))


@each_backend
@each_width
def test_equals_sdpa(r: int, backend: str) -> None:
    call = random_call(r)
    bias = torch.randn(2, 1, 11, 7, dtype=torch.float64, requires_grad=True)
    inputs = (*call.values(), bias)
    out, _ = attend(**call, attn_bias=bias, scale=-0.6, backend=backend)
    want = F.scaled_dot_product_attention(*call.values(), attn_mask=bias, scale=-0.6)
    torch.testing.assert_close(out, want)
    grad_out = torch.randn_like(out)
    grads, wants = (torch.autograd.grad(o, inputs, grad_out) for o in (out, want))
    for got, expected in zip(grads, wants, strict=True):
        torch.testing.assert_close(got, expected)


@each_backend
@each_width
def test_gradients_of_a_softmax(r: int, backend: str) -> None:
    call = random_call(r)
    q, k, v = call.values()
    out, _ = attend(**call, backend=backend)
    (grad_v,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    # weights sum to 1, so a constant gradient of the output hands one unit per query to the values
    torch.testing.assert_close(grad_v.sum(2), torch.full((2, 3, 6), 11.0, dtype=torch.float64))
    grad_q, grad_k = torch.autograd.grad(out, (q, k), torch.randn_like(out))
    # both are the sum of dS * S
    torch.testing.assert_close((grad_q * q).sum((2, 3)), (grad_k * k).sum((2, 3)))
    torch.testing.assert_close(grad_k.sum(2), torch.zeros(2, 3, r, dtype=torch.float64), atol=1e-12, rtol=0)


@each_backend
def test_gradient_of_q_from_two_further_columns(backend: str) -> None:
    call = random_call(1)
    q, k, v = call.values()
    scale = 0.8
    out, lse = attend(**call, scale=scale, backend=backend)
    grad_out = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, q, grad_out)
    weights = torch.exp(scale * q @ k.mT - lse.unsqueeze(-1))
    columns = weights @ torch.cat((k * v, k), dim=-1)
    delta = (grad_out * out).sum(-1, keepdim=True)
    want = scale * ((grad_out * columns[..., :-1]).sum(-1, keepdim=True) - delta * columns[..., -1:])
    torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-12)


@each_backend
@each_width
def test_invariances(r: int, backend: str) -> None:
    q, k, v = (t.detach() for t in random_call(r).values())
    out, lse = attend(q, k, v, scale=0.9, backend=backend)
    shift = torch.randn(r, dtype=torch.float64)
    moved, higher = attend(q, k + shift, v, scale=0.9, backend=backend)
    torch.testing.assert_close(moved, out)
    torch.testing.assert_close(higher, lse + 0.9 * (q * shift).sum(-1))
    for call in ((4.0 * q, k / 4.0, 0.9), (q, -k, -0.9), (-q, k, -0.9)):
        same, same_lse = attend(*call[:2], v, scale=call[2], backend=backend)
        torch.testing.assert_close(same, out)
        torch.testing.assert_close(same_lse, lse)


@each_backend
@each_width
def test_nothing_to_tell_the_keys_apart_is_the_mean(r: int, backend: str) -> None:
    q, k, v = (t.detach() for t in random_call(r).values())
    mean = v.mean(2, keepdim=True).expand(2, 3, 11, 6)
    for call in ((torch.zeros_like(q), k, 1.0), (q, torch.ones_like(k), 1.0), (q, k, 0.0)):
        out, _ = attend(*call[:2], v, scale=call[2], backend=backend)
        torch.testing.assert_close(out, mean)


BIAS_SHAPES = [(7,), (11, 1), (3, 1, 7), (2, 3, 11, 7), (1, 1, 1, 1), (2, 1, 11, 7)]


@each_backend
@each_width
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias(shape: tuple[int, ...], r: int, backend: str) -> None:
    call = random_call(r)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    full = bias.detach().expand(2, 3, 11, 7).clone().requires_grad_()
    seeds, grads = None, []
    for tensor in (bias, full):
        outputs = attend(**call, attn_bias=tensor, backend=backend)
        seeds = seeds or [torch.randn_like(o) for o in outputs]
        grads.append(torch.autograd.grad(outputs, tensor, seeds)[0])
    torch.testing.assert_close(grads[0], grads[1].sum_to_size(shape))
    # the weights of a query sum to 1, so its biases gain what lse gains
    torch.testing.assert_close(grads[1].sum(-1), seeds[1])


@pytest.mark.parametrize("shape", [(3, 11, 7), (11, 1), (7,)], ids=str)
def test_bias_that_is_a_parameter_in_a_dynamic_graph(shape: tuple[int, ...]) -> None:
    """Its sizes are numbers among symbols there, and were once found not to broadcast."""
    torch._dynamo.reset()
    call = {name: tensor.detach() for name, tensor in random_call(3).items()}
    bias = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    compiled = torch.compile(ops.strip_attention, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(**call, attn_bias=bias), ops.strip_attention(**call, attn_bias=bias))


@each_backend
@each_width
def test_hidden_keys(r: int, backend: str) -> None:
    call = {name: tensor.detach() for name, tensor in random_call(r).items()}
    bias = torch.zeros(11, 7, dtype=torch.float64)
    bias[:, 4:] = -math.inf
    out, lse = attend(**call, attn_bias=bias, backend=backend)
    want, want_lse = attend(call["q"], call["k"][:, :, :4], call["v"][:, :, :4], backend=backend)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@each_backend
def test_output_lies_as_a_projection_reads_it(backend: str) -> None:
    call = random_call(1)
    out, _ = attend(**call, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    assert out.shape == (2, 3, 11, 6)


@each_backend
def test_no_query_and_no_batch(backend: str) -> None:
    for batch, queries in ((0, 5), (2, 0)):
        q = torch.zeros(batch, 3, queries, 1, requires_grad=True)
        k = torch.randn(batch, 3, 4, 1, requires_grad=True)
        v = torch.randn(batch, 3, 4, 6, requires_grad=True)
        out, lse = attend(q, k, v, backend=backend)
        assert out.shape == (batch, 3, queries, 6)
        assert lse.shape == (batch, 3, queries)
        for tensor, grad in zip(
            (q, k, v), torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)), strict=True
        ):
            assert grad.shape == tensor.shape
            assert (grad == 0).all()


def test_flops_are_those_of_the_composition() -> None:
    call = {name: tensor.detach() for name, tensor in random_call(1).items()}
    counts = []
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter:
            ops.strip_attention(**call, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 3 * 11 * 7 * (6 + 1)
