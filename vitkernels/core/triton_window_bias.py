"""The learned bias of attention within windows: table entry of a token pair, and the table's gradient."""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E


@jit
def bias_logits(
    table, head, stride_h, stride_t, queries, keys, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Base-2 logit term of a tile: the bias of each (query, key), -inf for keys beyond the window.

    Without a table it is one row, [1, keys].
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    valid = (keys < TOKENS)[None, :]
    if table is None:
        return tl.where(valid, 0.0, -INF)
    else:
        dy = (queries // WINDOW_W)[:, None] - (keys // WINDOW_W)[None, :]
        dx = (queries % WINDOW_W)[:, None] - (keys % WINDOW_W)[None, :]
        if SIGNED:
            entry = (dy + WINDOW_H - 1) * (2 * WINDOW_W - 1) + dx + WINDOW_W - 1
        else:
            entry = tl.abs(dy) * WINDOW_W + tl.abs(dx)
        inside = valid & (queries < TOKENS)[:, None]
        bias = tl.load(table + head * stride_h + entry.to(tl.int64) * stride_t, mask=inside, other=0.0)
        return tl.where(valid, bias.to(tl.float32) * LOG2E, -INF)


@jit(do_not_specialize=["chunks"])
def reduce_bias_gradient(
    grad_table, partials, stride_h, stride_t, heads, chunks, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums partials [chunks, heads, N, N] of the logit gradient into grad_table [heads, entries].

    One program per table entry visits the token pairs at its offset, in an order fixed by the sizes.
    Floor: chunks * heads * N^2 * 4 bytes, each read once.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    ENTRIES: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1) if SIGNED else TOKENS
    program = tl.program_id(0)
    head = (program // ENTRIES).to(tl.int64)
    entry = program % ENTRIES
    if SIGNED:
        dy = entry // (2 * WINDOW_W - 1) - (WINDOW_H - 1)
        dx = entry % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
    else:
        dy = entry // WINDOW_W
        dx = entry % WINDOW_W
    queries = tl.arange(0, BLOCK_T)
    chunk_ids = tl.arange(0, BLOCK_C)
    y = queries // WINDOW_W
    x = queries % WINDOW_W
    total = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    for first in range(0, chunks, BLOCK_C):
        chunk = first + chunk_ids
        rows = partials + (chunk.to(tl.int64) * heads + head) * (TOKENS * TOKENS)
        for sign in tl.static_range(1 if SIGNED else 4):
            key_y = y + dy if sign & 1 else y - dy
            key_x = x + dx if sign & 2 else x - dx
            pair = (queries < TOKENS) & (key_y >= 0) & (key_y < WINDOW_H) & (key_x >= 0) & (key_x < WINDOW_W)
            # An offset of 0 is its own mirror image: count it once.
            if sign & 1:
                pair = pair & (dy != 0)
            if sign & 2:
                pair = pair & (dx != 0)
            offsets = queries * TOKENS + key_y * WINDOW_W + key_x
            total += tl.load(
                rows[:, None] + offsets[None, :], mask=(chunk < chunks)[:, None] & pair[None, :], other=0.0
            )
    value = tl.sum(tl.sum(total, 0), 0)
    place = grad_table + head * stride_h + entry.to(tl.int64) * stride_t
    tl.store(place, value.to(grad_table.dtype.element_ty))


@jit
def partial_offset(chunk, heads, head, TOKENS: tl.constexpr):
    """Where partials[chunk, head] begins; `chunk` is a 64-bit integer."""
    return (chunk * heads + head) * (TOKENS * TOKENS)
