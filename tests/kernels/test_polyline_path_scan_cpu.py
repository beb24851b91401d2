"""The CPU kernels of polyline_path_scan against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from guarded import Guarded
from polyline_calls import GRIDS, LARGER, check, gradient_like, launch, scan_inputs, strided

from vitkernels import ops
from vitkernels.kernels.polyline_path_scan import native

DTYPES = [
    pytest.param(torch.float64, torch.float64, id="fp64"),
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
]
each_transpose = pytest.mark.parametrize("transpose", [False, True])


@each_transpose
@pytest.mark.parametrize(("dtype", "decay_dtype"), DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_forward_and_gradients(grid, dtype, decay_dtype, transpose):
    tensors = scan_inputs(2, *grid, 2, 5, dtype, decay_dtype)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, transpose), tensors, grad, transpose)


@each_transpose
@pytest.mark.parametrize("grid", LARGER)
@pytest.mark.parametrize("d", [8, 16, 24, 64])
def test_larger_grids_and_heads(d, grid, transpose):
    tensors = scan_inputs(1, *grid, 2, d)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, transpose), tensors, grad, transpose)


@each_transpose
@pytest.mark.parametrize("d", [1, 3, 31, 33, 37])
def test_any_number_of_channels(d, transpose):
    tensors = scan_inputs(1, 4, 5, 2, d)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, transpose), tensors, grad, transpose)


@each_transpose
def test_strong_and_absent_decay(transpose):
    for rate in (50.0, 200.0, 0.0):
        tensors = scan_inputs(1, 5, 6, 2, 4)
        tensors |= {name: torch.full_like(t, -rate) for name, t in tensors.items() if name != "x"}
        grad = gradient_like(tensors)
        got = launch(native, tensors, grad, transpose)
        assert all(torch.isfinite(t).all() for t in got.values())
        if rate < 100:
            check(got, tensors, grad, transpose)
        else:
            assert torch.equal(got["out"], tensors["x"])
            assert not got["log_decay_w"].any()
        if rate == 0:
            assert got["log_decay_w"][:, :, 1:].all()


@pytest.mark.parametrize("threads", [2, 3])
@each_transpose
def test_threads_change_no_bit(transpose, threads):
    tensors = scan_inputs(1, 30, 40, 5, 16)
    grad = gradient_like(tensors)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch(native, tensors, grad, transpose)
        torch.set_num_threads(threads)
        got = launch(native, tensors, grad, transpose)
    finally:
        torch.set_num_threads(before)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@each_transpose
def test_strided_inputs(transpose):
    tensors = scan_inputs(2, 4, 6, 3, 8)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, transpose)
    for label, views in strided(tensors):
        upstream = grad.movedim(3, 1).contiguous().movedim(1, 3)
        got = launch(native, views, upstream, transpose)
        for name in want:
            assert torch.equal(got[name], want[name]), f"{label}: {name}"


@pytest.mark.usefixtures("either_wall")
@pytest.mark.parametrize(("dtype", "decay_dtype"), DTYPES)
@each_transpose
def test_nothing_is_read_or_written_outside(transpose, dtype, decay_dtype):
    guarded, plain = Guarded(walls=True), scan_inputs(1, 3, 5, 2, 13, dtype, decay_dtype)
    grad = gradient_like(plain)
    want = launch(native, plain, grad, transpose)
    tensors = {name: guarded(tuple(t.shape), t.dtype, "odd").copy_(t) for name, t in plain.items()}
    out, upstream = guarded(grad.shape, dtype), guarded(grad.shape, dtype).copy_(grad)
    grads = {name: guarded(tuple(t.shape), t.dtype, "odd") for name, t in plain.items()}
    native.forward(out, *tensors.values(), transpose)
    native.backward(*grads.values(), upstream, out, *tensors.values(), transpose)
    guarded.check()
    assert torch.equal(out, want["out"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize(
    "wanted", ["x", "log_decay_w", "log_decay_h", "x log_decay_w", "x log_decay_h", "log_decay_w log_decay_h"]
)
@each_transpose
def test_each_gradient_alone(transpose, wanted):
    tensors = scan_inputs(1, 5, 4, 2, 6)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, transpose)
    grads = {n: torch.full_like(t, float("nan")) if n in wanted.split() else None for n, t in tensors.items()}
    native.backward(*grads.values(), grad, want["out"], *tensors.values(), transpose)
    for name, gradient in grads.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, want[name])


@each_transpose
def test_a_wrong_kernel_fails_the_rule(transpose):
    tensors = scan_inputs(1, 5, 6, 2, 8)
    grad = gradient_like(tensors)
    got = launch(native, tensors, grad, transpose)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, transpose)


def test_the_public_function_takes_the_kernels():
    tensors = scan_inputs(2, 3, 5, 2, 4)
    want = launch(native, tensors, gradient_like(tensors), True)["out"]
    assert torch.equal(ops.polyline_path_scan(**tensors, transpose=True), want)
