"""The CPU kernels of block_sparse_linear against the dense masked layer in float64."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import Call, check, launch, pattern
from guarded import Guarded, Layout

from vitkernels import BlockSparseTensor, ops
from vitkernels.core import native as extension
from vitkernels.kernels.block_sparse_linear import native

pytestmark = pytest.mark.skipif(
    not extension.holds("block_sparse_linear"), reason="the extension was built without block_sparse_linear"
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (O, I), block: whole and partial blocks, every number of vectors in a panel, the models' blocks
SHAPES = [
    ((64, 96), (32, 32)),
    ((70, 50), (32, 16)),
    ((33, 17), (16, 32)),
    ((5, 7), (2, 3)),
    ((48, 40), (48, 8)),
    ((130, 200), (128, 128)),
    ((96, 192), (64, 32)),
    ((96, 192), (32, 64)),
    ((64, 48), (16, 16)),
    ((41, 600), (8, 600)),
    ((40, 620), (8, 250)),  # rows of several blocks longer than a chain of sums, the last one shorter
]


@pytest.mark.parametrize("tokens", [1, 7, 197])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_shapes(shape, block, tokens):
    call = Call(tokens, pattern(shape, block))
    check(launch(native, call), call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dtypes_and_activations(dtype, activation, transposed):
    call = Call(61, pattern((70, 50), (32, 16)), dtype, activation, transposed)
    check(launch(native, call), call)


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_of_a_model(bias):
    call = Call(197 * 8, pattern((384, 384), (32, 32)), bias=bias)
    check(launch(native, call), call)


def test_many_tokens_and_blocks_of_no_whole_vectors():
    """What earlier slices of tokens summed is read back in rows that are cut off."""
    call = Call(1000, pattern((70, 51), (14, 12)))
    check(launch(native, call), call)


def test_half_sums_over_many_tokens_are_rounded_once():
    call = Call(8000, pattern((70, 50), (32, 16)), torch.bfloat16)
    got = launch(native, call)
    check(got, call)
    assert torch.equal(launch(native, call, ("bias",))["bias"], got["bias"]), "rounded as often alone"


def test_a_strided_index_is_read_from_a_copy_that_is_still_there():
    """The copy was once freed before the kernels read it, which ended the process or took whatever lay there."""
    weight = pattern((2048, 1024), (32, 32))
    index = torch.stack([weight.index, weight.index], 1)[:, 0]
    strided = BlockSparseTensor.wrap(weight.values, index, weight.shape)
    x = torch.randn(7, 1024)
    assert torch.equal(ops.block_sparse_linear(x, strided), ops.block_sparse_linear(x, weight))
    seed = torch.randn(7, 2048)
    got, wanted = (
        torch.autograd.grad(ops.block_sparse_linear(leaf, sparse), leaf, seed)[0]
        for leaf, sparse in ((x.clone().requires_grad_(), strided), (x.clone().requires_grad_(), weight))
    )
    assert torch.equal(got, wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("tokens", [1, 7, 197, 198, 197 * 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_every_shape_in_every_dtype(shape, block, dtype, tokens):
    call = Call(tokens, pattern(shape, block), dtype, "gelu")
    check(launch(native, call), call)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all_blocks(density):
    weight = pattern((70, 50), (32, 16), density, holes=False)
    assert weight.density == density
    call = Call(20, weight, activation="gelu")
    got = launch(native, call)
    if density:
        check(got, call)
        return
    torch.testing.assert_close(got["y"], torch.nn.functional.gelu(call.bias).expand(20, 70))
    assert (got["x"] == 0).all()
    assert got["values"].numel() == 0


def test_empty_rows_and_columns_are_exact():
    weight = pattern((96, 128), (32, 32))
    assert (weight.crow_indices.diff() == 0).any()
    assert (weight.crow_t.diff() == 0).any()
    call = Call(20, weight)
    got = launch(native, call)
    for row in (weight.crow_indices.diff() == 0).nonzero().flatten().tolist():
        part = slice(32 * row, 32 * row + 32)
        assert torch.equal(got["y"][:, part], call.bias[part].expand(20, 32))
    for column in (weight.crow_t.diff() == 0).nonzero().flatten().tolist():
        assert (got["x"][:, 32 * column : 32 * column + 32] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_no_tokens(transposed):
    weight = pattern((70, 50), (32, 16))
    x = torch.zeros(0, 70 if transposed else 50, requires_grad=True)
    weight.values.requires_grad_()
    y = ops.block_sparse_matmul(x, weight, transpose=not transposed)
    assert y.shape == (0, 50 if transposed else 70)
    y.sum().backward()
    assert (weight.values.grad == 0).all()
    got = launch(native, Call(0, pattern((70, 50), (32, 16))))  # into memory that is not zero before
    assert (got["values"] == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3.0])
def test_what_lies_beyond_the_matrix_is_used_for_nothing(junk):
    call = Call(20, pattern((70, 50), (32, 16)), activation="relu")
    want = launch(native, call)
    beyond = call.beyond()
    assert beyond.any()
    call.values[beyond] = junk
    got = launch(native, call)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert (got["values"][beyond] == 0).all()
    call.x[3, 4] = call.grad[5] = float("inf")
    assert (launch(native, call)["values"][beyond] == 0).all()


@pytest.mark.parametrize("where", ["x", "values", "bias"])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_nan_reaches_what_it_meets_and_nothing_else(where, activation):
    call = Call(20, pattern((64, 96), (32, 32)), activation=activation)
    clean = launch(native, call)["y"]
    getattr(call, where).view(-1)[5] = float("nan")  # of x: a column with blocks
    y = launch(native, call)["y"]
    stored = call.weight.with_values(torch.ones_like(call.values)).to_dense()
    row = int(call.weight.row_indices[0]) * 32
    want = torch.zeros_like(y, dtype=torch.bool)
    if where == "x":
        want[0] = stored[:, 5] == 1
    else:
        want[:, row if where == "values" else 5] = True
    assert want.any()
    assert torch.equal(y.isnan(), want)
    assert torch.equal(y[~want], clean[~want])


def test_the_gradient_passes_a_relu_of_nan():
    """As in PyTorch, so that a loss does not look stationary where it is not a number."""
    call = Call(20, pattern((64, 96), (32, 32)), activation="relu")
    call.bias[5] = float("nan")
    torch.testing.assert_close(launch(native, call)["bias"][5], call.grad[:, 5].sum())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("skewed", [False, True])
def test_threads_change_no_bit(threads, skewed):
    mask = torch.zeros(12, 12)
    mask[3] = mask[:, 2] = mask[11, 4:] = 1
    weight = pattern((384, 384), (32, 32), mask=mask if skewed else None)
    call = Call(197, weight, activation="gelu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch(native, call)
        torch.set_num_threads(threads)
        for _ in range(10 if threads == 2 else 1):
            got = launch(native, call)
            for name, tensor in want.items():
                assert torch.equal(got[name], tensor), name
    finally:
        torch.set_num_threads(before)


def test_a_block_on_the_border_of_two_shares_is_summed_once():
    """The second of two blocks, for two threads; to what earlier slices of tokens gave it is added once."""
    call = Call(1000, pattern((128, 32), (32, 32), mask=torch.tensor([[1], [1], [0], [0]])))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(launch(native, call), call)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("either_wall")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_read_or_written_outside(dtype, transposed):
    guarded, call = Guarded(walls=True), Call(29, pattern((70, 50), (32, 16)), dtype, "gelu", transposed)
    want = launch(native, call)
    index, *options = call.params
    index = guarded(tuple(index.shape), index.dtype).copy_(index)
    values = guarded(tuple(call.values.shape), dtype, "offset").copy_(call.values)
    bias = guarded(tuple(call.bias.shape), dtype, "offset").copy_(call.bias)
    taken, given = call.x.shape[1], call.grad.shape[1]
    # rows as views into wider ones
    x = guarded((1, 1, 29, taken), dtype, Layout(padding=7, before=65))[0, 0].copy_(call.x)
    grad = guarded((1, 1, 29, given), dtype, Layout(padding=3, before=65))[0, 0].copy_(call.grad)
    y, before = (guarded((29, given), dtype, "offset") for _ in range(2))
    native.forward(y, before, x, values, bias, index, *options)
    grads = {name: guarded(tuple(t.shape), dtype, "offset") for name, t in want.items() if name != "y"}
    native.backward(*grads.values(), None, grad, None, y, before, x, values, bias, index, *options)
    guarded.check()
    assert torch.equal(y, want["y"])
    for name, tensor in grads.items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "bias")])
def test_each_gradient_alone(wanted):
    call = Call(40, pattern((70, 50), (32, 16)), activation="gelu")
    want = launch(native, call)
    got = launch(native, call, wanted)
    assert set(got) == {"y", *wanted}
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_at_its_ends(dtype):
    """By the bias alone: every magnitude, both infinities, NaN."""
    weight = pattern((512, 16), (16, 16), 0.0, holes=False)
    call = Call(1, weight, dtype, "gelu")
    call.bias[:250] = -torch.logspace(-8, 3, 250)
    call.bias[250:500] = torch.logspace(-8, 3, 250)
    call.bias[500:503] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    got, want = launch(native, call)["y"][0], torch.nn.functional.gelu(call.bias.double())
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=8 * ulp, atol=2 * ulp, equal_nan=True)


def test_a_wrong_kernel_fails_the_rule():
    call = Call(49, pattern((64, 96), (32, 32)), activation="gelu")
    got = launch(native, call)
    for name in got:
        wrong = {**got, name: got[name] * (1 + 2e-5)}
        with pytest.raises(AssertionError):
            check(wrong, call)


def test_the_public_function_takes_the_kernels():
    call = Call(49, pattern((64, 96), (32, 32)), activation="gelu")
    got = ops.block_sparse_linear(call.x, call.weight, call.bias, activation="gelu")
    assert torch.equal(got, launch(native, call)["y"])
