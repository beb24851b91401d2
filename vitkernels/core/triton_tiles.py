"""Tile-attention building blocks in Triton, shared by every operator that has attention inside.

A kernel loads tiles by strides, turns q k^T into base-2 logits, adds what its operator does to a logit, and
closes with softmax_step / softmax_finish (forward) or probabilities / logit_gradient (backward). An operator
supplies which keys a tile sees and the logit term; a masked key is a logit of -inf.

Numerics: logits, softmax and every accumulator are fp32; exp(x) is exp2(x * log2(e)) with the factor folded
into the scale and the logit term; fp32 products are exact fp32 (TF32 would lose 13 bits); half-precision
operands are rounded once, right before their product.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from vitkernels.core.triton_compiler import jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@jit
def tile_offsets(rows, row_stride, col_stride, WIDTH: tl.constexpr):
    """Element offsets [rows, WIDTH] of a strided tile, in 64 bits: row * token stride can exceed 2^31."""
    columns = tl.arange(0, WIDTH).to(tl.int64)
    return rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * col_stride


@jit
def place_of(rows, row_stride, columns, col_stride):
    """Element offsets [rows, columns] in 64 bits."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * col_stride


@jit
def channel_offset(first, col_stride):
    """Element offset of a loop's channel, in 64 bits: the loop variable and the stride may both be 32-bit."""
    return tl.cast(first, tl.int64) * col_stride


@jit
def tile_mask(rows_valid, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Mask [rows, WIDTH]: valid rows, and columns below LIMIT."""
    # Without the column test a row's mask is constant along it, which keeps its loads vectorised.
    if LIMIT == WIDTH:
        return rows_valid[:, None] & (tl.full([1, WIDTH], 1, tl.int1))
    else:
        return rows_valid[:, None] & (tl.arange(0, WIDTH) < LIMIT)[None, :]


@jit
def slice_mask(rows_valid, first, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Mask [rows, WIDTH] of the columns from `first` on."""
    if LIMIT % WIDTH == 0:
        return rows_valid[:, None] & (tl.full([1, WIDTH], 1, tl.int1))
    else:
        return rows_valid[:, None] & (first + tl.arange(0, WIDTH) < LIMIT)[None, :]


@jit
def load_tile(base, offsets, mask):
    """A tile with zeros outside the mask, so that padding adds nothing to a product."""
    return tl.load(base + offsets, mask=mask, other=0.0)


@jit
def store_tile(base, offsets, mask, tile):
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=mask)


@jit
def dot(a, b, accumulator=None):
    """accumulator + a b, in fp32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@jit
def dot_in_parts(a, b, accumulator):
    """The same as one of many steps: a b of fp32 is summed up before it joins the accumulator.

    An fp32 dot is a chain of additions on a GPU, and one chain over all steps would err several times as much as the
    parts that matrix libraries sum.
    """
    if a.dtype == tl.float32:
        # Not a plain addition, from which Triton would make the dot's own accumulator again.
        return tl.fma(dot(a, b), 1.0, accumulator)
    else:
        return dot(a, b, accumulator)


@jit
def softmax_start(ROWS: tl.constexpr):
    """Running (maximum, sum) of the online softmax before the first key."""
    return tl.full([ROWS], -INF, tl.float32), tl.zeros([ROWS], tl.float32)


@jit
def softmax_step(logits, maximum, total):
    """Takes base-2 logits of further keys. Returns their weights, and (rescale, maximum, total).

    The weights belong to the new maximum; what was accumulated before is to be multiplied by rescale.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    # A row that has seen only masked keys: -inf - -inf would be NaN.
    shift = tl.where(new_maximum == -INF, 0.0, new_maximum)
    weights = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    return weights, rescale, new_maximum, total * rescale + tl.sum(weights, 1)


@jit
def softmax_finish(accumulator, maximum, total):
    """The output rows and their natural-log lse."""
    return accumulator / total[:, None], natural_lse(maximum, total)


@jit
def natural_lse(maximum, total):
    return (maximum + tl.log2(total)) * LN2


@jit
def probabilities(logits, lse):
    """Softmax weights again from base-2 logits and the natural-log lse (+inf for a padded row: weights 0)."""
    return tl.exp2(logits - (lse * LOG2E)[:, None])


@jit
def logit_gradient(weights, grad_weights, delta):
    """Gradient of the natural-log logits; delta = sum(grad_out * out) - grad_lse of each row."""
    return weights * (grad_weights - delta[:, None])


def padded(count: int) -> int:
    """The power of two, at least 16 as tensor cores take it, that holds `count`."""
    return max(16, triton.next_power_of_2(count))


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current for a launch; free when it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
