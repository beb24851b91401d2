"""The CUDA kernels of token_merge, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import ROWS, Guarded
from token_merge_calls import MODES, check_merge, launch_merge, random_plan

from vitkernels.core.merge_plan import groups
from vitkernels.kernels.token_merge import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
each_mode = pytest.mark.parametrize("mode", MODES)
# Tokens, rows, channels: one token, one row, as many rows as tokens, in between; less than a vector of channels,
# not a multiple of it, several; more than a block of threads.
SHAPES = [(1, 1, 1), (9, 1, 7), (8, 8, 64), (37, 20, 7), (21, 13, 80), (197, 181, 24)]


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


def tensors(batch, tokens, merged, channels, dtype):
    """x, size, a plan, and the gradient of y; sizes from 1 to 197, as after many layers."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, size = torch.randn(batch, tokens, channels).to(dtype), torch.randint(1, 198, (batch, tokens)).to(wide)
    return x, size, random_plan(batch, tokens, merged), torch.randn(batch, merged, channels).to(dtype)


@each_dtype
@each_mode
@pytest.mark.parametrize(("tokens", "merged", "channels"), SHAPES)
def test_forward_and_gradient(tokens, merged, channels, mode, dtype, kernels):
    x, size, plan, grad_y = tensors(2, tokens, merged, channels, dtype)
    for given in (size, None):
        got = launch_merge(native, x, given, plan, mode, grad_y, **kernels)
        check_merge(got, x, given, plan, mode, grad_y)


@each_mode
def test_one_row_of_a_whole_image(mode, kernels):
    """2049 cannot be counted to in float16: sums are float32's."""
    x, size, plan, grad_y = tensors(1, 3000, 1, 8, torch.float16)
    got = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    check_merge(got, x, size, plan, mode, grad_y)
    ones = launch_merge(native, torch.ones_like(x), None, plan, mode, grad_y, **kernels)
    assert (ones["y"] == (3000 if mode == "sum" else 1)).all()
    assert ones["sizes"].item() == 3000


@each_dtype
@each_mode
def test_a_token_alone_is_copied(mode, dtype, kernels):
    x, size, plan, grad_y = tensors(1, 12, 10, 24, dtype)
    got = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    for row in (plan[1][0].diff() == 1).nonzero().flatten().tolist():
        token = int(plan[2][0, plan[1][0, row]])
        assert torch.equal(got["y"][0, row], x[0, token])
        assert got["sizes"][0, row] == size[0, token]
        assert torch.equal(got["grad x"][0, token], grad_y[0, row])


@each_dtype
def test_equal_maxima_share_the_gradient(dtype, kernels):
    x = torch.randint(0, 3, (2, 40, 16)).to(dtype)
    _, _, plan, grad_y = tensors(2, 40, 7, 16, dtype)
    got = launch_merge(native, x, None, plan, "amax", grad_y, **kernels)
    check_merge(got, x, None, plan, "amax", grad_y)


@each_mode
@pytest.mark.parametrize("channels", [5, 8])
def test_what_is_not_a_number_stays_in_its_group(mode, channels, kernels):
    x, size, plan, grad_y = tensors(2, 30, 9, channels, torch.float32)
    clean = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    x[0, 11, 2] = float("nan")
    got = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    row = int(plan[0][0, 11])
    assert got["y"][0, row, 2].isnan()
    hit = torch.zeros(clean["y"].shape, dtype=torch.bool)
    hit[0, row, 2] = True
    assert torch.equal(got["y"][~hit], clean["y"][~hit])
    assert got["grad x"].isfinite().all(), "no token reaches what is not a number"


@each_dtype
@each_mode
@pytest.mark.parametrize("channels", [8, 13])
def test_strided_tensors(mode, channels, dtype, kernels):
    x, size, plan, grad_y = tensors(2, 26, 15, channels, dtype)
    want = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    packed = torch.full((26, 2, 2, channels), float("nan"), dtype=dtype)
    packed[:, :, 1] = x.transpose(0, 1)
    odd = torch.full((2, 15, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 1:-2] = grad_y
    sizes = torch.stack([size, -size], 2)[..., 0]
    for views in (
        (packed[:, :, 1].transpose(0, 1), sizes, plan, grad_y.transpose(0, 1).contiguous().transpose(0, 1)),
        (x.mT.contiguous().mT, size.mT.contiguous().mT, plan, odd[:, :, 1:-2]),
    ):
        got = launch_merge(native, views[0], views[1], views[2], mode, views[3], **kernels)
        for name in want:
            assert torch.equal(got[name], want[name]), name
    # one image for all, one gradient for all rows
    got = launch_merge(
        native,
        *(x[:1].expand(2, -1, -1), size[:1].expand(2, -1), [t[:1].expand(2, -1) for t in plan], mode),
        grad_y[:1, :1].expand(2, 15, -1),
        **kernels,
    )
    assert torch.equal(got["y"], want["y"][:1].expand(2, -1, -1))


@each_mode
def test_every_schedule_gives_the_same(mode, kernels):
    x, size, plan, grad_y = tensors(2, 40, 21, 24, torch.float16)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_nothing_is_read_or_written_outside(rows, dtype, mode, kernels):
    guarded, layout = Guarded(), ROWS[rows]
    plain, size, plan, upstream = tensors(2, 24, 12, 16, dtype)
    want = launch_merge(native, plain, size, plan, mode, upstream, **kernels)
    x, grad_x = (guarded(plain.shape, dtype, layout) for _ in range(2))
    grad_y = guarded(upstream.shape, dtype, layout).copy_(upstream)
    y, sizes = guarded((2, 12, 16), dtype, layout._replace(padding=0)), guarded((2, 12), torch.float32)
    x.copy_(plain)
    native.forward(y, sizes, x, size, *plan, mode, **kernels)
    nobody = (None,) * 4
    native.backward(grad_x, *nobody, grad_y, None, y, sizes, x, size, *plan, mode, **kernels)
    guarded.check()
    for name, got in (("y", y), ("sizes", sizes), ("grad x", grad_x)):
        assert torch.equal(got, want[name]), name


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from token_merge_calls import MODES, launch_merge, launch_unmerge, random_plan\n"
        "from vitkernels.kernels.token_merge import native\n"
        "from vitkernels.kernels.token_unmerge import native as unmerge\n"
        "for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):\n"
        "    for tokens, merged, channels in ((1, 1, 1), (37, 20, 7), (21, 13, 80)):\n"
        "        x, grad_y = torch.randn(2, tokens, channels).to(dtype), torch.randn(2, merged, channels).to(dtype)\n"
        "        size = torch.ones(2, tokens, dtype=torch.promote_types(dtype, torch.float32))\n"
        "        plan = random_plan(2, tokens, merged)\n"
        "        for mode in MODES:\n"
        "            launch_merge(native, x, size, plan, mode, grad_y, module=twin, cuda=True)\n"
        "        launch_unmerge(unmerge, grad_y, plan, x, module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("token_merge", "token_unmerge"))
    assert done.returncode == 0, done.stderr[-4000:]


@each_mode
def test_a_wrong_kernel_fails_the_rule(mode, kernels):
    x, size, plan, grad_y = tensors(2, 30, 12, 16, torch.float32)
    got = launch_merge(native, x, size, plan, mode, grad_y, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check_merge({**got, name: got[name] * (1 + 1e-5)}, x, size, plan, mode, grad_y)


def test_a_plan_of_another_order_is_summed_in_its_own(kernels):
    """Members need not be those of a matching."""
    rows = torch.tensor([[2, 0, 1, 2, 3, 2, 1], [0, 0, 0, 1, 3, 2, 3]], dtype=torch.int32)
    x, size = torch.randn(2, 7, 4), torch.rand(2, 7) + 0.5
    plan, grad_y = groups(rows, 4), torch.randn(2, 4, 4)
    check_merge(launch_merge(native, x, size, plan, "wavg", grad_y, **kernels), x, size, plan, "wavg", grad_y)
