"""The CPU kernels of token_merge against plain PyTorch."""

from __future__ import annotations

import os

import pytest
import torch
from guarded import Guarded, Layout, drawn
from token_merge_calls import MODES, check_merge, launch_merge, random_plan

from vitkernels import MergePlan, ops
from vitkernels.kernels.token_merge import native, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
each_mode = pytest.mark.parametrize("mode", MODES)
# Tokens, rows, channels: one token, one row, as many rows as tokens, in between; less than a vector of channels,
# whole ones, as many as go through the registers together, more.
SHAPES = [(1, 1, 1), (9, 1, 7), (8, 8, 64), (37, 20, 7), (21, 13, 80), (30, 12, 149)]
LARGE = [(197, 181, 768), (577, 300, 96), (4096, 2048, 320)]


def tensors(batch, tokens, merged, channels, dtype):
    """x, size, a plan, and the gradient of y; sizes from 1 to 197, as after many layers."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, size = drawn(batch, tokens, channels, dtype=dtype), torch.randint(1, 198, (batch, tokens)).to(wide)
    return x, size, random_plan(batch, tokens, merged), drawn(batch, merged, channels, dtype=dtype)


@each_dtype
@each_mode
@pytest.mark.parametrize(
    ("tokens", "merged", "channels"),
    SHAPES + [pytest.param(*shape, marks=pytest.mark.thorough) for shape in LARGE],
)
def test_forward_and_gradient(tokens, merged, channels, mode, dtype):
    x, size, plan, grad_y = tensors(2, tokens, merged, channels, dtype)
    for given in (size, None):
        got = launch_merge(native, x, given, plan, mode, grad_y)
        check_merge(got, x, given, plan, mode, grad_y)


@each_mode
def test_one_row_of_a_whole_image(mode):
    """2049 cannot be counted to in float16: sums are float32's."""
    x, size, plan, grad_y = tensors(1, 3000, 1, 8, torch.float16)
    got = launch_merge(native, x, size, plan, mode, grad_y)
    check_merge(got, x, size, plan, mode, grad_y)
    ones = launch_merge(native, torch.ones_like(x), None, plan, mode, grad_y)
    assert (ones["y"] == (3000 if mode == "sum" else 1)).all()
    assert ones["sizes"].item() == 3000


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=["fp16", "bf16"])
def test_half_precision_is_rounded_to_the_nearest(dtype):
    """Every number of the dtype beside another: ties, subnormals, overflow, infinities and what is no number."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    partners = torch.stack([every[torch.randperm(1 << 16)], every.roll(0x83), torch.zeros_like(every)])
    x = torch.stack([every.expand(3, -1), partners], 1)
    plan = random_plan(3, 2, 1)
    for mode in ("sum", "mean"):
        got = launch_merge(native, x, None, plan, mode, torch.zeros(3, 1, 1 << 16, dtype=dtype))["y"]
        want = getattr(x.float(), mode)(1, keepdim=True).to(dtype)
        nothing = want.isnan()
        assert torch.equal(got.isnan(), nothing), mode
        assert torch.equal(got[~nothing], want[~nothing]), mode
    # Rounding would carry what is no number, with all bits set, into a zero.
    size = torch.full((3, 2), -1, dtype=torch.int32).view(torch.float32)
    ones = torch.ones(3, 2, 16, dtype=dtype)
    got = launch_merge(native, ones, size, plan, "wavg", torch.zeros(3, 1, 16, dtype=dtype))["y"]
    assert got.isnan().all()


@each_dtype
@each_mode
def test_a_token_alone_is_copied(mode, dtype):
    x, size, plan, grad_y = tensors(1, 12, 10, 24, dtype)
    got = launch_merge(native, x, size, plan, mode, grad_y)
    for row in (plan[1][0].diff() == 1).nonzero().flatten().tolist():
        token = int(plan[2][0, plan[1][0, row]])
        assert torch.equal(got["y"][0, row], x[0, token])
        assert got["sizes"][0, row] == size[0, token]
        assert torch.equal(got["grad x"][0, token], grad_y[0, row])


@each_dtype
def test_equal_maxima_share_the_gradient(dtype):
    x = torch.randint(0, 3, (2, 40, 16)).to(dtype)
    _, _, plan, grad_y = tensors(2, 40, 7, 16, dtype)
    got = launch_merge(native, x, None, plan, "amax", grad_y)
    check_merge(got, x, None, plan, "amax", grad_y)


@each_mode
@pytest.mark.parametrize("channels", [5, 72])
def test_what_is_not_a_number_stays_in_its_group(mode, channels):
    x, size, plan, grad_y = tensors(2, 30, 9, channels, torch.float32)
    clean = launch_merge(native, x, size, plan, mode, grad_y)
    for token in (11, int(plan[2][0, plan[1][0, -1] - 2])):  # also the second last of a long group
        broken = x.clone()
        broken[0, token, 2] = float("nan")
        got = launch_merge(native, broken, size, plan, mode, grad_y)
        row = int(plan[0][0, token])
        assert got["y"][0, row, 2].isnan()
        hit = torch.zeros(clean["y"].shape, dtype=torch.bool)
        hit[0, row, 2] = True
        assert torch.equal(got["y"][~hit], clean["y"][~hit])
        assert got["grad x"].isfinite().all(), "no token reaches what is not a number"


def test_the_largest_may_be_infinite():
    x, size, plan, grad_y = tensors(1, 30, 9, 70, torch.float32)
    x[0, 3] = float("inf")
    x[0, 8] = -float("inf")
    y = launch_merge(native, x, None, plan, "amax", grad_y)["y"]
    assert (y[0, plan[0][0, 3]] == float("inf")).all()
    alone = plan[1][0].diff()[plan[0][0, 8]] == 1
    assert (y[0, plan[0][0, 8]] == -float("inf")).all() == alone
    assert torch.equal(y, reference.forward(x, size, *plan, "amax")[0])


@each_dtype
@each_mode
@pytest.mark.parametrize("channels", [8, 77])
def test_strided_tensors(mode, channels, dtype):
    x, size, plan, grad_y = tensors(2, 26, 15, channels, dtype)
    want = launch_merge(native, x, size, plan, mode, grad_y)
    packed = torch.full((26, 2, 2, channels), float("nan"), dtype=dtype)
    packed[:, :, 1] = x.transpose(0, 1)
    odd = torch.full((2, 15, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 1:-2] = grad_y
    sizes = torch.stack([size, -size], 2)[..., 0]
    every_second = [torch.stack([t, t], 2)[..., 0] for t in plan]
    for views in (
        (packed[:, :, 1].transpose(0, 1), sizes, plan, grad_y.transpose(0, 1).contiguous().transpose(0, 1)),
        (x.mT.contiguous().mT, size.mT.contiguous().mT, every_second, odd[:, :, 1:-2]),
    ):
        got = launch_merge(native, views[0], views[1], views[2], mode, views[3])
        for name in want:
            assert torch.equal(got[name], want[name]), name
    # one image, size and plan for all
    got = launch_merge(
        native,
        *(x[:1].expand(2, -1, -1), size[:1].expand(2, -1), [t[:1].expand(2, -1) for t in plan], mode),
        grad_y[:1, :1].expand(2, 15, -1),
    )
    assert torch.equal(got["y"], want["y"][:1].expand(2, -1, -1))


@each_mode
def test_gradients_of_tensors_whose_channels_lie_apart(mode):
    x, size, plan, grad_y = tensors(2, 26, 15, 6, torch.float32)
    merge = MergePlan(*plan)
    grads = []
    for leaf in (x.clone(), x.mT.contiguous().mT):
        leaf.requires_grad_()
        y, _ = ops.token_merge(leaf, merge, size=size, mode=mode, backend="cpu")
        grads.append(torch.autograd.grad(y, leaf, grad_y)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("threads", [2, 3])
@each_mode
def test_threads_change_no_bit(mode, threads):
    x, size, plan, grad_y = tensors(3, 150, 61, 100, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch_merge(native, x, size, plan, mode, grad_y)
        torch.set_num_threads(threads)
        got = launch_merge(native, x, size, plan, mode, grad_y)
    finally:
        torch.set_num_threads(before)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.usefixtures("either_wall")
@each_mode
@each_dtype
@pytest.mark.parametrize("before", [64, 65])
def test_nothing_is_read_or_written_outside(before, dtype, mode):
    guarded, layout = Guarded(walls=True), Layout((0, 1, 2), padding=8, before=before)
    plain, size, plan, upstream = tensors(2, 19, 12, 77, dtype)
    want = launch_merge(native, plain, size, plan, mode, upstream)
    x, grad_x = (guarded(plain.shape, dtype, layout) for _ in range(2))
    grad_y = guarded(upstream.shape, dtype, layout).copy_(upstream)
    y, sizes = guarded((2, 12, 77), dtype, Layout((0, 1, 2), before=before)), guarded((2, 12), size.dtype)
    x.copy_(plain)
    size, *plan = (guarded(tuple(t.shape), t.dtype).copy_(t) for t in (size, *plan))
    native.forward(y, sizes, x, size, *plan, mode)
    native.backward(grad_x, None, None, None, None, grad_y, None, y, sizes, x, size, *plan, mode)
    guarded.check()
    for name, got in (("y", y), ("sizes", sizes), ("grad x", grad_x)):
        assert torch.equal(got, want[name]), name


@each_mode
def test_a_wrong_kernel_fails_the_rule(mode):
    x, size, plan, grad_y = tensors(2, 30, 12, 16, torch.float32)
    got = launch_merge(native, x, size, plan, mode, grad_y)
    for name in got:
        with pytest.raises(AssertionError):
            check_merge({**got, name: got[name] * (1 + 1e-5)}, x, size, plan, mode, grad_y)


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no large pages here")
def test_a_result_that_is_mapped_anew_is_on_large_pages():
    """Above 32 MiB a page fault for every 4 KiB took twice as long as the merging."""
    x, _, plan, _ = tensors(1, 40, 33, 1 << 18, torch.float32)
    plan = MergePlan(*plan)
    y, _ = ops.token_merge(x, plan, mode="sum", backend="cpu")
    middle = y.data_ptr() + y.numel() * 2
    flags = ""
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name = line.split(maxsplit=1)[0]
            if "-" in name and name[-1] != ":":
                begin, end = (int(part, 16) for part in name.split("-"))
            elif name == "VmFlags:" and begin <= middle < end:
                flags = line
    assert " hg" in flags, flags
    assert torch.equal(y, ops.token_merge(x, plan, mode="sum", backend="reference")[0])
