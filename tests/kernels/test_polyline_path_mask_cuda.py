"""The CUDA kernels of polyline_path_mask, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import Guarded, Layout
from polyline_calls import check, decays, gradient_like, launch, strided

from vitkernels.kernels.polyline_path_mask import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
OPTIONS = [(log, transpose) for log in (True, False) for transpose in (False, True)]
each_option = pytest.mark.parametrize(("log", "transpose"), OPTIONS)
# One token; lines; odd and even numbers of tokens, which vectors of 16 bytes divide or not; rows longer than a block,
# columns longer than the rows of one; more steps than are taken at a time.
GRIDS = [(1, 1), (1, 9), (9, 1), (3, 4), (7, 7), (4, 6), (2, 20), (20, 2)]


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


def _products():
    """All grids, options and dtypes; by default every two of them meet, as in a Latin square."""
    for i, grid in enumerate(GRIDS):
        for j, option in enumerate(OPTIONS):
            for k, dtype in enumerate((F64, F32, F16, BF16)):
                marks = () if (i + j + k) % 4 == 0 else pytest.mark.thorough
                yield pytest.param(grid, dtype, *option, marks=marks)


@pytest.mark.parametrize(("grid", "dtype", "log", "transpose"), list(_products()))
def test_forward_and_gradients(grid, dtype, log, transpose, kernels):
    tensors = decays(2, *grid, 1, dtype)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, log, transpose, **kernels), tensors, grad, log, transpose)


@each_option
@pytest.mark.parametrize("grid", [(2, 260), pytest.param((260, 2), marks=pytest.mark.thorough)])
def test_several_chunks_of_keys(grid, log, transpose, kernels):
    tensors = decays(1, *grid, 1, rate=0.02)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, log, transpose, **kernels), tensors, grad, log, transpose)


@each_option
def test_strong_decay(log, transpose, kernels):
    tensors = {name: torch.full_like(t, -50.0) for name, t in decays(1, 5, 6, 2).items()}
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, log, transpose, **kernels), tensors, grad, log, transpose)


@each_option
def test_what_comes_before_a_line_plays_no_part(log, transpose, kernels):
    tensors = decays(1, 3, 4, 2)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, log, transpose, **kernels)
    tensors["log_decay_w"][:, :, 0] = tensors["log_decay_h"][:, 0] = -torch.inf
    got = launch(native, tensors, grad, log, transpose, **kernels)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@each_option
def test_every_schedule_gives_the_same(log, transpose, kernels):
    """A missing barrier would show as a difference between orders of threads."""
    tensors = decays(1, 7, 9, 1)
    grad = gradient_like(tensors)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch(native, tensors, grad, log, transpose, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@each_option
def test_strided_inputs(log, transpose, kernels):
    tensors = decays(2, 2, 4, 2)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, log, transpose, **kernels)
    for label, views in strided(tensors):
        got = launch(
            native, views, grad.transpose(0, 1).contiguous().transpose(0, 1), log, transpose, **kernels
        )
        for name in want:
            assert torch.equal(got[name], want[name]), f"{label}: {name}"


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("before", [64, 65])
@each_option
def test_nothing_is_read_or_written_outside(log, transpose, dtype, before, kernels):
    """With masks that vectors can be stored to, and with masks that they cannot."""
    guarded, plain = Guarded(), decays(1, 4, 6, 2, dtype)
    grad = gradient_like(plain)
    want = launch(native, plain, grad, log, transpose, **kernels)
    tensors = {name: guarded(tuple(t.shape), dtype, "odd").copy_(t) for name, t in plain.items()}
    out = guarded((1, 2, 24, 24), dtype, Layout(before=before))
    upstream = guarded((1, 2, 24, 24), dtype, Layout(padding=3, before=before)).copy_(grad)
    grads = {name: guarded(tuple(t.shape), dtype, "odd") for name, t in plain.items()}
    native.forward(out, *tensors.values(), log, transpose, **kernels)
    native.backward(*grads.values(), upstream, out, *tensors.values(), log, transpose, **kernels)
    guarded.check()
    assert torch.equal(out, want["out"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("wanted", ["log_decay_w", "log_decay_h"])
@each_option
def test_each_gradient_alone(log, transpose, wanted, kernels):
    tensors = decays(1, 5, 4, 2)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, log, transpose, **kernels)
    grads = [torch.full_like(t, float("nan")) if n == wanted else None for n, t in tensors.items()]
    native.backward(*grads, grad, want["out"], *tensors.values(), log, transpose, **kernels)
    for gradient in grads:
        if gradient is not None:
            assert torch.equal(gradient, want[wanted])


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from polyline_calls import decays, gradient_like, launch\n"
        "from vitkernels.kernels.polyline_path_mask import native\n"
        "for dtype in (torch.float64, torch.float32, torch.float16):\n"
        "    for grid in ((3, 5), (4, 6)):\n"
        "        for options in ((True, False), (False, True)):\n"
        "            tensors = decays(1, *grid, 2, dtype)\n"
        "            launch(native, tensors, gradient_like(tensors), *options, module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("polyline_path_mask", "polyline_path_scan"))
    assert done.returncode == 0, done.stderr[-4000:]


@each_option
def test_a_wrong_kernel_fails_the_rule(log, transpose, kernels):
    tensors = decays(1, 5, 6, 2)
    grad = gradient_like(tensors)
    got = launch(native, tensors, grad, log, transpose, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, log, transpose)
