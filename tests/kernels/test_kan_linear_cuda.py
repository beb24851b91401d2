"""The CUDA kernels of kan_linear, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import Guarded, Layout
from kan_linear_calls import NAMES, PARAMS, check, check_rows_of_one_value, inputs, launch

from vitkernels.kernels.kan_linear import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    pytest.param(F64, F64, id="fp64"),
    pytest.param(F32, F32, id="fp32"),
    pytest.param(F16, F16, id="fp16"),
    pytest.param(BF16, BF16, id="bf16"),
    pytest.param(F32, F16, id="fp32-fp16"),
    pytest.param(F32, BF16, id="fp32-bf16"),
]
SHAPES = [  # rows, channels, outputs, grids: one tile and less, more than one in every direction
    (1, 3, 1, 8),
    (49, 16, 48, 8),
    (67, 19, 29, 5),
    (130, 17, 133, 8),
    (20, 3, 17, 1),
    (9, 3, 20, 64),
]


@pytest.fixture
def kernels(request):
    return {"module": twin.load(), "cuda": True}


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs", "grids"), SHAPES)
def test_forward_and_gradients(rows, channels, outputs, grids, dtype, weight_dtype, kernels):
    tensors, grad_y = inputs(rows, channels, outputs, grids, dtype, weight_dtype), torch.randn(rows, outputs)
    check(launch(native, tensors, grad_y, **kernels), tensors, grad_y)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:4])
def test_every_schedule_gives_the_same(dtype, weight_dtype, kernels):
    """A missing barrier would show as a difference between orders of threads."""
    tensors, grad_y = inputs(70, 18, 70, 8, dtype, weight_dtype), torch.randn(70, 70)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch(native, tensors, grad_y, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


def test_rows_of_one_value(kernels):
    grad_y = torch.randn(3, 5)
    check_rows_of_one_value(lambda tensors: launch(native, tensors, grad_y, **kernels))


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:])
def test_far_from_the_grid(dtype, weight_dtype, kernels):
    tensors = inputs(40, 24, 20, dtype=dtype, weight_dtype=weight_dtype, spread=8.0)  # |u| up to 30
    grad_y = torch.randn(40, 20)
    check(launch(native, tensors, grad_y, **kernels), tensors, grad_y)
    tensors["ln_bias"] += 1e4  # where every function is 0
    got = launch(native, tensors, grad_y, **kernels)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert got["y"].float().abs().max() < 1e-12


@pytest.mark.parametrize(
    ("grid", "inverse"),
    [
        (torch.linspace(-30, 30, 8), 1 / 0.33),
        (torch.linspace(-30, 1, 8), 1 / 0.33),
        (torch.linspace(-1, 30, 8), 1 / 0.33),
        (torch.tensor([2.0, -0.5, 0.0, 0.0, 7.0]), 3.0),
        (torch.linspace(-2, 2, 8), 40.0),
        (torch.linspace(-2, 2, 8), 0.01),
    ],
    ids=["wide", "wide below", "wide above", "unsorted", "narrow functions", "broad functions"],
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_any_grid(grid, inverse, dtype, kernels):
    tensors = {**inputs(50, 12, 20, len(grid), dtype), "grid": grid}
    tensors["ln_bias"] += grid.mean()
    grad_y = torch.randn(50, 20)
    params = (inverse, 1e-5)
    check(launch(native, tensors, grad_y, params, **kernels), tensors, grad_y, params)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:3])
def test_partial_sums_that_warps_share(dtype, weight_dtype, kernels):
    """Of the gradient of the grid, one a channel here: more than a warp takes at once."""
    tensors, grad_y = inputs(5, 43, 3, 64, dtype, weight_dtype), torch.randn(5, 3)
    check(launch(native, tensors, grad_y, **kernels), tensors, grad_y)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [DTYPES[1], DTYPES[2], DTYPES[4]])
@pytest.mark.parametrize(
    ("grids", "padding", "of_x", "before"), [(8, 0, 7, 64), (8, 0, 6, 65), (8, 1, 6, 64), (5, 6, 7, 64)]
)
def test_nothing_is_read_or_written_outside(dtype, weight_dtype, grids, padding, of_x, before, kernels):
    """With rows that asynchronous copies can take, and with rows that they cannot: of the weight not even the first,
    all but the first, and those that do not end where a copy does. Rows of x that vectors can take but for where the
    first begins, where they end, or where the second begins."""
    guarded, rows, outputs = Guarded(), 37, 24
    plain = inputs(rows, 10, outputs, grids, dtype, weight_dtype)
    layout = Layout(before=before)
    tensors = {name: guarded(tuple(t.shape), t.dtype, layout).copy_(t) for name, t in plain.items()}
    tensors["x"] = guarded((1, 1, rows, 10), dtype, Layout(padding=of_x, before=before))[0, 0].copy_(
        plain["x"]
    )
    weight = plain["weight"]
    of_weight = Layout((0, 1), padding=padding, before=before)
    tensors["weight"] = guarded(tuple(weight.shape), weight.dtype, of_weight).copy_(weight)
    grad_y = guarded((rows, outputs), weight_dtype, layout).copy_(torch.randn(rows, outputs))
    want = launch(native, plain, grad_y, **kernels)
    y, small = guarded((rows, outputs), weight_dtype, layout), plain["grid"].dtype
    mean, rstd = guarded((rows,), small), guarded((rows,), small)
    native.forward(y, mean, rstd, *tensors.values(), *PARAMS, **kernels)
    grads = {name: guarded(tuple(t.shape), t.dtype, layout) for name, t in plain.items()}
    native.backward(*grads.values(), grad_y, None, None, y, mean, rstd, *tensors.values(), *PARAMS, **kernels)
    guarded.check()
    assert torch.equal(y, want["y"])
    for name in NAMES:
        assert torch.equal(grads[name], want[name]), name


@pytest.mark.parametrize("wanted", [*NAMES, "x weight"])
def test_each_gradient_alone(wanted, kernels):
    tensors, grad_y = inputs(40, 6, 10), torch.randn(40, 10)
    want = launch(native, tensors, grad_y, **kernels)
    # The kernels' own statistics: others, an ulp away, would show in the gradient of the grid.
    y, mean, rstd = torch.empty(40, 10), torch.empty(40), torch.empty(40)
    native.forward(y, mean, rstd, *tensors.values(), *PARAMS, **kernels)
    grads = [
        torch.full_like(t, float("nan")) if name in wanted.split() else None for name, t in tensors.items()
    ]
    native.backward(*grads, grad_y, None, None, y, mean, rstd, *tensors.values(), *PARAMS, **kernels)
    for name, grad in zip(NAMES, grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, want[name])


def test_by_products_are_skipped(kernels):
    tensors = inputs(40, 6, 10)
    y = torch.full((40, 10), float("nan"))
    native.forward(y, None, None, *tensors.values(), *PARAMS, **kernels)
    assert torch.equal(y, launch(native, tensors, torch.ones(40, 10), **kernels)["y"])


def test_more_than_64_grid_points_are_refused(kernels):
    with pytest.raises(RuntimeError, match="up to 64 points"):
        launch(native, inputs(4, 3, 5, 65), torch.ones(4, 5), **kernels)


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from kan_linear_calls import inputs, launch\n"
        "from vitkernels.kernels.kan_linear import native\n"
        "for kinds in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.float16,) * 2,"
        " (torch.float32, torch.bfloat16)):\n"
        "    for shape in ((67, 9, 29, 5), (3, 10, 72, 8)):\n"
        "        tensors = inputs(*shape, *kinds)\n"
        "        launch(native, tensors, torch.ones(shape[0], shape[2]), module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("kan_linear",))
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_wrong_kernel_fails_the_rule(kernels):
    tensors, grad_y = inputs(40, 16, 12), torch.randn(40, 12)
    got = launch(native, tensors, grad_y, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-5)}, tensors, grad_y)
