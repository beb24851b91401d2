"""The CPU kernels of kan_linear against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from guarded import Guarded, Layout, drawn
from kan_linear_calls import NAMES, PARAMS, check, check_rows_of_one_value, inputs, launch, results

from vitkernels import ops
from vitkernels.kernels.kan_linear import native, reference

DTYPES = [
    pytest.param(torch.float64, torch.float64, id="fp64"),
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float32, torch.float16, id="fp32-fp16"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-bf16"),
]
SHAPES = [  # rows, channels, outputs, grids
    (1, 1, 1, 8),
    (2, 3, 5, 1),
    (7, 16, 13, 8),
    (49, 24, 48, 8),
    (131, 37, 29, 8),
    (193, 12, 64, 5),
    (20, 33, 17, 3),
    (9, 5, 300, 8),
    (5, 3, 7, 301),
    (257, 70, 12, 8),
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs", "grids"), SHAPES)
def test_forward_and_gradients(rows, channels, outputs, grids, dtype, weight_dtype):
    tensors = inputs(rows, channels, outputs, grids, dtype, weight_dtype)
    if channels == 1:  # its norm is the shift alone, so x and the scale have no gradient
        return _check_one_channel(tensors)
    grad_y = torch.randn(rows, outputs)
    check(launch(native, tensors, grad_y), tensors, grad_y)


def _check_one_channel(tensors):
    got = launch(native, tensors, torch.ones(tensors["x"].shape[0], 1))
    want = results(reference.forward, tensors, torch.ones(tensors["x"].shape[0], 1))
    for name in ("y", "weight", "ln_bias", "grid"):
        torch.testing.assert_close(
            got[name], want[name], atol=2e-2 if got[name].itemsize == 2 else 1e-5, rtol=1e-2
        )
    assert got["x"].abs().max() < 1e-5
    assert got["ln_weight"].abs().max() < 1e-5


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(threads):
    tensors, grad_y = inputs(300, 40, 71), torch.randn(300, 71)  # outputs that no number of threads divides
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch(native, tensors, grad_y)
        torch.set_num_threads(threads)
        got = launch(native, tensors, grad_y)
    finally:
        torch.set_num_threads(before)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_rows_of_one_value():
    grad_y = torch.randn(3, 5)
    check_rows_of_one_value(lambda tensors: launch(native, tensors, grad_y))


def test_points_that_exceed_a_chain_are_summed_in_equal_ones():
    """257 points in chains of 129 and 128 err less than 256 in one. Broad functions: those err little themselves."""

    def error(grids):
        tensors, params = inputs(4, 4, 2048, grids), (0.01, 1e-5)
        y, mean, rstd = torch.empty(4, 2048), torch.empty(4), torch.empty(4)
        native.forward(y, mean, rstd, *tensors.values(), *params)
        truth = reference.forward(*(t.double() for t in tensors.values()), *params)[0]
        return ((y - truth).norm() / truth.norm()).item()

    assert error(257) < 0.85 * error(256)


@pytest.mark.parametrize("spread", [8.0, 100.0])
def test_far_from_the_grid(spread):
    """|u| up to 30 and 400, where a few functions still rise, and at 1e4, where all are 0."""
    tensors, grad_y = inputs(64, 24, 20, spread=spread), torch.randn(64, 20)
    check(launch(native, tensors, grad_y), tensors, grad_y)
    tensors["ln_bias"] += 1e4
    got = launch(native, tensors, grad_y)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert got["y"].abs().max() < 1e-12


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
def test_any_grid(grid, inverse):
    tensors = {**inputs(50, 12, 20, len(grid)), "grid": grid}
    grad_y = torch.randn(50, 20)
    check(launch(native, tensors, grad_y, (inverse, 1e-5)), tensors, grad_y, (inverse, 1e-5))


def test_far_from_a_grid_of_narrow_functions():
    """The exponential of a distance in their units overflows, but for a limit in the same units."""
    tensors, grad_y, params = inputs(50, 12, 20, spread=8), torch.randn(50, 20), (5.0, 1e-5)
    check(launch(native, tensors, grad_y, params), tensors, grad_y, params)


def test_slope_near_a_centre():
    """|tanh| recovered as sqrt(1 - phi) would be wrong by 1e-4 here."""
    offsets = torch.cat([-torch.logspace(-1, -7, 32), torch.zeros(1), torch.logspace(-7, -1, 32)])
    centre = 2 / 7
    x = torch.stack([offsets, -offsets], 1) + torch.tensor([centre, -centre])
    # A norm whose eps outweighs the variance leaves x as it is, but for a factor that the scale undoes.
    eps = 1e6
    tensors = {
        "x": x,
        "weight": torch.eye(16)[:, :16].contiguous(),
        "ln_weight": torch.full((2,), eps**0.5),
        "ln_bias": torch.zeros(2),
        "grid": torch.linspace(-2, 2, 8),
    }
    grad_y = torch.ones(x.shape[0], 16)
    check(launch(native, tensors, grad_y, (1 / 0.33, eps)), tensors, grad_y, (1 / 0.33, eps))


@pytest.mark.parametrize("where", ["x", "weight", "ln_bias", "grid"])
def test_nan_reaches_the_result(where):
    tensors = inputs(5, 6, 7)
    tensors[where].view(-1)[3] = float("nan")
    y = launch(native, tensors, torch.ones(5, 7))["y"]
    want = reference.forward(*tensors.values(), *PARAMS)[0]
    assert torch.equal(y.isnan(), want.isnan())


@pytest.mark.parametrize("wide", [False, True])
def test_an_infinite_row_spoils_itself_only(wide):
    tensors = inputs(40, 6, 7)
    if wide:
        tensors["grid"] = tensors["grid"] * 10
    want = launch(native, tensors, torch.ones(40, 7))["y"]
    tensors["x"][3, 2] = float("inf")
    y = launch(native, tensors, torch.ones(40, 7))["y"]
    keep = torch.arange(40) != 3
    assert torch.equal(y[keep], want[keep])
    assert y[3].isnan().all()


@pytest.mark.usefixtures("either_wall")
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("rows", [1, 61, 200])
def test_nothing_is_read_or_written_outside(rows, dtype, weight_dtype):
    guarded, plain = Guarded(walls=True), inputs(rows, 23, 23, 8, dtype, weight_dtype)
    tensors = {n: guarded.random(tuple(t.shape), t.dtype, "offset").copy_(t) for n, t in plain.items()}
    # rows of x as views into wider ones
    padded = guarded((1, 1, rows, 23), dtype, Layout(padding=7, before=65))[0, 0].copy_(plain["x"])
    grad_y = guarded.random((rows, 23), weight_dtype)
    small = plain["grid"].dtype
    y = guarded((rows, 23), weight_dtype, "offset")
    mean, rstd = guarded((rows,), small, "offset"), guarded((rows,), small, "offset")
    want = launch(native, plain, grad_y)
    for x in (tensors["x"], padded):
        call = (x, *list(tensors.values())[1:], *PARAMS)
        native.forward(y, mean, rstd, *call)
        grads = {name: guarded(tuple(t.shape), t.dtype, "offset") for name, t in plain.items()}
        native.backward(*grads.values(), grad_y, None, None, y, mean, rstd, *call)
        guarded.check()
        assert torch.equal(y, want["y"])
        for name in NAMES:
            assert torch.equal(grads[name], want[name]), name


@pytest.mark.usefixtures("either_wall")
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_matrices_whose_rows_lie_apart(dtype, weight_dtype):
    """x, the weight, y and the gradients of all three, as parts of wider matrices."""
    rows, channels, outputs = 140, 21, 19
    guarded, tensors = Guarded(walls=True), inputs(rows, channels, outputs, 8, dtype, weight_dtype)
    grad_y = drawn(rows, outputs, dtype=weight_dtype)
    want = launch(native, tensors, grad_y)

    def apart(like):
        return guarded(tuple(like.shape), like.dtype, Layout((0, 1), padding=7, before=65))

    given = {name: apart(t).copy_(t) if t.ndim == 2 else t for name, t in tensors.items()}
    y, grads = apart(want["y"]), {name: apart(t) if t.ndim == 2 else t.clone() for name, t in tensors.items()}
    mean, rstd = torch.empty(2, rows, dtype=tensors["grid"].dtype)
    native.forward(y, mean, rstd, *given.values(), *PARAMS)
    native.backward(
        *grads.values(), apart(grad_y).copy_(grad_y), None, None, y, mean, rstd, *given.values(), *PARAMS
    )
    guarded.check()
    assert torch.equal(y, want["y"])
    for name in NAMES:
        assert torch.equal(grads[name], want[name]), name


@pytest.mark.parametrize("wanted", [*NAMES, "x weight", "ln_bias grid"])
def test_each_gradient_alone(wanted):
    tensors, grad_y = inputs(40, 12, 10), torch.randn(40, 10)
    want = launch(native, tensors, grad_y)
    y, mean, rstd = reference.forward(*tensors.values(), *PARAMS)
    grads = [
        torch.full_like(t, float("nan")) if name in wanted.split() else None for name, t in tensors.items()
    ]
    native.backward(*grads, grad_y, None, None, y, mean, rstd, *tensors.values(), *PARAMS)
    for name, grad in zip(NAMES, grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, want[name])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_below_a_quarter_of_eager():
    """Of a stage of MedViTV2-S, forward and backward, in a process each: the kernels' scratch is malloc'ed."""
    code = (
        "import sys, torch\n"
        "import kan_linear_calls as calls\n"
        "from vitkernels import ops\n"
        "torch.set_num_threads(1)\n"
        "def run(rows):\n"
        "    tensors = [t.requires_grad_(i < 4) for i, t in enumerate(calls.inputs(rows, 256, 512).values())]\n"
        "    y = ops.kan_linear(*tensors, backend=sys.argv[1])\n"
        "    y.backward(torch.ones_like(y))\n"
        # Not ru_maxrss, which starts at what the parent had.
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('VmHWM:')[1].split()[0])\n"
        "run(8)\n"
        "before = peak()\n"
        "run(6272)\n"
        "print(peak() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}

    def peak(backend: str) -> int:
        command = [sys.executable, "-c", code, backend]
        return int(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        )

    kernels, eager = peak("cpu"), peak("reference")
    print(f"peak beyond the warm process: kernels {kernels} KiB, plain PyTorch {eager} KiB")
    assert 0 < kernels < eager / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_norm_and_basis_in_float32(dtype):
    """x = 1000 +- 1 would be rounded to nothing in 16 bits."""
    tensors = inputs(30, 12, 20)
    tensors["x"] = 1000 + tensors["x"]
    want = ops.kan_linear(*tensors.values())
    with torch.autocast("cpu", dtype):
        got = ops.kan_linear(*tensors.values())
    assert got.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want, atol=2 * eps, rtol=2 * eps)


def test_a_wrong_kernel_fails_the_rule():
    tensors, grad_y = inputs(49, 16, 12), torch.randn(49, 12)
    got = launch(native, tensors, grad_y)
    for name in got:
        wrong = {**got, name: got[name] * (1 + 1e-5)}
        with pytest.raises(AssertionError):
            check(wrong, tensors, grad_y)


def test_the_public_function_takes_the_kernels():
    tensors = inputs(6, 5, 4)
    want = launch(native, tensors, torch.ones(6, 4))["y"]
    assert torch.equal(ops.kan_linear(*tensors.values()), want)
