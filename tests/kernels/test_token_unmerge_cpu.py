"""The CPU kernels of token_unmerge against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from guarded import Guarded, Layout, drawn
from token_merge_calls import check_unmerge, launch_merge, launch_unmerge, random_plan

from vitkernels import MergePlan, ops
from vitkernels.kernels.token_merge import native as merge
from vitkernels.kernels.token_unmerge import native

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
SHAPES = [(1, 1, 1), (9, 1, 7), (8, 8, 64), (37, 20, 7), (21, 13, 80), (30, 12, 149)]
LARGE = [(197, 181, 768), (4096, 2048, 320)]


@each_dtype
@pytest.mark.parametrize(
    ("tokens", "merged", "channels"),
    SHAPES + [pytest.param(*shape, marks=pytest.mark.thorough) for shape in LARGE],
)
def test_forward_and_gradient(tokens, merged, channels, dtype):
    y, plan = drawn(2, merged, channels, dtype=dtype), random_plan(2, tokens, merged)
    grad_x = drawn(2, tokens, channels, dtype=dtype)
    got = launch_unmerge(native, y, plan, grad_x)
    check_unmerge(got, y, plan, grad_x)
    index = plan[0].long().unsqueeze(2).expand(-1, -1, channels)
    assert torch.equal(got["x"], y.gather(1, index)), "tokens are copies of their rows"
    merged_again = launch_merge(merge, grad_x, None, plan, "sum", y)
    assert torch.equal(got["grad y"], merged_again["y"]), "the gradient is the sum that merging makes"


@each_dtype
@pytest.mark.parametrize("channels", [8, 77])
def test_strided_tensors(channels, dtype):
    y, plan = drawn(2, 15, channels, dtype=dtype), random_plan(2, 26, 15)
    grad_x = drawn(2, 26, channels, dtype=dtype)
    want = launch_unmerge(native, y, plan, grad_x)
    odd = torch.full((2, 15, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 1:-2] = y
    views = (
        (odd[:, :, 1:-2], grad_x.transpose(0, 1).contiguous().transpose(0, 1)),
        (y.mT.contiguous().mT, grad_x.mT.contiguous().mT),
    )
    for rows, upstream in views:
        got = launch_unmerge(native, rows, plan, upstream)
        for name in want:
            assert torch.equal(got[name], want[name]), name


def test_gradients_of_tensors_whose_channels_lie_apart():
    plan = MergePlan(*random_plan(2, 26, 15))
    y, grad_x = torch.randn(2, 15, 6), torch.randn(2, 26, 6)
    grads = []
    for leaf in (y.clone(), y.mT.contiguous().mT):
        leaf.requires_grad_()
        grads.append(torch.autograd.grad(ops.token_unmerge(leaf, plan, backend="cpu"), leaf, grad_x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    y, plan, grad_x = torch.randn(3, 61, 100), random_plan(3, 150, 61), torch.randn(3, 150, 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch_unmerge(native, y, plan, grad_x)
        torch.set_num_threads(threads)
        got = launch_unmerge(native, y, plan, grad_x)
    finally:
        torch.set_num_threads(before)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.usefixtures("either_wall")
@each_dtype
@pytest.mark.parametrize("before", [64, 65])
def test_nothing_is_read_or_written_outside(before, dtype):
    guarded, padded = Guarded(walls=True), Layout((0, 1, 2), padding=8, before=before)
    dense = Layout((0, 1, 2), before=before)
    plain, upstream = drawn(2, 12, 77, dtype=dtype), drawn(2, 19, 77, dtype=dtype)
    plan = random_plan(2, 19, 12)
    want = launch_unmerge(native, plain, plan, upstream)
    y, grad_x = (guarded(t.shape, dtype, padded).copy_(t) for t in (plain, upstream))
    x, grad_y = guarded(upstream.shape, dtype, dense), guarded(plain.shape, dtype, padded)
    plan = [guarded(tuple(t.shape), t.dtype).copy_(t) for t in plan]
    native.forward(x, y, *plan)
    native.backward(grad_y, None, None, None, grad_x, x, y, *plan)
    guarded.check()
    assert torch.equal(x, want["x"])
    assert torch.equal(grad_y, want["grad y"])


def test_a_wrong_kernel_fails_the_rule():
    y, plan, grad_x = torch.randn(2, 12, 16), random_plan(2, 30, 12), torch.randn(2, 30, 16)
    got = launch_unmerge(native, y, plan, grad_x)
    for name in got:
        with pytest.raises(AssertionError):
            check_unmerge({**got, name: got[name] * (1 + 1e-5)}, y, plan, grad_x)
