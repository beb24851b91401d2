"""What a call of cascaded group attention's Triton kernels is configured by: shapes, layout and dtype alone.

No autotuning, and the batch is never among them: a new batch size never recompiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from vitkernels.core.triton_tiles import padded

# Rows of a tile: what a window may have, and what small windows are packed up to.
TILE_ROWS = 64


def packed_sizes(kernel_sizes: Sequence[int]) -> int:
    """Half of each depthwise kernel size in four bits of an integer, which a kernel indexes by head."""
    return sum(size // 2 << 4 * head for head, size in enumerate(kernel_sizes))


def parts(width: int) -> tuple[int, int]:
    """Two powers of two that hold a width together, the second 0 where one is enough."""
    if width <= 16:
        return 16, 0
    part = 1 << width.bit_length() - 1
    return part, padded(width - part) if width > part else 0


def slice_of(width: int, most: int) -> int:
    """Into slices of how many channels a width is walked through: the widest power of two that divides it."""
    return min(most, max(16, width & -width))


@dataclass(frozen=True)
class Shape:
    """What the launches need to know about a call."""

    batch: int
    channels: int
    height: int
    width: int
    heads: int
    key_dim: int
    value_dim: int
    window_h: int
    window_w: int
    kernel_max: int
    kernel_sizes: tuple[int, ...]
    itemsize: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.window_h)

    @property
    def columns(self) -> int:
        return -(-self.width // self.window_w)

    @property
    def windows(self) -> int:
        return self.batch * self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.window_h * self.window_w


def shape_of(x: Tensor, qkv_weight: Tensor, dw_weight: Tensor, window_h, window_w, kernel_sizes) -> Shape:
    heads, key_dim, kernel_max, _ = dw_weight.shape
    batch, channels, height, width = x.shape
    return Shape(
        batch, channels, height, width, heads, key_dim, qkv_weight.shape[2], window_h, window_w, kernel_max,
        tuple(kernel_sizes), x.element_size(),
    )  # fmt: skip


def channels_innermost(tensor: Tensor) -> bool:
    """Whether lanes should follow the channels of a map [B, C, H, W], rather than its columns."""
    return tensor.stride(1) == 1 and tensor.stride(3) != 1


@cache
def window_configuration(
    tokens: int, key_dim: int, value_dim: int, itemsize: int, nchw: bool
) -> dict[str, int]:
    """Tiles of the kernels that hold windows."""
    block = padded(tokens)
    part, rest = parts(value_dim)
    return {
        "BLOCK": block,
        "PACK": max(1, TILE_ROWS // block),
        "BLOCK_K": padded(key_dim),
        "PART": part,
        "REST": rest,
        # A token of an NCHW map takes a 64-bit address for every channel: narrow slices.
        "SLICE": slice_of(value_dim, 16 if nchw else 32),
        # fp32 products run on the FMA units with both operands in registers: more threads, or they spill.
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": 1,
    }


@cache
def product_configuration(channels: int, itemsize: int, nchw: bool) -> dict[str, int]:
    """Tiles of the products over all tokens; `nchw`: one of a map whose channels lie apart."""
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, padded(channels)),
        "SLICE": slice_of(channels, 32),
        "STAGES": 3 if itemsize == 2 else 2,
        # An address for every element of an NCHW tile: with four warps Triton 3.6 spills them.
        "num_warps": 4 if itemsize == 2 and not nchw else 8,
        "num_stages": 1,
    }


@cache
def weight_configuration(outputs: int, inputs: int, itemsize: int, nchw: bool = False) -> dict[str, int]:
    """Tiles of the products that sum over all tokens; `nchw` as above, for a product of nothing else."""
    return {
        "BLOCK_T": 32,
        "BLOCK_M": min(64, padded(outputs)),
        "BLOCK_N": min(64, padded(inputs)),
        "STAGES": 3 if itemsize == 2 else 1,
        "num_warps": 4 if itemsize == 2 and not nchw else 8,
        "num_stages": 1,
    }
