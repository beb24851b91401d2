"""The CUDA kernels of token_unmerge, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import ROWS, Guarded
from token_merge_calls import check_unmerge, launch_merge, launch_unmerge, random_plan

from vitkernels.kernels.token_merge import native as merge
from vitkernels.kernels.token_unmerge import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
SHAPES = [(1, 1, 1), (9, 1, 7), (8, 8, 64), (37, 20, 7), (21, 13, 80), (197, 181, 24)]


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


@each_dtype
@pytest.mark.parametrize(("tokens", "merged", "channels"), SHAPES)
def test_forward_and_gradient(tokens, merged, channels, dtype, kernels):
    y, plan = torch.randn(2, merged, channels).to(dtype), random_plan(2, tokens, merged)
    grad_x = torch.randn(2, tokens, channels).to(dtype)
    got = launch_unmerge(native, y, plan, grad_x, **kernels)
    check_unmerge(got, y, plan, grad_x)
    index = plan[0].long().unsqueeze(2).expand(-1, -1, channels)
    assert torch.equal(got["x"], y.gather(1, index)), "tokens are copies of their rows"
    merged_again = launch_merge(merge, grad_x, None, plan, "sum", y, **kernels)
    assert torch.equal(got["grad y"], merged_again["y"]), "the gradient is the sum that merging makes"


@each_dtype
@pytest.mark.parametrize("channels", [8, 13])
def test_strided_tensors(channels, dtype, kernels):
    y, plan = torch.randn(2, 15, channels).to(dtype), random_plan(2, 26, 15)
    grad_x = torch.randn(2, 26, channels).to(dtype)
    want = launch_unmerge(native, y, plan, grad_x, **kernels)
    odd = torch.full((2, 15, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 1:-2] = y
    views = (
        (odd[:, :, 1:-2], grad_x.transpose(0, 1).contiguous().transpose(0, 1)),
        (y.mT.contiguous().mT, grad_x.mT.contiguous().mT),
    )
    for rows, upstream in views:
        got = launch_unmerge(native, rows, plan, upstream, **kernels)
        for name in want:
            assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_nothing_is_read_or_written_outside(rows, dtype, kernels):
    guarded, padded = Guarded(), ROWS[rows]
    dense = padded._replace(padding=0)
    plain, upstream = torch.randn(2, 12, 16).to(dtype), torch.randn(2, 24, 16).to(dtype)
    plan = random_plan(2, 24, 12)
    want = launch_unmerge(native, plain, plan, upstream, **kernels)
    y, grad_x = (guarded(t.shape, dtype, padded).copy_(t) for t in (plain, upstream))
    x, grad_y = guarded(upstream.shape, dtype, dense), guarded(plain.shape, dtype, padded)
    native.forward(x, y, *plan, **kernels)
    native.backward(grad_y, None, None, None, grad_x, x, y, *plan, **kernels)
    guarded.check()
    assert torch.equal(x, want["x"])
    assert torch.equal(grad_y, want["grad y"])


def test_a_wrong_kernel_fails_the_rule(kernels):
    y, plan, grad_x = torch.randn(2, 12, 16), random_plan(2, 30, 12), torch.randn(2, 30, 16)
    got = launch_unmerge(native, y, plan, grad_x, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check_unmerge({**got, name: got[name] * (1 + 1e-5)}, y, plan, grad_x)
