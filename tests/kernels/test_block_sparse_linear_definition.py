"""The contract itself: the matrix and its index, golden values, and identities that every kernel must keep."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from vitkernels import BlockSparseTensor, ops, supported_backends

# O = 5, I = 7, blocks 2 x 3: the last block row and column are partial, block row 1 is empty.
CROW, COL = [0, 2, 2, 4], [0, 2, 0, 1]
DENSE = [
    [1.00, 1.01, 1.02, 0, 0, 0, 2.0],
    [1.10, 1.11, 1.12, 0, 0, 0, 2.1],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [3.00, 3.01, 3.02, 4.00, 4.01, 4.02, 0],
]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (64, 32)]
BACKENDS = ["reference", None]


def golden(dtype: torch.dtype = torch.float64) -> BlockSparseTensor:
    p, a, c = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(3), indexing="ij")
    values = (p + 1).to(dtype) + 0.1 * a.to(dtype) + 0.01 * c.to(dtype)
    values[1, :, 1:] = values[2:, 1] = 0
    return BlockSparseTensor(values, torch.tensor(CROW), torch.tensor(COL), (5, 7))


def random(shape: tuple[int, int], block: tuple[int, int], density: float = 0.5) -> BlockSparseTensor:
    """Uniform, with an empty block row and column."""
    mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < density
    mask[-1] = mask[:, 0] = False
    return BlockSparseTensor.from_dense(torch.randn(shape, dtype=torch.float64), block, mask)


def element_mask(weight: BlockSparseTensor) -> torch.Tensor:
    return weight.with_values(torch.ones_like(weight.values)).to_dense()


def test_golden_index():
    weight = golden()
    assert weight.crow_indices.tolist() == CROW
    assert weight.col_indices.tolist() == COL
    assert weight.row_indices.tolist() == [0, 0, 2, 2]
    assert weight.crow_t.tolist() == [0, 2, 3, 4]
    assert weight.row_t.tolist() == [0, 2, 2, 0]
    assert weight.perm_t.tolist() == [0, 2, 3, 1]
    assert (weight.block_shape, weight.grid, weight.nnz) == ((2, 3), (3, 3), 4)
    assert weight.density == pytest.approx(4 / 9)
    torch.testing.assert_close(weight.to_dense(), torch.tensor(DENSE, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend):
    weight = golden()
    values = weight.values.requires_grad_()
    x = torch.stack([torch.arange(1.0, 8.0), (-1.0) ** torch.arange(7)]).double().requires_grad_()
    bias = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)
    y = ops.block_sparse_linear(x, weight, bias, backend=backend)
    want = [[20.58, 21.88, 0.5, 0.5, 78.75], [3.51, 3.71, 0.5, 0.5, -0.5]]
    torch.testing.assert_close(y, torch.tensor(want, dtype=torch.float64))
    y.backward(torch.tensor([[1, 2, 3, 4, 5], [-1, 0, 1, 0, -1]], dtype=torch.float64))
    want_x = [[18.2, 18.28, 18.36, 20.0, 20.05, 20.1, 6.2], [-4.0, -4.02, -4.04, -4.0, -4.01, -4.02, -2.0]]
    torch.testing.assert_close(x.grad, torch.tensor(want_x, dtype=torch.float64))
    want_values = [
        [[0, 3, 2], [2, 4, 6]],
        [[6, 0, 0], [14, 0, 0]],
        [[4, 11, 14], [0, 0, 0]],
        [[21, 24, 31], [0, 0, 0]],
    ]
    assert torch.equal(values.grad, torch.tensor(want_values, dtype=torch.float64))
    assert torch.equal(bias.grad, torch.tensor([0, 2, 4, 4, 4], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [(2, 3), (4, 4), (32, 16)])
def test_euler_identities(backend, block):
    """<dV, V> = <dx, x> = <dy, y - b>; each stored block's gradient is that block of dy^T x."""
    weight = random((50, 70), block)
    values = weight.values.requires_grad_()
    x = torch.randn(11, 70, dtype=torch.float64, requires_grad=True)
    bias, grad = torch.randn(50).double(), torch.randn(11, 50).double()
    y = ops.block_sparse_linear(x, weight, bias, backend=backend)
    grad_x, grad_values = torch.autograd.grad(y, (x, values), grad)
    want = (grad * (y - bias)).sum()
    torch.testing.assert_close((grad_values * values).sum(), want)
    torch.testing.assert_close((grad_x * x).sum(), want)
    blocks = weight.with_values(grad_values).to_dense()
    torch.testing.assert_close(blocks, element_mask(weight) * (grad.T @ x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_x_is_the_map_of_the_transpose(backend):
    weight = random((50, 70), (8, 16))
    x, grad = torch.randn(7, 70).double().requires_grad_(), torch.randn(7, 50).double()
    (got,) = torch.autograd.grad(ops.block_sparse_linear(x, weight, backend=backend), x, grad)
    transpose = BlockSparseTensor.from_dense(weight.to_dense().T, (16, 8))
    torch.testing.assert_close(got, ops.block_sparse_linear(grad, transpose, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_and_no_blocks(backend):
    dense, x, bias = torch.randn(24, 40), torch.randn(5, 40), torch.randn(24)
    full = BlockSparseTensor.from_dense(dense, 8)
    assert full.density == 1
    got = ops.block_sparse_linear(x, full, bias, activation="gelu", backend=backend)
    torch.testing.assert_close(got, F.gelu(F.linear(x, dense, bias)))
    empty = BlockSparseTensor.from_dense(dense, 8, torch.zeros(3, 5))
    assert (empty.nnz, empty.density) == (0, 0)
    x.requires_grad_()
    y = ops.block_sparse_linear(x, empty, bias, backend=backend)
    assert torch.equal(y, bias.expand(5, 24))
    y.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transpose", [False, True])
def test_matmul_on_both_sides(backend, transpose):
    weight = random((50, 70), (8, 16))
    weight.values.requires_grad_()
    dense = weight.to_dense().detach()
    right = torch.randn(3, 50 if transpose else 70, 6).double().requires_grad_()
    got = ops.block_sparse_matmul(weight, right, transpose=transpose, backend=backend)
    torch.testing.assert_close(got, (dense.T if transpose else dense) @ right)
    left = torch.randn(3, 6, 70 if transpose else 50).double().requires_grad_()
    got = ops.block_sparse_matmul(left, weight, transpose=transpose, backend=backend)
    torch.testing.assert_close(got, left @ (dense.T if transpose else dense))
    assert torch.autograd.gradcheck(
        lambda d, v: ops.block_sparse_matmul(d, weight.with_values(v), transpose=transpose, backend=backend),
        (left[:1], weight.values),
        fast_mode=True,
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(256, 384), (250, 300)])
def test_conversions(shape, block):
    dense = torch.randn(shape)
    mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < 0.6
    weight = BlockSparseTensor.from_dense(dense, block, mask)
    spread = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    assert torch.equal(weight.to_dense(), dense * spread)
    assert torch.equal(element_mask(weight), spread.float())
    for other in (
        BlockSparseTensor.from_masked(dense, spread.float(), block),
        BlockSparseTensor.from_masked(dense[:, :, None, None], spread[:, :, None, None], block),
        BlockSparseTensor(weight.values, weight.crow_indices, weight.col_indices.long(), shape),
        BlockSparseTensor.from_dense(weight.to_dense(), block),
        pickle.loads(pickle.dumps(weight)),
        copy.deepcopy(weight),
    ):
        assert torch.equal(other.values, weight.values)
        assert torch.equal(other.index, weight.index)
        assert (other.shape, other.block_shape) == (weight.shape, weight.block_shape)

    rows, columns = weight.row_indices, weight.col_indices
    assert torch.equal(weight.perm_t.sort().values, torch.arange(weight.nnz, dtype=torch.int32))
    assert torch.equal(weight.row_t, rows[weight.perm_t])
    for column in range(weight.grid[1]):
        own = weight.perm_t[weight.crow_t[column] : weight.crow_t[column + 1]]
        assert (columns[own] == column).all()
        assert (rows[own].diff() > 0).all()


@pytest.mark.parametrize("block", [(16, 16), (32, 64)])
def test_round_trip_through_torch_bsr(block):
    dense = torch.randn(128, 192) * (torch.rand(8, 3) < 0.5).repeat_interleave(16, 0).repeat_interleave(64, 1)
    bsr = dense.to_sparse_bsr(block)
    weight = BlockSparseTensor.from_bsr(bsr)
    assert weight.values.data_ptr() == bsr.values().data_ptr()
    assert torch.equal(weight.to_dense(), dense)
    back = weight.to_bsr()
    assert torch.equal(back.values(), bsr.values())
    assert torch.equal(back.crow_indices(), bsr.crow_indices())
    assert torch.equal(back.col_indices(), bsr.col_indices())
    with pytest.raises(ValueError, match=r"to_bsr: expected a shape in whole blocks"):
        golden().to_bsr()


def test_moves_and_copies():
    weight = random((40, 48), (16, 16))
    half = weight.to(torch.bfloat16)
    assert half.dtype is torch.bfloat16
    assert half.index is weight.index
    assert weight.to(torch.float64) is weight
    assert weight.to("meta").index.device.type == "meta"
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).to_dense(), weight.to_dense())
    assert "nnz=" in repr(weight)


def test_gradients_pass_through_the_conversions():
    dense = torch.randn(10, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    weight = BlockSparseTensor.from_dense(dense, (5, 4), mask)
    weight.to_dense().square().sum().backward()
    torch.testing.assert_close(dense.grad, 2 * weight.to_dense())


INDEX = (torch.tensor(CROW), torch.tensor(COL))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda v, c, j: (v[0], c, j, (5, 7)), ValueError, "argument `values`: expected shape [nnz, bh, bw]"),
        (lambda v, c, j: (v.int(), c, j, (5, 7)), TypeError, "argument `values`: expected a floating dtype"),
        (lambda v, c, j: (v, c, j, (5, 7, 1)), TypeError, "argument `shape`: expected 2 ints"),
        (lambda v, c, j: (v, c, j, (0, 7)), ValueError, "argument `shape`: expected 2 positive ints"),
        (lambda v, c, j: (v, c[1:], j, (5, 7)), ValueError, "argument `crow_indices`: expected shape"),
        (lambda v, c, j: (v, c.float(), j, (5, 7)), TypeError, "argument `crow_indices`: expected an int32"),
        (lambda v, c, j: (v, c, j[1:], (5, 7)), ValueError, "argument `col_indices`: expected shape"),
        (lambda v, c, j: (v, c.flip(0), j, (5, 7)), ValueError, "argument `crow_indices`: expected numbers"),
        (lambda v, c, j: (v, c * 2, j, (5, 7)), ValueError, "argument `crow_indices`: expected numbers"),
        (lambda v, c, j: (v, c, j + 1, (5, 7)), ValueError, "argument `col_indices`: expected block columns"),
        (lambda v, c, j: (v, c, j.flip(0), (5, 7)), ValueError, "argument `col_indices`: expected columns"),
        (lambda v, c, j: (v, c, j * 0, (5, 7)), ValueError, "argument `col_indices`: expected columns that"),
    ],
)
def test_bad_index(make, kind, message):
    with pytest.raises(kind) as error:
        BlockSparseTensor(*make(golden().values, *INDEX))
    assert message in str(error.value)
    assert "; got " in str(error.value)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda w: BlockSparseTensor.from_dense("w", 2), TypeError, "argument `weight`: expected a tensor"),
        (lambda w: BlockSparseTensor.from_dense(w[0], 2), ValueError, "argument `weight`: expected shape"),
        (lambda w: BlockSparseTensor.from_dense(w, (2, 0)), ValueError, "argument `block_shape`: expected 2"),
        (
            lambda w: BlockSparseTensor.from_dense(w, 2, w),
            ValueError,
            "argument `mask`: expected shape [block rows, block columns] = [2, 3]",
        ),
        (
            lambda w: BlockSparseTensor.from_dense(w, 2, w[:2, :3]),
            ValueError,
            "argument `mask`: expected only",
        ),
        (
            lambda w: BlockSparseTensor.from_dense(w, 2, [[1] * 3] * 2),
            TypeError,
            "argument `mask`: expected a tensor",
        ),
        (lambda w: BlockSparseTensor.from_masked(w[0], w[0], 2), ValueError, "argument `weight`: expected"),
        (lambda w: BlockSparseTensor.from_masked(w, w[1:], 2), ValueError, "`weight_mask`: expected shape"),
        (lambda w: BlockSparseTensor.from_masked(w, None, 2), TypeError, "`weight_mask`: expected a tensor"),
        (lambda w: BlockSparseTensor.from_masked(w, w, 2), ValueError, "argument `weight_mask`: expected 0"),
        (
            lambda w: BlockSparseTensor.from_masked(w, torch.eye(4, 6), 2),
            ValueError,
            "argument `weight_mask`: expected 0 and 1, constant inside each block (2, 2)",
        ),
        (lambda w: BlockSparseTensor.from_bsr(w), TypeError, "argument `matrix`: expected a 2-D tensor"),
        (lambda w: golden().with_values(w), ValueError, "of the pattern = [4, 2, 3]"),
        (
            lambda w: golden().with_values(golden().values.to_sparse()),
            TypeError,
            "argument `values`: expected a dense",
        ),
        (lambda w: ops.block_sparse_matmul(w, w), TypeError, "argument `b`: expected a BlockSparseTensor"),
        (lambda w: ops.block_sparse_matmul(golden(), golden()), TypeError, "argument `b`: expected a dense"),
        (lambda w: ops.block_sparse_matmul(golden(), "text"), TypeError, "argument `b`: expected a tensor"),
        (lambda w: ops.block_sparse_matmul(golden(), w[0]), ValueError, "argument `b`: expected shape"),
        (lambda w: ops.block_sparse_matmul("text", golden()), TypeError, "argument `a`: expected a tensor"),
        (lambda w: ops.block_sparse_matmul(w[0, 0], golden()), ValueError, "argument `a`: expected shape"),
        (lambda w: ops.block_sparse_matmul(golden(), w), ValueError, "argument `b`: expected 7 rows beside"),
        (lambda w: ops.block_sparse_matmul(w, golden()), ValueError, "argument `a`: expected 5 columns"),
        (lambda w: ops.block_sparse_matmul(w, golden(), transpose=1), TypeError, "argument `transpose`"),
    ],
)
def test_bad_conversions_and_operands(make, kind, message):
    with pytest.raises(kind) as error:
        make(torch.randn(4, 6))
    assert message in str(error.value)
    assert "; got " in str(error.value)


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (lambda w: setattr(w, "index", w.index[:3]), ValueError, "argument `weight.index`: expected shape"),
        (
            lambda w: setattr(w, "index", w.index.long()),
            TypeError,
            "argument `weight.index`: expected dtype int32",
        ),
        (lambda w: setattr(w, "values", w.values[:2]), ValueError, "argument `weight.index`: expected shape"),
        (lambda w: setattr(w, "shape", (128, 7)), ValueError, "argument `weight.index`: expected shape"),
        (lambda w: setattr(w, "values", w.values[0]), ValueError, "argument `weight.values`: expected shape"),
    ],
)
def test_an_edited_matrix_is_refused(edit, kind, message):
    weight, x = golden(), torch.randn(3, 7, dtype=torch.float64)
    ops.block_sparse_linear(x, weight)
    edit(weight)
    with pytest.raises(kind) as error:
        ops.block_sparse_linear(x, weight)
    assert message in str(error.value)


def test_supported_backends_knows_the_product_with_a_matrix() -> None:
    """It is in `vitkernels.ops`, though it has no kernels but those of block_sparse_linear."""
    reasons = supported_backends("block_sparse_matmul", torch.randn(2, 5).double(), golden())
    assert reasons["cpu"] == reasons["reference"] == []
    assert set(reasons) == {"cuda", "triton", "cpu", "reference"}
