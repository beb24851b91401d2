"""The backward kernels of block_sparse_linear in Triton, beside the product with the transpose.

No float atomics: every program owns its outputs or leaves partial sums that are added in a fixed order.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot_in_parts


@jit
def slope(kept, ACTIVATION: tl.constexpr):
    """Of the activation, from what went into a GELU or came out of a ReLU."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * kept * kept) * 0.3989422804014327
        return 0.5 * (1 + tl.erf(kept * 0.7071067811865476)) + kept * density
    return tl.where(kept <= 0, 0.0, 1.0)


@jit(do_not_specialize=["tokens", "share"])
def activation_gradient(
    inner, sums, grad_y, kept, tokens, share, features, grad_row, kept_row, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """inner [tokens, features], the gradient of what goes into the activation, and its sums over each share of
    tokens [shares, features] for the bias; either may be absent. Floor: everything once from and to memory."""
    feature = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = feature < features
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, tokens)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, share, BLOCK_N):
        row = begin + start + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None] & inside[None, :]
        gradient = tl.load(grad_y + row[:, None] * grad_row + feature[None, :], mask=mask, other=0.0)
        gradient = gradient.to(tl.float32)
        if ACTIVATION != "none":
            place = kept + row[:, None] * kept_row + feature[None, :]
            gradient *= slope(tl.load(place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
            place = inner + row[:, None] * features + feature[None, :]
            tl.store(place, gradient.to(inner.dtype.element_ty), mask=mask)
        total += gradient
    if sums is not None:
        place = sums + tl.program_id(1).to(tl.int64) * features + feature
        tl.store(place, tl.sum(total, 0), mask=inside)


@jit(do_not_specialize=["tokens", "share", "elements", "across"])
def values_gradient(
    grad_values, left, right, counts, places, blocks, tokens, share, elements, height, width, across, left_row,
    right_row, BH: tl.constexpr, BW: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """left^T right over a share of tokens, at the stored blocks: grad_values is [shares, nnz, BH, BW].

    A tile covers a group of block rows (or a slice of one) and the next block columns at which any of the group
    stores a block, gathered: reading each block's 2 * BLOCK_N columns for itself would be bound by the second-level
    cache. Floor: 2 * tokens * elements of those tiles FLOPs at the matrix rate.
    """
    slices: tl.constexpr = BH // HEIGHT if HEIGHT < BH else 1
    entries: tl.constexpr = WIDTH // BW if WIDTH > BW else 1
    wide_slices: tl.constexpr = BW // WIDTH if WIDTH < BW else 1
    chunks = tl.cdiv(across, entries) * wide_slices
    part, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    group, above = part // slices, part % slices * HEIGHT
    first, before = chunk // wide_slices * entries, chunk % wide_slices * WIDTH
    count = tl.load(counts + group)
    if first >= count:
        return
    y, x = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    row = group * GROUP * BH + above + y
    entry = first + x // BW
    listed = entry < count
    place = group.to(tl.int64) * across + entry
    column = tl.load(places + place, mask=listed, other=0) * BW + before + x % BW
    # A gathered index is opaque; without the hint loads would be of single elements.
    run: tl.constexpr = BW if BW < WIDTH else WIDTH
    column = tl.max_contiguous(tl.multiple_of(column, run), run)
    row_inside = row < height
    column_inside = listed & (column < width)
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, tokens)
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for start in range(0, share, BLOCK_N):
        token = begin + start + tl.arange(0, BLOCK_N)
        inside = token < end
        at = left + token[None, :] * left_row + row[:, None]
        a = tl.load(at, mask=inside[None, :] & row_inside[:, None], other=0.0)
        at = right + token[:, None] * right_row + column[None, :]
        b = tl.load(at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = dot_in_parts(a, b, total)
    block = tl.load(blocks + place[None, :] * GROUP + (y // BH)[:, None], mask=listed[None, :], other=-1)
    at = block.to(tl.int64) * (BH * BW) + (above + y % BH)[:, None] * BW + (before + x % BW)[None, :]
    # Not by the zeros loaded: beside them there may be an infinity.
    total = tl.where(row_inside[:, None] & column_inside[None, :], total, 0.0)
    target = grad_values + tl.program_id(1).to(tl.int64) * elements + at
    tl.store(target, total.to(grad_values.dtype.element_ty), mask=block >= 0)
