"""The CUDA kernels of polyline_path_scan, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import Guarded
from polyline_calls import DECAYS, check, gradient_like, launch, scan_inputs, strided

from vitkernels.kernels.polyline_path_scan import native, operator

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    pytest.param(F64, F64, id="fp64"),
    pytest.param(F32, F32, id="fp32"),
    pytest.param(F16, F16, id="fp16"),
    pytest.param(BF16, BF16, id="bf16"),
    pytest.param(F16, F32, id="fp16-fp32"),
    pytest.param(BF16, F32, id="bf16-fp32"),
]
# One token, lines, whole and broken segments; one channel, pairs and odd numbers of them, more than a warp has.
SHAPES = [
    (1, 1, 3),
    (1, 9, 4),
    (9, 1, 2),
    (3, 4, 5),
    (7, 7, 16),
    (8, 16, 1),
    (5, 17, 38),
    (2, 3, 96),
    (3, 2, 33),
]
each_transpose = pytest.mark.parametrize("transpose", [False, True])


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


@each_transpose
@pytest.mark.parametrize(("dtype", "decay_dtype"), DTYPES)
@pytest.mark.parametrize(("height", "width", "d"), SHAPES)
def test_forward_and_gradients(height, width, d, dtype, decay_dtype, transpose, kernels):
    tensors = scan_inputs(2, height, width, 2, d, dtype, decay_dtype)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, transpose, **kernels), tensors, grad, transpose)


@each_transpose
@pytest.mark.parametrize(("height", "width"), [(2, 420), (420, 2)])
def test_long_lines_take_smaller_blocks(height, width, transpose, kernels):
    tensors = scan_inputs(1, height, width, 1, 2)
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, transpose, **kernels), tensors, grad, transpose)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_longest_lines_fit_the_smallest_shared_memory(dtype, kernels):
    """The limit was once that of lines whose heads a warp has at once: on sm_86, sm_89 and sm_120 wider ones failed."""
    reasons = operator.backends["cuda"].limits
    (longest,) = (
        n
        for n in range(8, 4096, 8)
        if not reasons(torch.empty(1, 1, n)) and reasons(torch.empty(1, 1, n + 8))
    )
    tensors = scan_inputs(1, 1, longest, 1, 70, dtype, dtype)
    # Of few digits: the definition's sums of so many decays would be off by as much as is allowed in float64.
    tensors |= {name: tensors[name].float().to(dtype) for name in DECAYS}
    grad = gradient_like(tensors)
    check(launch(native, tensors, grad, False, **kernels), tensors, grad, False)


@each_transpose
def test_strong_decay(transpose, kernels):
    for rate in (50.0, 200.0):
        tensors = scan_inputs(1, 5, 6, 2, 4)
        tensors |= {name: torch.full_like(t, -rate) for name, t in tensors.items() if name != "x"}
        grad = gradient_like(tensors)
        got = launch(native, tensors, grad, transpose, **kernels)
        if rate < 100:
            check(got, tensors, grad, transpose)
        else:
            assert torch.equal(got["out"], tensors["x"])
            assert not got["log_decay_w"].any()


@each_transpose
@pytest.mark.parametrize("d", [6, 70])
def test_every_schedule_gives_the_same(d, transpose, kernels):
    tensors = scan_inputs(1, 6, 11, 2, d)
    grad = gradient_like(tensors)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch(native, tensors, grad, transpose, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@each_transpose
def test_strided_inputs(transpose, kernels):
    tensors = scan_inputs(2, 4, 6, 3, 8)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, transpose, **kernels)
    for label, views in strided(tensors):
        upstream = grad.movedim(3, 1).contiguous().movedim(1, 3)
        got = launch(native, views, upstream, transpose, **kernels)
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize(("dtype", "decay_dtype"), DTYPES[1:3])
@each_transpose
def test_nothing_is_read_or_written_outside(transpose, dtype, decay_dtype, kernels):
    guarded, plain = Guarded(), scan_inputs(1, 3, 5, 2, 14, dtype, decay_dtype)
    grad = gradient_like(plain)
    want = launch(native, plain, grad, transpose, **kernels)
    for layout in ("dense", "offset", "odd"):
        tensors = {name: guarded(tuple(t.shape), t.dtype, layout).copy_(t) for name, t in plain.items()}
        out, upstream = guarded(grad.shape, dtype), guarded(grad.shape, dtype).copy_(grad)
        grads = {name: guarded(tuple(t.shape), t.dtype, layout) for name, t in plain.items()}
        native.forward(out, *tensors.values(), transpose, **kernels)
        native.backward(*grads.values(), upstream, out, *tensors.values(), transpose, **kernels)
        guarded.check()
        torch.testing.assert_close(out, want["out"])
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, want[name])


@pytest.mark.parametrize(
    "wanted", ["x", "log_decay_w", "log_decay_h", "x log_decay_w", "x log_decay_h", "log_decay_w log_decay_h"]
)
@each_transpose
def test_each_gradient_alone(transpose, wanted, kernels):
    tensors = scan_inputs(1, 5, 4, 2, 6)
    grad = gradient_like(tensors)
    want = launch(native, tensors, grad, transpose, **kernels)
    grads = {n: torch.full_like(t, float("nan")) if n in wanted.split() else None for n, t in tensors.items()}
    native.backward(*grads.values(), grad, want["out"], *tensors.values(), transpose, **kernels)
    for name, gradient in grads.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, want[name])


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from polyline_calls import gradient_like, launch, scan_inputs\n"
        "from vitkernels.kernels.polyline_path_scan import native\n"
        "for dtype in (torch.float64, torch.float32, torch.float16):\n"
        "    for shape in ((3, 5, 7), (9, 2, 40)):\n"
        "        for transpose in (False, True):\n"
        "            tensors = scan_inputs(1, *shape[:2], 2, shape[2], dtype)\n"
        "            launch(native, tensors, gradient_like(tensors), transpose, module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("polyline_path_mask", "polyline_path_scan"))
    assert done.returncode == 0, done.stderr[-4000:]


@each_transpose
def test_a_wrong_kernel_fails_the_rule(transpose, kernels):
    tensors = scan_inputs(1, 5, 6, 2, 8)
    grad = gradient_like(tensors)
    got = launch(native, tensors, grad, transpose, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-3)}, tensors, grad, transpose)
