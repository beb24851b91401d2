"""The block-sparse matrix: values of the stored blocks, and an index that reads them by rows and by columns."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitkernels.core.checks import check_device, check_positive_ints, check_tensor, fail


class BlockSparseTensor:
    """A matrix [O, I] of which only some blocks (bh, bw) are stored, in the layout of PyTorch's BSR.

    Unlike PyTorch's, the matrix may end in partial blocks: O and I need not be multiples of bh and bw. Elements of
    `values` beyond the matrix belong to nobody: no kernel uses them, and their gradient is exactly 0.

    The index of the transpose is built once, here; both directions read the same values.

    Attributes:
        values: [nnz, bh, bw], the stored blocks by rows, row-major inside a block. May be a Parameter.
        index: int32 [2 + nbr + nbc + 4 nnz]: crow_indices, col_indices, row_indices, crow_t, row_t, perm_t, one
            after the other. What the kernels take, and all that a module must keep beside values.
        shape: (O, I).

    Args:
        values: [nnz, bh, bw], a floating dtype. Not copied.
        crow_indices: [nbr + 1], nbr = ceil(O / bh): block row i has the blocks crow_indices[i] to crow_indices[i + 1].
        col_indices: [nnz], the block columns, ascending inside a row.
        shape: (O, I).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit each other, or indices that are no such index.

    Example:
        >>> weight = torch.randn(64, 96)
        >>> keep = torch.rand(2, 3) < 0.5
        >>> sparse = BlockSparseTensor.from_dense(weight, (32, 32), keep)
        >>> torch.equal(sparse.to_dense(), weight * keep.repeat_interleave(32, 0).repeat_interleave(32, 1))
        True
    """

    values: torch.Tensor
    index: torch.Tensor
    shape: tuple[int, int]

    def __init__(
        self, values: torch.Tensor, crow_indices: torch.Tensor, col_indices: torch.Tensor, shape: Any
    ) -> None:
        check_tensor("values", values, (None, None, None), "[nnz, bh, bw]")
        if not values.is_floating_point():
            fail("values", "a floating dtype", values, kind=TypeError)
        sizes = check_positive_ints("shape", tuple(shape) if isinstance(shape, torch.Size) else shape, 2)
        if values.shape[1] == 0 or values.shape[2] == 0:
            fail("values", "blocks of at least one element", values)
        self.values, self.shape = values, (sizes[0], sizes[1])
        _check_index(crow_indices, col_indices, values, self.grid)
        self.index = _complete(crow_indices, col_indices, self.grid[1])

    @classmethod
    def wrap(cls, values: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> BlockSparseTensor:
        """From what another BlockSparseTensor holds, unchecked: for modules that keep values and index themselves."""
        made = cls.__new__(cls)
        made.values, made.index, made.shape = values, index, shape
        return made

    def with_values(self, values: torch.Tensor) -> BlockSparseTensor:
        """The same pattern with other values [nnz, bh, bw]; the index is shared."""
        check_tensor("values", values, tuple(self.values.shape), "[nnz, bh, bw] of the pattern")
        return BlockSparseTensor.wrap(values, self.index, self.shape)

    # ---- conversions

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, block_shape: tuple[int, int] | int, mask: torch.Tensor | None = None
    ) -> BlockSparseTensor:
        """The blocks of a dense matrix that `mask` keeps, without one those that are not all zero.

        Args:
            weight: [O, I]. Gradients of the values reach it.
            block_shape: (bh, bw), or one number for both.
            mask: which blocks to keep, [ceil(O / bh), ceil(I / bw)], bool or 0 and 1.
        """
        block = _check_block(block_shape)
        check_tensor("weight", weight, (None, None), "[out_features, in_features]")
        if not weight.is_floating_point():
            fail("weight", "a floating dtype", weight, kind=TypeError)
        if weight.numel() == 0:
            fail("weight", "at least one row and column", weight)
        blocks = _blocks(weight, block)
        grid = blocks.shape[:2]
        if mask is None:
            keep = (blocks.detach() != 0).any(-1).any(-1)
        else:
            check_tensor("mask", mask, grid, "[block rows, block columns]")
            check_device("mask", mask, weight.device, "weight")
            if mask.dtype is not torch.bool and not ((mask == 0) | (mask == 1)).all():
                fail("mask", "only 0 and 1", mask, "Compare your scores with a threshold first.")
            keep = mask != 0
        rows, columns = keep.nonzero(as_tuple=True)
        made = cls.wrap(blocks[rows, columns], rows, (weight.shape[0], weight.shape[1]))
        made.index = _complete(_pointers(rows, grid[0]), columns, grid[1])
        return made

    @classmethod
    def from_masked(
        cls, weight: torch.Tensor, weight_mask: torch.Tensor, block_shape: tuple[int, int] | int
    ) -> BlockSparseTensor:
        """From a dense weight and a dense mask of its shape, as LPViT's files have them.

        Args:
            weight: [O, I], or the weight of a convolution, [O, ...], taken as [O, the rest flattened].
            weight_mask: 0 and 1 (or bool) in weight's shape, constant inside each block.
            block_shape: (bh, bw), or one number for both.

        Returns:
            the matrix weight_mask * weight.
        """
        block = _check_block(block_shape)
        check_tensor("weight", weight, (..., None, None), "[out_features, ...]")
        check_tensor("weight_mask", weight_mask, weight.shape, "of weight")
        flat = weight_mask.flatten(1)
        # Elements beyond the matrix must not make a partial block look mixed, whichever value it holds.
        kept = _blocks(flat != 0, block).any(-1).any(-1)
        if not torch.equal(_spread(kept, block, flat.shape).to(flat.dtype), flat):
            fail(
                "weight_mask",
                f"0 and 1, constant inside each block {block}",
                weight_mask,
                "Pass the block shape that the mask was made with.",
            )
        return cls.from_dense(weight.flatten(1), block, kept)

    @classmethod
    def from_bsr(cls, matrix: torch.Tensor) -> BlockSparseTensor:
        """From a PyTorch tensor of the layout sparse_bsr; the values are shared."""
        if not isinstance(matrix, torch.Tensor) or matrix.layout is not torch.sparse_bsr or matrix.dim() != 2:
            fail("matrix", "a 2-D tensor of layout torch.sparse_bsr", matrix, kind=TypeError)
        return cls(matrix.values(), matrix.crow_indices(), matrix.col_indices(), tuple(matrix.shape))

    def to_bsr(self) -> torch.Tensor:
        """As a PyTorch tensor of the layout sparse_bsr, with int64 indices; the values are shared.

        Raises:
            ValueError: a partial block, which PyTorch's layout does not know.
        """
        if self.shape[0] % self.block_shape[0] or self.shape[1] % self.block_shape[1]:
            raise ValueError(
                f"to_bsr: expected a shape in whole blocks of {self.block_shape}; got {self.shape}. "
                "PyTorch's BSR has no partial blocks; pad the matrix first."
            )
        indices = self.crow_indices.long(), self.col_indices.long()
        return torch.sparse_bsr_tensor(*indices, self.values, self.shape, check_invariants=False)

    def to_dense(self) -> torch.Tensor:
        """The matrix [O, I] with zeros where nothing is stored. Differentiable with respect to values."""
        (bh, bw), (rows, columns) = self.block_shape, self.grid
        blocks = self.values.new_zeros(rows * columns, bh, bw)
        place = self.row_indices.long() * columns + self.col_indices
        blocks = blocks.index_copy(0, place, self.values)
        dense = blocks.view(rows, columns, bh, bw).transpose(1, 2).reshape(rows * bh, columns * bw)
        return dense[: self.shape[0], : self.shape[1]]

    def to(self, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        """As `torch.Tensor.to` on the values; the index follows to their device."""
        values = self.values.to(*args, **kwargs)
        index = self.index.to(values.device)
        if values is self.values and index is self.index:
            return self
        return BlockSparseTensor.wrap(values, index, self.shape)

    # ---- what it holds

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns), partial ones included."""
        return -(-self.shape[0] // self.values.shape[1]), -(-self.shape[1] // self.values.shape[2])

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        return self.nnz / math.prod(self.grid)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def crow_indices(self) -> torch.Tensor:
        """[nbr + 1], int32: where each block row begins."""
        return self.index[: self.grid[0] + 1]

    @property
    def col_indices(self) -> torch.Tensor:
        """[nnz], int32: the block column of each stored block."""
        return self._part(0, 0)

    @property
    def row_indices(self) -> torch.Tensor:
        """[nnz], int32: the block row of each stored block."""
        return self._part(0, 1)

    @property
    def crow_t(self) -> torch.Tensor:
        """[nbc + 1], int32: where each block column begins in row_t and perm_t."""
        start = self.grid[0] + 1 + 2 * self.nnz
        return self.index[start : start + self.grid[1] + 1]

    @property
    def row_t(self) -> torch.Tensor:
        """[nnz], int32: block rows, by block column."""
        return self._part(self.grid[1] + 1, 2)

    @property
    def perm_t(self) -> torch.Tensor:
        """[nnz], int32: the stored blocks, by block column."""
        return self._part(self.grid[1] + 1, 3)

    def _part(self, more: int, number: int) -> torch.Tensor:
        start = self.grid[0] + 1 + more + number * self.nnz
        return self.index[start : start + self.nnz]

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"BlockSparseTensor(shape={self.shape}, block_shape={self.block_shape}, nnz={self.nnz}, "
            f"density={self.density:.3g}, dtype={self.dtype}, device={self.device}{grad})"
        )


def _check_block(value: Any) -> tuple[int, int]:
    height, width = check_positive_ints("block_shape", value, 2)
    return height, width


def _check_index(crow: Any, col: Any, values: torch.Tensor, grid: tuple[int, int]) -> None:
    for name, tensor, count, words in (
        ("crow_indices", crow, grid[0] + 1, "block rows + 1"),
        ("col_indices", col, values.shape[0], "stored blocks"),
    ):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            fail(name, "an int32 or int64 tensor", tensor, kind=TypeError)
        if tensor.shape != (count,):
            fail(name, f"shape [{words}] = [{count}]", tensor)
        check_device(name, tensor, values.device, "values")
    if crow[0] != 0 or crow[-1] != len(col) or (crow.diff() < 0).any():
        fail("crow_indices", f"numbers that rise from 0 to {len(col)}, the stored blocks", crow.tolist())
    if len(col) == 0:
        return
    if col.min() < 0 or col.max() >= grid[1]:
        outside = int(col[(col < 0) | (col >= grid[1])][0])
        fail("col_indices", f"block columns from 0 to {grid[1] - 1}", outside)
    begins_row = torch.zeros(len(col) + 1, dtype=torch.bool, device=col.device)
    begins_row[crow.long()] = True
    if ((col.diff() <= 0) & ~begins_row[1:-1]).any():
        fail(
            "col_indices",
            "columns that ascend inside each row, none twice",
            col,
            "Sort each row's blocks by column and merge blocks that meet.",
        )


def _pointers(sorted_indices: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of `count` numbers begins among sorted ones: [count + 1]."""
    edges = torch.arange(count + 1, device=sorted_indices.device, dtype=sorted_indices.dtype)
    return torch.searchsorted(sorted_indices, edges)


def _complete(crow: torch.Tensor, col: torch.Tensor, columns: int) -> torch.Tensor:
    """The packed index from the two arrays that define the pattern."""
    crow, col = crow.detach().long(), col.detach().long()
    numbers = torch.arange(len(crow) - 1, device=crow.device)
    row = numbers.repeat_interleave(crow.diff(), output_size=len(col))
    perm = torch.argsort(col, stable=True)  # stable: rows stay in order, which fixes the order of sums
    parts = (crow, col, row, _pointers(col[perm], columns), row[perm], perm)
    return torch.cat(parts).to(torch.int32)


def _blocks(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[nbr, nbc, bh, bw], zeros beyond the matrix."""
    (bh, bw), (rows, columns) = block, matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % bw, 0, -rows % bh))
    return padded.view(-(-rows // bh), bh, -(-columns // bw), bw).transpose(1, 2)


def _spread(blocks: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One entry a block -> one an element of the matrix."""
    spread = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]
