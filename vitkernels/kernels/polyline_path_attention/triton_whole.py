"""Polyline path attention over the whole map in Triton: two softmaxes over one product of queries and keys.

Floor per map and head, N tokens, element size s: reads q, k, v and writes out and partial, s N (2 d + 3 dv) + 16 N
bytes; 2 N^2 (d + 2 dv) FLOPs and 2 N^2 exponentials. At d = dv = 32 that is 96 FLOPs an exponential: bound by the
special-function units.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import LOG2E, dot, dot_in_parts, natural_lse, softmax_start, softmax_step
from vitkernels.kernels.polyline_path_attention.triton_map import (
    cell_offsets,
    load_tokens,
    masked,
    masks,
    owner_tables,
    plane_offset,
    store_tokens,
    tile_tokens,
)


@jit
def owner_place(size, heads):
    """(batch, head, tile) of a program; heads vary fastest, as they share cache lines."""
    program = tl.program_id(0)
    tiles = size[2] * size[3]
    head = (program % heads).to(tl.int64)
    return (program // heads // tiles).to(tl.int64), head, program // heads % tiles


@jit(do_not_specialize=["pair"])
def forward_whole(
    out, partial, lse, q, k, v, sums, out_s, partial_s, q_s, k_s, v_s, size, heads, pair, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills out, partial (of the softmax with M) and lse; planes of sums and of lse are `pair` elements apart."""
    BLOCK_M: tl.constexpr = TILE_Y * TILE_X
    batch, head, tile = owner_place(size, heads)
    y, x, valid = tile_tokens(tile, size, TILE_Y, TILE_X)
    plane = plane_offset(batch, heads, head, size)
    sums_w = sums + plane
    sums_h = sums_w + pair
    own = cell_offsets(y, x, size)
    own_w = tl.load(sums_w + own, mask=valid, other=0.0)
    own_h = tl.load(sums_h + own, mask=valid, other=0.0)
    query = load_tokens(q, q_s, batch, head, y, x, valid, BLOCK_D, HEAD_DIM)
    first_max, first_total = softmax_start(BLOCK_M)
    second_max, second_total = softmax_start(BLOCK_M)
    first = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_valid = columns < size[1]
        right, table, corner, inside = owner_tables(
            sums_w, own_w, y, x, columns, valid, column_valid, size
        )  # fmt: skip
        corner_h = tl.load(sums_h + corner, mask=inside, other=0.0)
        for row in range(0, size[0]):
            key = load_tokens(k, k_s, batch, head, row, columns, column_valid, BLOCK_D, HEAD_DIM)
            value = load_tokens(v, v_s, batch, head, row, columns, column_valid, BLOCK_V, VALUE_DIM)
            of_first, of_second = masks(
                sums_w, sums_h, table, right, corner_h, own_h, y, x, row, columns, valid, column_valid, size
            )
            products = dot(query, tl.trans(key)) * (scale * LOG2E)
            weights, rescale, first_max, first_total = softmax_step(
                masked(products + of_first, column_valid), first_max, first_total
            )
            first *= rescale[:, None]
            first = dot_in_parts(weights.to(value.dtype), value, first)
            weights, rescale, second_max, second_total = softmax_step(
                masked(products + of_second, column_valid), second_max, second_total
            )
            second *= rescale[:, None]
            second = dot_in_parts(weights.to(value.dtype), value, second)
    first = first / first_total[:, None]
    second = second / second_total[:, None]
    result = 0.5 * first + 0.5 * second
    store_tokens(out, out_s, batch, head, y, x, valid, result, BLOCK_V, VALUE_DIM)
    store_tokens(partial, partial_s, batch, head, y, x, valid, first, BLOCK_V, VALUE_DIM)
    tl.store(lse + plane + own, natural_lse(first_max, first_total), mask=valid)
    tl.store(lse + plane + pair + own, natural_lse(second_max, second_total), mask=valid)
