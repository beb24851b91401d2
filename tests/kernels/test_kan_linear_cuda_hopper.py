"""The kernels of kan_linear for Hopper, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import threading

import pytest
import torch
import twin
from guarded import Guarded, Layout
from kan_linear_calls import PARAMS, check, inputs, launch

from vitkernels import ops
from vitkernels.core.operator import REGISTRY
from vitkernels.kernels.kan_linear import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    pytest.param(F16, F16, id="fp16"),
    pytest.param(BF16, BF16, id="bf16"),
    pytest.param(F32, F16, id="fp32-fp16"),
    pytest.param(F32, BF16, id="fp32-bf16"),
]
# rows, channels, outputs; beside them the tile of y that the host chooses on one multiprocessor
SHAPES = [
    (192, 64, 256),  # 192 x 256
    (190, 8, 300),  # 192 x 256
    (129, 40, 130),  # 192 x 256
    (100, 48, 200),  # 128 x 256
    (300, 16, 40),  # 192 x 128
    (70, 24, 133),  # 128 x 256
    (600, 24, 136),  # in shares of the rows, for the gradient of the weight
    (1, 8, 1),  # 128 x 128
]


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


def names_of_kernels(module, run):
    module.count_traffic(True)
    try:
        run()
        return {row[0] for row in module.traffic()}
    finally:
        module.count_traffic(False)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs"), SHAPES)
def test_forward_and_gradients(rows, channels, outputs, dtype, weight_dtype, kernels):
    tensors = inputs(rows, channels, outputs, 8, dtype, weight_dtype)
    grad_y = torch.randn(rows, outputs)
    got = {}
    names = names_of_kernels(
        kernels["module"], lambda: got.update(launch(native, tensors, grad_y, **kernels))
    )
    assert "hopper_forward_kernel" in names
    assert ("hopper_weight_kernel" in names) == (outputs % 8 == 0)
    assert "u_kernel" in names  # which also has the gradient of the grid
    check(got, tensors, grad_y)


def with_a_fixed_grid(tensors, grad_y, params=PARAMS, **kernels):
    """y and all gradients but that of the grid."""
    rows, outputs = grad_y.shape
    y = torch.full((rows, outputs), float("nan"), dtype=tensors["weight"].dtype)
    mean, rstd = torch.empty(rows), torch.empty(rows)
    native.forward(y, mean, rstd, *tensors.values(), *params, **kernels)
    grads = {name: torch.full_like(t, float("nan")) for name, t in tensors.items() if name != "grid"}
    native.backward(
        *grads.values(),
        *(None, grad_y.to(y.dtype), None, None, y, mean, rstd),
        *tensors.values(),
        *params,
        **kernels,
    )
    return {"y": y, **grads}


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "outputs"),
    [(192, 32, 64), (200, 40, 72), (70, 8, 200), (1, 72, 8), (400, 16, 256)],
)
def test_gradients_with_a_fixed_grid(rows, channels, outputs, dtype, weight_dtype, kernels):
    tensors = inputs(rows, channels, outputs, 8, dtype, weight_dtype)
    grad_y, got = torch.randn(rows, outputs), {}
    names = names_of_kernels(
        kernels["module"], lambda: got.update(with_a_fixed_grid(tensors, grad_y, **kernels))
    )
    assert "hopper_u_kernel" in names
    check(got, tensors, grad_y, fixed="grid")


@pytest.mark.parametrize(
    ("grid", "inverse"),
    [
        (torch.linspace(-30, 30, 8), 1 / 0.33),
        (torch.linspace(-2, 2, 8), 0.01),
        (torch.linspace(-5, 5, 8), 2.0),
    ],
    ids=["wide", "broad functions", "up to the bound"],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_gradients_with_any_fixed_grid(grid, inverse, dtype, spread, kernels):
    tensors = {**inputs(50, 16, 24, 8, dtype, spread=spread), "grid": grid}
    grad_y, params = torch.randn(50, 24), (inverse, 1e-5)
    check(with_a_fixed_grid(tensors, grad_y, params, **kernels), tensors, grad_y, params, "grid")


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:3])
def test_every_schedule_gives_the_same(dtype, weight_dtype, kernels):
    tensors, grad_y = inputs(70, 40, 144, 8, dtype, weight_dtype), torch.randn(70, 144)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = with_a_fixed_grid(tensors, grad_y, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@pytest.mark.parametrize(
    ("grid", "inverse"),
    [
        (torch.linspace(-30, 30, 8), 1 / 0.33),
        (torch.tensor([2.0, -0.5, 0.0, 0.0, 7.0, 1.0, -1.0, -7.0]), 1.0),
        (torch.linspace(-2, 2, 8), 40.0),
        (torch.linspace(-2, 2, 8), 0.01),
        (torch.linspace(-5, 5, 8), 2.0),
    ],
    ids=["wide", "unsorted", "narrow functions", "broad functions", "up to the bound"],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_any_grid(grid, inverse, dtype, spread, kernels):
    tensors = {**inputs(50, 16, 20, len(grid), dtype, spread=spread), "grid": grid}
    grad_y = torch.randn(50, 20)
    params = (inverse, 1e-5)
    check(launch(native, tensors, grad_y, params, **kernels), tensors, grad_y, params)


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_far_from_the_grid(dtype, weight_dtype, shift, kernels):
    tensors = inputs(40, 24, 20, dtype=dtype, weight_dtype=weight_dtype)
    tensors["ln_bias"] += shift  # where every function is 0
    got = launch(native, tensors, torch.randn(40, 20), **kernels)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert got["y"].float().abs().max() < 1e-12


def test_nan_stays_in_its_row(kernels):
    tensors = inputs(40, 24, 20, dtype=BF16)
    tensors["x"][3, 5] = float("nan")
    y = launch(native, tensors, torch.ones(40, 20), **kernels)["y"]
    assert y[3].isnan().all()
    assert y[torch.arange(40) != 3].isfinite().all()


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:3])
@pytest.mark.parametrize("name", ["x", "weight", "grad_y"])
def test_rows_that_are_not_aligned_but_for_the_first(name, dtype, weight_dtype, kernels):
    tensors, grad_y = inputs(37, 24, 24, 8, dtype, weight_dtype), torch.randn(37, 24).to(weight_dtype)

    def apart(tensor):
        return tensor.new_empty(len(tensor), tensor.shape[1] + 1)[:, :-1].copy_(tensor)

    if name == "grad_y":
        grad_y = apart(grad_y)
    else:
        tensors[name] = apart(tensors[name])
    got = with_a_fixed_grid(tensors, grad_y, **kernels)
    check(got, tensors, grad_y, fixed="grid")


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES[1:3])
def test_nothing_is_read_or_written_outside(dtype, weight_dtype, kernels):
    guarded, rows, channels, outputs = Guarded(), 37, 24, 24
    plain, layout, padded = inputs(rows, channels, outputs, 8, dtype, weight_dtype), Layout(before=64), {}
    tensors = {name: guarded(tuple(t.shape), t.dtype, layout).copy_(t) for name, t in plain.items()}
    for name in ("x", "weight"):
        shape = (1, 1, *plain[name].shape)
        padded[name] = guarded(shape, plain[name].dtype, Layout(padding=8, before=64))[0, 0].copy_(
            plain[name]
        )
    tensors.update(padded)
    grad_y = guarded((rows, outputs), weight_dtype, layout).copy_(torch.randn(rows, outputs))
    want = with_a_fixed_grid(plain, grad_y, **kernels)
    y = guarded((rows, outputs), weight_dtype, layout)
    mean, rstd = guarded((rows,), F32), guarded((rows,), F32)
    native.forward(y, mean, rstd, *tensors.values(), *PARAMS, **kernels)
    grads = {
        name: guarded(tuple(plain[name].shape), plain[name].dtype, layout) for name in want if name != "y"
    }
    native.backward(
        *grads.values(),
        *(None, grad_y, None, None, y, mean, rstd),
        *tensors.values(),
        *PARAMS,
        **kernels,
    )
    guarded.check()
    for name, got in {"y": y, **grads}.items():
        assert torch.equal(got, want[name]), name


@pytest.mark.gpu
def test_a_threads_first_call_of_cuda_may_be_a_backward_pass(monkeypatch):
    """The driver makes a map of a matrix only where a context is current, which in a thread of autograd none is yet."""
    monkeypatch.setattr(REGISTRY["kan_linear"], "like", torch.empty_like)  # to poison memory is a call too
    tensors = {name: t.cuda() for name, t in inputs(256, 64, 128, dtype=BF16).items()}
    leaves = [t.requires_grad_() for name, t in tensors.items() if name != "grid"]
    y = ops.kan_linear(*tensors.values(), backend="cuda")
    grad_y, got = torch.randn_like(y), []

    def gradients():
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    want = [t.clone() for t in gradients()]  # whose own memory the thread then finds free
    thread = threading.Thread(target=lambda: got.extend(gradients()))
    thread.start()
    thread.join()
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))
