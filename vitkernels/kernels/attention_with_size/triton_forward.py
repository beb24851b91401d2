"""Forward of proportional attention in Triton: a tile of queries, all keys, and what both directions share.

A size enters as the base-2 logarithm that is added to the logits of its key: one a key and tile, taken once for all
queries of the tile. Floor of a head, N queries, M keys, element size s: reads q, k, v and sizes and writes out and,
where wanted, lse, s (N (d + dv) + M (d + dv)) + 4 (N + M) bytes; 2 N M (d + dv) FLOPs; N M exponentials.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    INF,
    LOG2E,
    dot,
    load_tile,
    softmax_finish,
    softmax_start,
    softmax_step,
    store_tile,
    tile_mask,
    tile_offsets,
)


@jit
def load_rows(base, rows, valid, row_stride, other):
    return tl.load(base + rows.to(tl.int64) * row_stride, mask=valid, other=other)


@jit
def load_channels(base, rows, valid, row_stride, col_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels [rows, BLOCK] of tokens; zeros beyond the last of either."""
    return load_tile(base, tile_offsets(rows, row_stride, col_stride, BLOCK), tile_mask(valid, BLOCK, WIDTH))


@jit
def store_channels(base, rows, valid, row_stride, col_stride, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    store_tile(base, tile_offsets(rows, row_stride, col_stride, BLOCK), tile_mask(valid, BLOCK, WIDTH), tile)


@jit
def size_logits(size, keys, key_valid, stride):
    """What a key's size adds to its base-2 logits: -inf for a size of 0 and beyond the last key."""
    count = load_rows(size, keys, key_valid, stride, 0.0)
    return tl.where(count == 0, -INF, tl.log2(tl.where(count == 0, 1.0, count)))


@jit
def tile_logits(query, key, sizes, scale):
    """Base-2 logits [queries, keys]."""
    return dot(query, tl.trans(key)) * (scale * LOG2E) + sizes[None, :]


# Neither a layer's number of tokens nor the strides that follow from it alone recompile.
@jit(do_not_specialize=["lse_b", "lse_h", "size_b", "query_count", "key_count"])
def forward_queries(
    out, lse, q, k, v, size,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    size_b, size_m, heads, query_count, key_count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills out, and lse unless it is None."""
    tiles = tl.cdiv(query_count, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    batch = program // tiles // heads
    head = program // tiles % heads
    queries = (program % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < query_count
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    size += batch * size_b
    start = q + batch * q_b + head * q_h
    query = load_channels(start, queries, query_valid, q_n, q_c, HEAD_DIM, BLOCK_D)
    maximum, total = softmax_start(BLOCK_M)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(0, key_count, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_valid = keys < key_count
        key = load_channels(k, keys, key_valid, k_n, k_c, HEAD_DIM, BLOCK_D)
        value = load_channels(v, keys, key_valid, v_n, v_c, VALUE_DIM, BLOCK_V)
        logits = tile_logits(query, key, size_logits(size, keys, key_valid, size_m), scale)
        weights, rescale, maximum, total = softmax_step(logits, maximum, total)
        accumulator = dot(weights.to(value.dtype), value, accumulator * rescale[:, None])
    result, row_lse = softmax_finish(accumulator, maximum, total)
    start = out + batch * out_b + head * out_h
    store_channels(start, queries, query_valid, out_n, out_c, result, VALUE_DIM, BLOCK_V)
    if lse is not None:
        place = lse + batch * lse_b + head * lse_h + queries.to(tl.int64) * lse_n
        tl.store(place, row_lse, mask=query_valid)
