"""The CPU kernels of polyline_path_mask against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from guarded import Guarded, Layout
from polyline_calls import GRIDS, LARGER, check, decays, gradient_like, launch, strided

from vitkernels import ops
from vitkernels.kernels.polyline_path_mask import native, reference

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
OPTIONS = [(log, transpose) for log in (True, False) for transpose in (False, True)]
each_option = pytest.mark.parametrize(("log", "transpose"), OPTIONS)


@each_option
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_forward_and_gradients(grid, dtype, log, transpose):
    tensors = decays(2, *grid, 2, dtype)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, log, transpose), tensors, grad, log, transpose)


@each_option
@pytest.mark.parametrize("grid", [LARGER[0], LARGER[2], pytest.param(LARGER[1], marks=pytest.mark.thorough)])
def test_larger_grids(grid, log, transpose):
    """Masks that leave the caches, so that they are written past them."""
    tensors = decays(4 if grid == (14, 14) else 1, *grid, 8 if grid == (14, 14) else 2)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, log, transpose), tensors, grad, log, transpose)


@each_option
def test_strong_and_absent_decay(log, transpose):
    for rate in (50.0, 0.0):
        tensors = {name: torch.full_like(t, -rate) for name, t in decays(1, 5, 6, 2).items()}
        grad = gradient_like(tensors)
        got = launch(native, tensors, grad, log, transpose)
        assert all(torch.isfinite(t).all() for t in got.values())
        check(got, tensors, grad, log, transpose)
        if rate == 0:
            assert (got["out"] == (0 if log else 1)).all()
            assert got["log_decay_w"][:, :, 1:].all()


@pytest.mark.parametrize("threads", [2, 3])
@each_option
def test_threads_change_no_bit(log, transpose, threads):
    tensors = decays(1, 25, 31, 2)  # work for three threads, and a mask that is written past the caches
    grad = gradient_like(tensors)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch(native, tensors, grad, log, transpose)
        torch.set_num_threads(threads)
        got = launch(native, tensors, grad, log, transpose)
    finally:
        torch.set_num_threads(before)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@each_option
def test_strided_inputs(log, transpose):
    tensors = decays(2, 4, 6, 3)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, log, transpose)
    for label, views in strided(tensors):
        got = launch(native, views, grad.transpose(0, 1).contiguous().transpose(0, 1), log, transpose)
        for name in want:
            assert torch.equal(got[name], want[name]), f"{label}: {name}"
    constant = {name: t[:1, :1, :1].expand(t.shape) for name, t in tensors.items()}
    dense = {name: t.contiguous() for name, t in constant.items()}
    out = torch.empty_like(want["out"])
    native.forward(out, *constant.values(), log, transpose)
    assert torch.equal(out, launch(native, dense, grad, log, transpose)["out"])


@pytest.mark.usefixtures("either_wall")
@pytest.mark.parametrize("dtype", DTYPES)
@each_option
def test_nothing_is_read_or_written_outside(log, transpose, dtype):
    guarded, plain = Guarded(walls=True), decays(1, 3, 5, 2, dtype)
    grad = gradient_like(plain)
    want = launch(native, plain, grad, log, transpose)
    tensors = {name: guarded(tuple(t.shape), dtype, "odd").copy_(t) for name, t in plain.items()}
    out = guarded((1, 2, 15, 15), dtype, "offset")
    upstream = guarded((1, 2, 15, 15), dtype, Layout(padding=3, before=65)).copy_(grad)
    grads = {name: guarded(tuple(t.shape), dtype, "odd") for name, t in plain.items()}
    native.forward(out, *tensors.values(), log, transpose)
    native.backward(*grads.values(), upstream, out, *tensors.values(), log, transpose)
    guarded.check()
    assert torch.equal(out, want["out"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, want[name]), name


@each_option
def test_a_large_mask_need_not_begin_and_end_with_a_cache_line(log, transpose):
    """One that is written past the caches, for which only whole lines can be."""
    tensors = decays(1, 5, 207, 1)
    guarded = Guarded()
    out = guarded((1, 1, 1035, 1035), torch.float32, "offset")
    native.forward(out, *tensors.values(), log, transpose)
    guarded.check()
    (want,) = reference.forward(*tensors.values(), log, transpose)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", ["log_decay_w", "log_decay_h"])
@each_option
def test_each_gradient_alone(log, transpose, wanted):
    tensors = decays(1, 5, 4, 2)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, log, transpose)
    grads = [torch.full_like(t, float("nan")) if n == wanted else None for n, t in tensors.items()]
    native.backward(*grads, grad, want["out"], *tensors.values(), log, transpose)
    for gradient in grads:
        if gradient is not None:
            assert torch.equal(gradient, want[wanted])


@each_option
def test_a_wrong_kernel_fails_the_rule(log, transpose):
    tensors = decays(1, 5, 6, 2)
    grad = gradient_like(tensors)
    got = launch(native, tensors, grad, log, transpose)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, log, transpose)


def test_the_public_function_takes_the_kernels():
    tensors = decays(2, 3, 5, 2)
    want = launch(native, tensors, torch.ones(2, 2, 15, 15), False, True)["out"]
    assert torch.equal(ops.polyline_path_mask(**tensors, log=False, transpose=True), want)
