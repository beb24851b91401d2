"""The Triton kernels of kan_linear in Triton's interpreter, against plain PyTorch.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_kan_linear_triton.py`. bfloat16 is left to GPUs: tl.dot on it is wrong in
the interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from guarded import Guarded, Layout
from kan_linear_calls import NAMES, PARAMS, check, check_rows_of_one_value, inputs, launch, results

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from gpu_sums import assert_shorter_sums, sum_as_a_gpu

from vitkernels import ops
from vitkernels.kernels.kan_linear import reference
from vitkernels.kernels.kan_linear import triton as launcher

F32, F16 = torch.float32, torch.float16
DTYPES = [
    pytest.param(F32, F32, id="fp32"),
    pytest.param(F16, F16, id="fp16"),
    pytest.param(F32, F16, id="fp32-fp16"),
]
SHAPES = [  # rows, channels, outputs, grids
    (1, 3, 1, 8),
    (49, 12, 48, 8),
    (67, 9, 29, 5),
    (130, 17, 131, 8),
    (20, 3, 17, 1),
    (9, 2, 20, 33),
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs", "grids"), SHAPES)
def test_forward_and_gradients(rows, channels, outputs, grids, dtype, weight_dtype):
    tensors, grad_y = inputs(rows, channels, outputs, grids, dtype, weight_dtype), torch.randn(rows, outputs)
    check(launch(launcher, tensors, grad_y), tensors, grad_y)


def test_rows_of_one_value():
    grad_y = torch.randn(3, 5)
    check_rows_of_one_value(lambda tensors: launch(launcher, tensors, grad_y))


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_far_from_the_grid(dtype, weight_dtype):
    tensors = inputs(40, 24, 20, dtype=dtype, weight_dtype=weight_dtype, spread=8.0)  # |u| up to 30
    grad_y = torch.randn(40, 20)
    check(launch(launcher, tensors, grad_y), tensors, grad_y)
    tensors["ln_bias"] += 1e4  # where every function is 0
    got = launch(launcher, tensors, grad_y)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert got["y"].float().abs().max() < 1e-12


@pytest.mark.parametrize(
    ("grid", "inverse"),
    [
        (torch.linspace(-30, 30, 8), 1 / 0.33),
        (torch.tensor([2.0, -0.5, 0.0, 0.0, 7.0]), 3.0),
        (torch.linspace(-2, 2, 8), 40.0),
        (torch.linspace(-2, 2, 8), 0.01),
    ],
    ids=["wide", "unsorted", "narrow functions", "broad functions"],
)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_any_grid(grid, inverse, dtype):
    tensors = {**inputs(50, 12, 20, len(grid), dtype), "grid": grid}
    grad_y = torch.randn(50, 20)
    check(launch(launcher, tensors, grad_y, (inverse, 1e-5)), tensors, grad_y, (inverse, 1e-5))


def test_shares_of_rows_add_up(monkeypatch):
    tensors, grad_y = inputs(200, 6, 40), torch.randn(200, 40)
    check(launch(launcher, tensors, grad_y), tensors, grad_y)
    monkeypatch.setattr(launcher, "WEIGHT_PROGRAMS", 1)
    check(launch(launcher, tensors, grad_y), tensors, grad_y)


@pytest.mark.parametrize(
    ("rows", "channels", "outputs", "name"),
    [(8, 96, 8, "y"), (8, 4, 384, "x"), (384, 4, 8, "weight")],
    ids=["channels", "outputs", "rows"],
)
def test_long_sums_are_made_in_parts(rows, channels, outputs, name, monkeypatch):
    """One chain for each output of 128 channels, with 8 functions each, erred 1.6 times what is allowed on a GPU."""
    sum_as_a_gpu(monkeypatch)
    monkeypatch.setattr(launcher, "WEIGHT_PROGRAMS", 1)
    tensors, grad_y = inputs(rows, channels, outputs), torch.randn(rows, outputs)
    got = launch(launcher, tensors, grad_y)
    check(got, tensors, grad_y)
    wide = {name: t.double() for name, t in tensors.items()}
    truth = results(reference.forward, wide, grad_y.double())
    layer = lambda: results(reference.forward, tensors, grad_y)  # noqa: E731
    assert_shorter_sums(name, got, layer, truth, monkeypatch)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_nothing_is_read_or_written_outside(dtype, weight_dtype, monkeypatch):
    guarded, rows = Guarded(), 37
    monkeypatch.setattr(launcher, "_scratch", lambda like, *shape: guarded(shape, F32))
    plain = inputs(rows, 21, 19, 5, dtype, weight_dtype)
    tensors = {name: guarded(tuple(t.shape), t.dtype, "offset").copy_(t) for name, t in plain.items()}
    tensors["x"] = guarded((1, 1, rows, 21), dtype, Layout(padding=7, before=65))[0, 0].copy_(plain["x"])
    grad_y = guarded.random((rows, 19), weight_dtype)
    want = launch(launcher, plain, grad_y)
    y, mean, rstd = guarded((rows, 19), weight_dtype), guarded((rows,), F32), guarded((rows,), F32)
    launcher.forward(y, mean, rstd, *tensors.values(), *PARAMS)
    grads = {name: guarded(tuple(t.shape), t.dtype, "offset") for name, t in plain.items()}
    launcher.backward(*grads.values(), grad_y, None, None, y, mean, rstd, *tensors.values(), *PARAMS)
    guarded.check()
    for name in NAMES:
        assert torch.equal(grads[name], want[name]), name


@pytest.mark.parametrize("wanted", [*NAMES, "x weight"])
def test_each_gradient_alone(wanted):
    tensors, grad_y = inputs(40, 6, 10), torch.randn(40, 10)
    want = launch(launcher, tensors, grad_y)
    y, mean, rstd = reference.forward(*tensors.values(), *PARAMS)
    grads = [
        torch.full_like(t, float("nan")) if name in wanted.split() else None for name, t in tensors.items()
    ]
    launcher.backward(*grads, grad_y, None, None, y, mean, rstd, *tensors.values(), *PARAMS)
    for name, grad in zip(NAMES, grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, want[name])


def test_the_public_function_runs_the_kernels_on_maps():
    tensors = inputs(24, 6, 10)
    tensors["x"] = tensors["x"].view(2, 3, 4, 6)
    grad_y = torch.randn(2, 3, 4, 10)
    got = results(
        lambda *t: ops.kan_linear(*t[:5], inv_denominator=t[5], eps=t[6], backend="triton"), tensors, grad_y
    )
    check(got, tensors, grad_y)


def test_a_wrong_kernel_fails_the_rule():
    tensors, grad_y = inputs(40, 16, 12), torch.randn(40, 12)
    got = launch(launcher, tensors, grad_y)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-5)}, tensors, grad_y)
