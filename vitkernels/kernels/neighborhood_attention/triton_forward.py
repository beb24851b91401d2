"""Neighborhood attention forward in Triton: online softmax over the box of keys that a tile of queries meets.

Floor per map and head, T tokens, element size s: reads q, k, v and writes out, lse: s T (2 d + 2 dv) + 4 T bytes;
2 T K (d + dv) FLOPs and T K exponentials for K keys a query. At K = 49, d = dv = 32 in fp16 that is 24 FLOP/byte:
bound by memory. A tile of 8 x 8 queries computes 256 pairs a query for its 49, and reads 3 keys a query, the most
of them from the cache.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    dot,
    load_tile,
    softmax_finish,
    softmax_start,
    softmax_step,
    store_tile,
    tile_mask,
    tile_offsets,
)
from vitkernels.kernels.neighborhood_attention.triton_map import (
    NOWHERE,
    box_numbers,
    in_window,
    keys_of,
    map_offset,
    neighbor_logits,
    tile_numbers,
    tile_place,
    token_offsets,
)


@jit
def forward_map(
    out, lse, q, k, v, rpb, out_s, lse_s, q_s, k_s, v_s, size, heads, scale,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills out, and lse unless it is absent."""
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    tiles = size[2] * size[3] * size[4] * size[5]
    batch = (tile // tiles).to(tl.int64)
    group_y, group_x, length_y, length_x, first_y, first_x, end_y, end_x = tile_place(
        tile % tiles, size, TILE_Y, TILE_X
    )
    query_y, query_x, query_valid = tile_numbers(first_y, first_x, end_y, end_x, TILE_Y, TILE_X, BLOCK_M)
    begin_y, height = keys_of(first_y, end_y, length_y, KERNEL_Y, CAUSAL_Y)
    begin_x, width = keys_of(first_x, end_x, length_x, KERNEL_X, CAUSAL_X)
    query = load_tile(
        q + map_offset(q_s, batch, head),
        tile_offsets(token_offsets(q_s, query_y, query_x, group_y, group_x, size), 1, q_s[4], BLOCK_D),
        tile_mask(query_valid, BLOCK_D, HEAD_DIM),
    )
    keys = k + map_offset(k_s, batch, head)
    values = v + map_offset(v_s, batch, head)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    maximum, total = softmax_start(BLOCK_M)
    for first in range(0, height * width, BLOCK_N):
        y, x, key_valid = box_numbers(first, begin_y, begin_x, width, height * width, BLOCK_N)
        k_rows = token_offsets(k_s, y, x, group_y, group_x, size)
        v_rows = token_offsets(v_s, y, x, group_y, group_x, size)
        key = load_tile(
            keys, tile_offsets(k_rows, 1, k_s[4], BLOCK_D), tile_mask(key_valid, BLOCK_D, HEAD_DIM)
        )
        value = load_tile(
            values, tile_offsets(v_rows, 1, v_s[4], BLOCK_V), tile_mask(key_valid, BLOCK_V, VALUE_DIM)
        )
        x = tl.where(key_valid, x, NOWHERE)
        # An empty slot's number may lie beyond the map, and what it saw then beyond the table of biases.
        inside = query_valid[:, None] & in_window(
            query_y[:, None], query_x[:, None], y[None, :], x[None, :], length_y, length_x,
            KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, TILE_Y,
        )  # fmt: skip
        logits = neighbor_logits(
            dot(query, tl.trans(key)), scale, rpb, head, query_y[:, None], query_x[:, None],
            y[None, :], x[None, :], inside, KERNEL_Y, KERNEL_X,
        )  # fmt: skip
        weights, rescale, maximum, total = softmax_step(logits, maximum, total)
        accumulator = accumulator * rescale[:, None] + dot(weights.to(value.dtype), value)
    result, row_lse = softmax_finish(accumulator, maximum, total)
    out_rows = token_offsets(out_s, query_y, query_x, group_y, group_x, size)
    store_tile(
        out + map_offset(out_s, batch, head), tile_offsets(out_rows, 1, out_s[4], BLOCK_V),
        tile_mask(query_valid, BLOCK_V, VALUE_DIM), result,
    )  # fmt: skip
    if lse is not None:
        rows = token_offsets(lse_s, query_y, query_x, group_y, group_x, size)
        tl.store(lse + map_offset(lse_s, batch, head) + rows, row_lse, mask=query_valid)
