"""A linear layer that stores only some blocks of its weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.core import backends
from vitkernels.core.checks import check_positive_ints, check_tensor, fail
from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor


class BlockSparseLinear(nn.Module):
    """`nn.Linear` with a block-sparse weight: training, saving and moving keep the pattern of its blocks.

    Parameters: `values` [nnz, bh, bw], the stored blocks by rows, and `bias` [out_features]. Buffers: `crow_indices`
    [ceil(out_features / bh) + 1] and `col_indices` [nnz], int32, as in PyTorch's BSR. These four are the state_dict;
    `index`, the same pattern by rows and by columns, follows from them and is not in it.

    Elements of `values` beyond the edge of the matrix are 0 and have a gradient of exactly 0, so that optimizers and
    weight decay leave them at 0.

    Loading a state_dict with another pattern adopts it: `values` stays the same Parameter and takes the file's size.
    Do it before the optimizer has state, and before DDP wraps the model. A dense weight is refused: load it into the
    dense layer, then make this one of it.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        block_shape: (bh, bw), height over out_features and width over in_features, or one number for both. Partial
            blocks at the edges are fine.
        density: share of the blocks that are stored, drawn at random.
        mask: which blocks are stored instead, [ceil(out_features / bh), ceil(in_features / bw)], bool or 0 and 1.
        backend: as in `ops.block_sparse_linear`.

    Shape: [..., in_features] to [..., out_features].

    Example:
        >>> layer = BlockSparseLinear(384, 1536, 32, density=0.5)
        >>> layer(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 1536])
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    index: Tensor
    _index_of_meta: Tensor | None = None  # what `index` would hold if it were not on the meta device

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_shape: tuple[int, int] | int,
        bias: bool = True,
        *,
        density: float = 0.5,
        mask: Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        backends.requested(backend)  # refuses an unknown name
        self.in_features, self.out_features = (
            check_positive_ints("in_features", in_features, 1)[0],
            check_positive_ints("out_features", out_features, 1)[0],
        )
        bh, bw = check_positive_ints("block_shape", block_shape, 2)
        grid = (-(-out_features // bh), -(-in_features // bw))
        if mask is None:
            mask = _best_blocks(torch.rand(grid, device="cpu"), density)
        check_tensor("mask", mask, grid, "[block rows, block columns]")
        # The index is made on the CPU, so that a layer may be built on the meta device.
        whole = torch.ones((), device="cpu").expand(out_features, in_features)
        pattern = BlockSparseTensor.from_dense(whole, (bh, bw), mask.cpu())
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(pattern.values.shape, **options))
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self._set_pattern(pattern)
        self.backend = backend
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_shape: tuple[int, int] | int,
        mask: Tensor | None = None,
        *,
        density: float | None = None,
        backend: str | None = None,
    ) -> BlockSparseLinear:
        """The layer of a dense one's blocks, with its mode, device and dtype; its bias is shared.

        Args:
            mask: which blocks to store, [ceil(out_features / bh), ceil(in_features / bw)], or one entry an element,
                [out_features, in_features], constant inside each block.
            density: without a mask, the share of the blocks to store, those of the largest mean magnitude. Without
                both, all that are not entirely 0.
        """
        if not isinstance(linear, nn.Linear):
            fail("linear", "a torch.nn.Linear", linear, kind=TypeError)
        if mask is not None and density is not None:
            fail("density", "None beside a mask", density)
        backends.requested(backend)
        weight = linear.weight.detach()
        bh, bw = check_positive_ints("block_shape", block_shape, 2)
        block = (bh, bw)
        if density is not None:
            elements = block_sums(torch.ones_like(weight), block)
            mask = _best_blocks(block_sums(weight.abs(), block) / elements, density)
        if mask is not None and not isinstance(mask, Tensor):
            fail("mask", "a tensor [block rows, block columns] or None", mask, kind=TypeError)
        if mask is not None and mask.shape == weight.shape and block != (1, 1):
            pattern = BlockSparseTensor.from_masked(weight, mask.to(weight.device), block)
        else:
            pattern = BlockSparseTensor.from_dense(
                weight, block, None if mask is None else mask.to(weight.device)
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.values = nn.Parameter(pattern.values, requires_grad=linear.weight.requires_grad)
        made.bias = linear.bias
        made.backend = backend
        made._set_pattern(pattern)
        return made.train(linear.training)

    def _set_pattern(self, pattern: BlockSparseTensor, device: torch.device | None = None) -> None:
        device = device or self.values.device
        self._index_of_meta = pattern.index.cpu() if device.type == "meta" else None
        for name in ("crow_indices", "col_indices"):
            self.register_buffer(name, getattr(pattern, name).to(device, copy=True))
        self.register_buffer("index", pattern.index.to(device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The pattern moves with its contents, to and from the meta device too: to_empty() would leave any numbers in
        # it, by which kernels then read memory.
        before = self.index
        index = self._index_of_meta if before.is_meta else before
        super()._apply(fn, recurse)
        if self.index is not before and index is not None:
            shape = (self.out_features, self.in_features)
            # Not where `values` lie, which are no parameter under torch.nn.utils.prune and move with the next call.
            self._set_pattern(BlockSparseTensor.wrap(self.values, index, shape), self.index.device)
        return self

    def reset_parameters(self) -> None:
        """As of `nn.Linear`, the bound for the values taken from the inputs that are stored."""
        inputs = max(1.0, self.density * self.in_features)
        with torch.no_grad():
            self.values.uniform_(-(inputs**-0.5), inputs**-0.5)
            self.clear_padding()
            if self.bias is not None:
                self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Puts zeros where values lie beyond the edge of the matrix."""
        sparse, (bh, bw) = self.weight, self.block_shape
        if (self.out_features % bh, self.in_features % bw) == (0, 0):
            return  # under FSDP too, where the values are a DTensor, which takes no plain masks
        inside = [
            (torch.arange(blocks * block, device=self.values.device) < size).view(blocks, block)
            for blocks, block, size in zip(sparse.grid, (bh, bw), sparse.shape, strict=True)
        ]
        self.values.mul_(inside[0][sparse.row_indices][:, :, None])
        self.values.mul_(inside[1][sparse.col_indices][:, None, :])

    @property
    def weight(self) -> BlockSparseTensor:
        """The matrix [out_features, in_features] of these values."""
        return BlockSparseTensor.wrap(self.values, self.index, (self.out_features, self.in_features))

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        bh, bw = self.block_shape
        return len(self.values) / (math.ceil(self.out_features / bh) * math.ceil(self.in_features / bw))

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The linear map, then None, "gelu" or "relu" in the same kernel."""
        return ops.block_sparse_linear(x, self.weight, self.bias, activation=activation, backend=self.backend)

    def to_linear(self) -> nn.Linear:
        """The dense layer of the same map, zeros where nothing is stored; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense().detach(), requires_grad=self.values.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def adopt_pattern(self, pattern: BlockSparseTensor) -> None:
        """Takes the pattern, and values of its number, which are undefined until they are loaded."""
        if pattern.shape != (self.out_features, self.in_features):
            fail("pattern", f"a matrix {(self.out_features, self.in_features)}", pattern)
        self.values.grad = None
        self.values.data = self.values.data.new_empty(pattern.values.shape)
        self._set_pattern(pattern)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("values", "crow_indices", "col_indices")]
        pattern = None
        if prefix + "weight" in state_dict and names[0] not in state_dict:
            error_msgs.append(
                f"{prefix}weight: expected the state_dict of a BlockSparseLinear; got a dense weight. Load it into the "
                "dense model and sparsify that."
            )
            return
        if all(name in state_dict for name in names):
            shape = (self.out_features, self.in_features)
            try:
                values, crow, col = (state_dict[name].detach().cpu() for name in names)
                pattern = BlockSparseTensor(values, crow, col, shape)
            except (NotImplementedError, TypeError, ValueError) as error:  # the first from the meta device
                error_msgs.append(f"{prefix}values and its index are no matrix {shape}: {error}")
                return
            if pattern.values.shape != self.values.shape:
                self.adopt_pattern(pattern)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if pattern is not None:
            self._set_pattern(pattern)

    def extra_repr(self) -> str:
        bh, bw = self.block_shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape=({bh}, {bw}), density={self.density:.3g}"
        )


def _best_blocks(scores: Tensor, density: float) -> Tensor:
    """The mask of the blocks of the highest scores."""
    if not isinstance(density, (int, float)) or not 0 <= density <= 1:
        fail("density", "a number from 0 to 1", density)
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(descending=True, stable=True)[: round(density * scores.numel())]] = True
    return keep.view(scores.shape)


def block_sums(elements: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """[O, I] to the sums of its blocks [ceil(O / bh), ceil(I / bw)], in float64."""
    (rows, columns), (bh, bw) = elements.shape, block_shape
    padded = F.pad(elements.double(), (0, -columns % bw, 0, -rows % bh))
    return padded.unflatten(1, (-1, bw)).unflatten(0, (-1, bh)).sum((1, 3))
