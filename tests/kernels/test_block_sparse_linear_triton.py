"""The Triton kernels of block_sparse_linear in Triton's interpreter, against the dense masked layer.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_block_sparse_linear_triton.py`. bfloat16 is left to GPUs: tl.dot on it is
wrong in the interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from block_sparse_calls import NAMES, Call, check, launch, pattern, plain
from guarded import Guarded, Layout

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from gpu_sums import assert_shorter_sums, sum_as_a_gpu

from vitkernels import BlockSparseTensor, ops, supported_backends
from vitkernels.kernels.block_sparse_linear import triton as launcher

F32, F16 = torch.float32, torch.float16
DTYPES = [pytest.param(F32, id="fp32"), pytest.param(F16, id="fp16")]
CASES = [  # tokens, matrix, block, activation: partial blocks but for one, rows and columns without blocks
    (50, (70, 90), (16, 16), "gelu"),
    (7, (128, 96), (32, 32), "relu"),
    (1, (200, 150), (64, 64), "none"),
    (50, (100, 200), (32, 64), "gelu"),
    (7, (130, 70), (64, 32), "none"),
    (7, (130, 250), (128, 128), "gelu"),
]


def tiles(monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    """The tiles for few or many tokens, whatever their number. fp32 has one set."""
    monkeypatch.setattr(launcher, "PROGRAMS", 0 if many else 10**9)


@pytest.mark.parametrize(
    ("dtype", "many", "transposed"),
    [
        pytest.param(F32, False, False, id="fp32"),
        pytest.param(F32, False, True, id="fp32 transposed", marks=pytest.mark.thorough),
        pytest.param(F16, False, True, id="fp16 transposed few"),
        pytest.param(F16, False, False, id="fp16 few", marks=pytest.mark.thorough),
        pytest.param(F16, True, False, id="fp16 many"),
        pytest.param(F16, True, True, id="fp16 transposed many", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize(("tokens", "shape", "block", "activation"), CASES)
def test_forward_and_gradients(tokens, shape, block, activation, dtype, many, transposed, monkeypatch):
    tiles(monkeypatch, many)
    call = Call(tokens, pattern(shape, block), dtype, activation, transposed)
    check(launch(launcher, call), call)


def random_pattern(seed: int) -> BlockSparseTensor:
    block = [(16, 16), (32, 16), (16, 32), (32, 32)][seed % 4]
    rows, columns = (int(n) for n in torch.randint(1, 8, (2,)))
    shape = (rows * block[0] - int(torch.randint(block[0], ())), columns * block[1] - seed)
    rate = torch.rand(rows, 1) * torch.rand(1, columns) * 2  # lines of very different population
    return pattern(shape, block, mask=(torch.rand(rows, columns) < rate).index_fill(0, torch.tensor(0), True))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.thorough) for n in range(2, 12))])
def test_uneven_patterns(seed, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setattr(launcher, "CHUNK", 4)  # lists that are made in several chunks
    call = Call(20, random_pattern(seed), F32 if seed % 2 else F16, "gelu")
    check(launch(launcher, call), call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_and_no_blocks(dtype):
    full = Call(9, pattern((64, 80), (16, 16), mask=torch.ones(4, 5)), dtype)
    check(launch(launcher, full), full)
    empty = Call(9, pattern((64, 80), (16, 16), mask=torch.zeros(4, 5)), dtype, "relu")
    got = launch(launcher, empty)
    assert torch.equal(got["y"], empty.bias.relu().expand(9, 64))
    assert (got["x"] == 0).all()
    assert got["values"].shape == (0, 16, 16)


def test_shares_of_tokens_add_up(monkeypatch):
    call = Call(260, pattern((24, 32), (16, 16), 0.7), F16, "relu")
    check(launch(launcher, call), call)
    monkeypatch.setattr(launcher, "GRADIENT_PROGRAMS", 1)
    check(launch(launcher, call), call)


@pytest.mark.parametrize(
    ("tokens", "shape", "name"),
    [(1, (32, 384), "y"), (1, (384, 32), "x"), (384, (16, 16), "values")],
    ids=["inputs", "outputs", "tokens"],
)
def test_long_sums_are_made_in_parts(tokens, shape, name, monkeypatch):
    """A layer of 768 inputs and one chain for each output erred 1.5 times what is allowed on a GPU."""
    sum_as_a_gpu(monkeypatch)
    monkeypatch.setattr(launcher, "GRADIENT_PROGRAMS", 1)
    block = (min(32, shape[0]), min(32, shape[1]))
    mask = torch.ones(shape[0] // block[0], shape[1] // block[1])
    call = Call(tokens, pattern(shape, block, mask=mask))
    got = launch(launcher, call)
    check(got, call)
    assert_shorter_sums(name, got, lambda: plain(call, F32), plain(call, torch.float64), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_or_written_outside(dtype, monkeypatch):
    tiles(monkeypatch, many=True)
    guarded, call = Guarded(), Call(37, pattern((70, 90), (16, 32)), dtype, "gelu")
    scratch = lambda like, *shape, dtype=F32: (  # noqa: E731
        guarded(shape, dtype) if dtype is F32 else torch.full(shape, -(10**9), dtype=dtype)
    )
    monkeypatch.setattr(launcher, "_scratch", scratch)
    call.values[call.beyond()] = float("nan")
    want = launch(launcher, call)
    assert all(torch.isfinite(t).all() for t in want.values())
    tensors = {name: guarded(getattr(call, name).shape, dtype, "offset") for name in NAMES}
    tensors["x"] = guarded((1, 1, *call.x.shape), dtype, Layout(padding=7, before=65))[0, 0]
    grad = guarded((1, 1, *call.grad.shape), dtype, Layout(padding=3, before=65))[0, 0].copy_(call.grad)
    for name, tensor in tensors.items():
        tensor.copy_(getattr(call, name))
    y, before = guarded(call.grad.shape, dtype), guarded(call.grad.shape, dtype)
    launcher.forward(y, before, *tensors.values(), *call.params)
    grads = {name: guarded(tensor.shape, dtype, "offset") for name, tensor in tensors.items()}
    inputs = (*tensors.values(), *call.params)
    launcher.backward(*grads.values(), None, grad, None, y, before, *inputs)
    guarded.check()
    for name, got in ({"y": y} | grads).items():
        assert torch.equal(got, want[name]), name


@pytest.mark.parametrize(
    ("wanted", "activation"),
    [(("x",), "none"), (("values",), "relu"), (("bias",), "none"), (("bias",), "relu")],
)
def test_each_gradient_alone(wanted, activation):
    call = Call(20, pattern((40, 48), (16, 16)), activation=activation)
    want, got = launch(launcher, call), launch(launcher, call, wanted)
    assert set(got) == {"y", *wanted}
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_strided_gradients_are_filled():
    call = Call(20, pattern((40, 48), (16, 16)))
    want, y = launch(launcher, call), torch.empty(20, 40)
    grad_x = torch.full((48, 20), float("nan")).T
    grad_values = torch.full(call.values.shape, float("nan")).mT.contiguous().mT
    inputs = (call.x.T.contiguous().T, call.values, call.bias, *call.params)
    launcher.forward(y, None, *inputs)
    launcher.backward(grad_x, grad_values, None, None, call.grad.T.contiguous().T, None, y, y[:, :0], *inputs)
    for name, got in (("y", y), ("x", grad_x), ("values", grad_values)):
        assert torch.equal(got, want[name]), name


def test_ten_runs_agree_bit_for_bit():
    call = Call(7, pattern((24, 32), (16, 16)), F16, "gelu")
    first = launch(launcher, call)
    for _ in range(9):
        again = launch(launcher, call)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_public_function_runs_the_kernels():
    weight = pattern((40, 48), (16, 16))
    x, bias = torch.randn(2, 3, 5, 48, requires_grad=True), torch.randn(40)
    got = {}
    for backend in ("triton", "reference"):
        y = ops.block_sparse_linear(x, weight, bias, activation="gelu", backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        got[backend] = (y, grad)
    torch.testing.assert_close(got["triton"], got["reference"])
    assert ops.block_sparse_linear(x[:0], weight, bias, backend="triton").shape == (0, 3, 5, 40)


def test_blocks_that_the_kernels_do_not_take():
    weight = pattern((40, 48), (8, 16))
    reasons = supported_backends("block_sparse_linear", torch.randn(2, 48), weight)["triton"]
    assert reasons == ["blocks are 8 x 16; the sides it takes are 16, 32, 64 and 128"]


def test_a_wrong_kernel_fails_the_rule():
    call = Call(20, pattern((40, 48), (16, 16)), activation="gelu")
    got = launch(launcher, call)
    check(got, call)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-5)}, call)
    with pytest.raises(AssertionError, match="beyond the matrix"):
        check({**got, "values": got["values"].where(~call.beyond(), 1e-30)}, call)
