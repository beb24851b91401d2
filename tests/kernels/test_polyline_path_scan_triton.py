"""The Triton kernels of polyline_path_scan in Triton's interpreter, against plain PyTorch.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_polyline_path_scan_triton.py`. The interpreter takes an associative scan
element by element, so shapes are small.
"""

from __future__ import annotations

import os

import pytest
import torch
from guarded import Guarded
from polyline_calls import check, gradient_like, launch, scan_inputs, strided

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import ops
from vitkernels.kernels.polyline_path_scan import triton as launcher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
each_transpose = pytest.mark.parametrize("transpose", [False, True])


@each_transpose
@pytest.mark.parametrize(
    ("height", "width", "d", "dtype", "decay_dtype"),
    [
        (1, 1, 3, F32, F32),
        (1, 9, 2, F16, F16),
        (9, 1, 2, BF16, F32),
        (3, 4, 5, F32, F32),
        pytest.param(7, 6, 4, F16, F32, marks=pytest.mark.thorough),
    ],
)
def test_forward_and_gradients(height, width, d, dtype, decay_dtype, transpose):
    tensors = scan_inputs(1, height, width, 2, d, dtype, decay_dtype)
    grad = gradient_like(tensors)
    check(launch(launcher, tensors, grad, transpose), tensors, grad, transpose)


def test_several_tiles_of_channels(monkeypatch):
    monkeypatch.setattr(launcher, "TILE", 8)
    tensors = scan_inputs(1, 3, 2, 1, 7)
    grad = gradient_like(tensors)
    check(launch(launcher, tensors, grad, False), tensors, grad, False)


@each_transpose
def test_strong_decay(transpose):
    for rate in (50.0, 200.0):
        tensors = scan_inputs(1, 3, 4, 1, 2)
        tensors |= {name: torch.full_like(t, -rate) for name, t in tensors.items() if name != "x"}
        grad = gradient_like(tensors)
        got = launch(launcher, tensors, grad, transpose)
        if rate < 100:
            check(got, tensors, grad, transpose)
        else:
            assert torch.equal(got["out"], tensors["x"])
            assert not got["log_decay_w"].any()


@each_transpose
def test_nothing_is_read_or_written_outside(transpose):
    guarded, plain = Guarded(), scan_inputs(1, 3, 2, 2, 3)
    grad = gradient_like(plain)
    want = launch(launcher, plain, grad, transpose)
    tensors = {name: guarded(tuple(t.shape), t.dtype, "odd").copy_(t) for name, t in plain.items()}
    out, upstream = guarded(grad.shape, F32), guarded(grad.shape, F32).copy_(grad)
    grads = {name: guarded(tuple(t.shape), t.dtype, "odd") for name, t in plain.items()}
    launcher.forward(out, *tensors.values(), transpose)
    launcher.backward(*grads.values(), upstream, out, *tensors.values(), transpose)
    guarded.check()
    assert torch.equal(out, want["out"])
    for name, gradient in grads.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("wanted", ["x", "log_decay_w", "log_decay_h", "log_decay_w log_decay_h"])
def test_each_gradient_alone(wanted):
    tensors = scan_inputs(1, 3, 2, 1, 3)
    grad = gradient_like(tensors)
    want = launch(launcher, tensors, grad, True)
    grads = {n: torch.full_like(t, float("nan")) if n in wanted.split() else None for n, t in tensors.items()}
    launcher.backward(*grads.values(), grad, want["out"], *tensors.values(), True)
    for name, gradient in grads.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, want[name])


def test_the_public_function_runs_the_kernels_on_strided_inputs():
    tensors = scan_inputs(1, 2, 3, 2, 2)
    want = launch(launcher, tensors, gradient_like(tensors), False)["out"]
    for _, views in strided(tensors):
        assert torch.equal(ops.polyline_path_scan(**views, backend="triton"), want)


def test_long_lines_are_refused():
    with pytest.raises(ValueError, match="up to 1024 tokens, got 1025"):
        ops.polyline_path_scan(**scan_inputs(1, 1, 1025, 1, 1), backend="triton")


def test_a_wrong_kernel_fails_the_rule():
    tensors = scan_inputs(1, 3, 4, 1, 2)
    grad = gradient_like(tensors)
    got = launch(launcher, tensors, grad, False)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, False)
