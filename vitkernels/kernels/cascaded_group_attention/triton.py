"""Launches the Triton kernels of cascaded group attention: tiles, programs, and the order of the launches.

The configuration follows from window, widths, layout and dtype alone: no autotuning, and a new batch size
never recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.cascaded_group_attention.triton_forward import forward_heads, forward_projection

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
    return Shape(
        *x.shape, heads, key_dim, qkv_weight.shape[2], window_h, window_w, kernel_max, tuple(kernel_sizes),
        x.element_size(),
    )  # fmt: skip


def channels_innermost(tensor: Tensor) -> bool:
    """Whether lanes should follow the channels of a map [B, C, H, W], rather than its columns."""
    return tensor.stride(1) == 1 and tensor.stride(3) != 1


@cache
def window_configuration(tokens: int, key_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Tiles of the kernels that hold windows."""
    block = padded(tokens)
    part, rest = parts(value_dim)
    return {
        "BLOCK": block,
        "PACK": max(1, TILE_ROWS // block),
        "BLOCK_K": padded(key_dim),
        "PART": part,
        "REST": rest,
        "SLICE": slice_of(value_dim, 32),
        # fp32 products run on the FMA units with both operands in registers: more threads, or they spill.
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": 1,
    }


@cache
def product_configuration(channels: int, itemsize: int) -> dict[str, int]:
    """Tiles of the products over all tokens."""
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, padded(channels)),
        "SLICE": slice_of(channels, 32),
        "STAGES": 3 if itemsize == 2 else 2,
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": 1,
    }


def _scratch(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(
    out: Tensor,
    heads: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    attn_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window_h: int,
    window_w: int,
    kernel_sizes: Sequence[int],
    scale: float,
    residual: bool,
) -> None:
    """Fills out and heads."""
    shape = shape_of(x, qkv_weight, dw_weight, window_h, window_w, kernel_sizes)
    with device_of(x):
        _forward_heads(heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, scale, shape)
        config = product_configuration(shape.channels, shape.itemsize)
        pixels = shape.batch * shape.height * shape.width
        tiles = -(-pixels // config["BLOCK_M"]) * -(-shape.channels // config["BLOCK_N"])
        forward_projection[(tiles,)](
            out, heads, x, proj_weight, proj_bias, *out.stride(), *x.stride(), *proj_weight.stride(),
            *proj_bias.stride(), pixels, shape.rows, shape.columns, shape.height, shape.width,
            shape.channels, window_h, window_w, residual, **config, NCHW=not channels_innermost(out),
        )  # fmt: skip


def _forward_heads(heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, scale, shape):
    config = window_configuration(shape.tokens, shape.key_dim, shape.value_dim, shape.itemsize)
    # q~ lies where O of the same head will, if it fits there.
    if shape.key_dim <= shape.value_dim:
        queries, queries_h, queries_n = heads, shape.value_dim, shape.channels
    else:
        queries = _scratch(x, x.dtype, shape.windows * shape.tokens, shape.key_dim)
        queries_h, queries_n = 0, shape.key_dim
    forward_heads[(-(-shape.windows // config["PACK"]),)](
        heads, queries, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, queries_h, queries_n,
        *x.stride(), *qkv_weight.stride(), *qkv_bias.stride(), *dw_weight.stride(), *dw_bias.stride(),
        *attn_bias.stride(), shape.windows, shape.rows, shape.columns, shape.height, shape.width, scale,
        shape.heads, packed_sizes(shape.kernel_sizes), shape.kernel_max, shape.key_dim, shape.value_dim,
        shape.window_h, shape.window_w, **config, STAGES=2, NCHW=not channels_innermost(x),
    )  # fmt: skip


# (channels, heads, kernel sizes, window side, map side, channels-last) of EfficientViT mixers: the narrowest,
# two that end in a part, the widest, and small windows.
EXAMPLES = (
    (64, 4, (5, 5, 5, 5), 7, 14, False),
    (128, 4, (7, 5, 3, 3), 7, 14, True),
    (288, 3, (7, 5, 3), 7, 7, False),
    (240, 3, (5, 5, 5), 7, 7, True),
    (224, 2, (7, 5), 4, 4, False),
    (384, 4, (7, 5, 3, 3), 4, 4, True),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for channels, heads, sizes, window, side, channels_last in EXAMPLES:
        value_dim, largest = channels // heads, max(sizes)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x, out = (
            torch.empty(2, channels, side, side, dtype=dtype, memory_format=layout)
            for _ in range(2)
        )
        features = torch.empty(2 * (side // window) ** 2, window**2, channels, dtype=dtype)
        shapes = (
            (heads, 32 + value_dim, value_dim), (heads, 32 + value_dim), (heads, 16, largest, largest),
            (heads, 16), (heads, window**2), (channels, channels), (channels,),
        )  # fmt: skip
        weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
        inputs = (x, *weights, window, window, sizes, 0.25, True)

        def call(out=out, features=features, inputs=inputs):
            forward(out, features, *inputs)

        yield f"C={channels} heads={heads} {window}x{window} {'nhwc' if channels_last else 'nchw'}", call
