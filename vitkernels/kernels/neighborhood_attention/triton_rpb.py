"""The gradient of the relative position bias in Triton: per-chunk sums of the logit gradient, then of those.

A program owns a tile of queries and a block of the keys that it meets. It sums their logit gradient over the maps
of a chunk in registers, and writes it by (place in the window, token), so that no pair that is none takes memory:
4 T K bytes a chunk and head. The second kernel visits the pairs of one table entry. No atomics, a fixed order.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    INF,
    dot,
    load_tile,
    logit_gradient,
    probabilities,
    tile_mask,
    tile_offsets,
)
from vitkernels.kernels.neighborhood_attention.triton_backward import delta_offsets
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
    window_start,
)


@jit(do_not_specialize=["batch", "chunks"])
def backward_rpb_map(
    partials, grad_out, lse, delta, norm, q, k, v, rpb, go_s, lse_s, q_s, k_s, v_s, size, batch, heads, chunks, blocks,
    scale,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills partials [chunks, heads, KERNEL_Y * KERNEL_X, height * width].

    `blocks` is the most blocks of keys that a tile meets; maps chunk, chunk + chunks, ... are one chunk's.

    local memory: up to 128 bytes: at 256 channels the addresses of four tiles, the same for every map, stay in
    registers beside the tiles.
    """
    program = tl.program_id(0)
    head = program % heads
    first = program // heads % blocks * BLOCK_N
    tile = program // heads // blocks
    tiles = size[2] * size[3] * size[4] * size[5]
    chunk = (tile // tiles).to(tl.int64)
    group_y, group_x, length_y, length_x, first_y, first_x, end_y, end_x = tile_place(
        tile % tiles, size, TILE_Y, TILE_X
    )
    query_y, query_x, query_valid = tile_numbers(first_y, first_x, end_y, end_x, TILE_Y, TILE_X, BLOCK_M)
    begin_y, height = keys_of(first_y, end_y, length_y, KERNEL_Y, CAUSAL_Y)
    begin_x, width = keys_of(first_x, end_x, length_x, KERNEL_X, CAUSAL_X)
    y, x, key_valid = box_numbers(first, begin_y, begin_x, width, height * width, BLOCK_N)
    q_rows = token_offsets(q_s, query_y, query_x, group_y, group_x, size)
    lse_rows = token_offsets(lse_s, query_y, query_x, group_y, group_x, size)
    k_rows = token_offsets(k_s, y, x, group_y, group_x, size)
    v_rows = token_offsets(v_s, y, x, group_y, group_x, size)
    x = tl.where(key_valid, x, NOWHERE)
    inside = query_valid[:, None] & in_window(
        query_y[:, None], query_x[:, None], y[None, :], x[None, :], length_y, length_x,
        KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, TILE_Y,
    )  # fmt: skip
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A tile near the border or of a shorter group may meet fewer blocks.
    maps = tl.where(first < height * width, ((batch - chunk + chunks - 1) // chunks).to(tl.int32), 0)
    for i in range(0, maps):
        at = chunk + i * chunks
        query = load_tile(
            q + map_offset(q_s, at, head), tile_offsets(q_rows, 1, q_s[4], BLOCK_D),
            tile_mask(query_valid, BLOCK_D, HEAD_DIM),
        )  # fmt: skip
        key = load_tile(
            k + map_offset(k_s, at, head), tile_offsets(k_rows, 1, k_s[4], BLOCK_D),
            tile_mask(key_valid, BLOCK_D, HEAD_DIM),
        )  # fmt: skip
        row_lse = tl.load(lse + map_offset(lse_s, at, head) + lse_rows, mask=query_valid, other=INF)
        delta_rows = delta_offsets(at, heads, head, query_y, query_x, group_y, group_x, size)
        row_delta = tl.load(delta + delta_rows, mask=query_valid, other=0.0)
        logits = neighbor_logits(
            dot(query, tl.trans(key)), scale, rpb, head, query_y[:, None], query_x[:, None],
            y[None, :], x[None, :], inside, KERNEL_Y, KERNEL_X,
        )  # fmt: skip
        weights = probabilities(logits, row_lse)
        if norm is not None:
            weights *= tl.load(norm + delta_rows, mask=query_valid, other=0.0)[:, None]
        if grad_out is not None:
            rows = token_offsets(go_s, query_y, query_x, group_y, group_x, size)
            grad_result = load_tile(
                grad_out + map_offset(go_s, at, head), tile_offsets(rows, 1, go_s[4], BLOCK_V),
                tile_mask(query_valid, BLOCK_V, VALUE_DIM),
            )  # fmt: skip
            value = load_tile(
                v + map_offset(v_s, at, head), tile_offsets(v_rows, 1, v_s[4], BLOCK_V),
                tile_mask(key_valid, BLOCK_V, VALUE_DIM),
            )  # fmt: skip
            accumulator += logit_gradient(weights, dot(grad_result, tl.trans(value)), row_delta)
        else:
            accumulator -= weights * row_delta[:, None]
    start_y = window_start(query_y, length_y, KERNEL_Y, CAUSAL_Y)
    start_x = window_start(query_x, length_x, KERNEL_X, CAUSAL_X)
    place = (y[None, :] - start_y[:, None]) * KERNEL_X + (x[None, :] - start_x[:, None])
    tokens = tl.cast(size[0], tl.int64) * size[1]
    token = (group_y + query_y * size[2]).to(tl.int64) * size[1] + group_x + query_x * size[3]
    base = partials + (chunk * heads + head) * (KERNEL_Y * KERNEL_X) * tokens
    tl.store(base + (place.to(tl.int64) * tokens + token[:, None]), accumulator, mask=inside)


@jit(do_not_specialize=["chunks"])
def reduce_rpb_map(
    grad_rpb, partials, stride_h, stride_y, stride_x, size, heads, chunks,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums partials into grad_rpb [heads, 2 KERNEL_Y - 1, 2 KERNEL_X - 1], one program an entry.

    Floor: the partials, each read once.
    """
    PITCH: tl.constexpr = 2 * KERNEL_X - 1
    ENTRIES: tl.constexpr = (2 * KERNEL_Y - 1) * PITCH
    program = tl.program_id(0)
    head = (program // ENTRIES).to(tl.int64)
    entry = program % ENTRIES
    tokens = tl.cast(size[0], tl.int64) * size[1]
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size[0] * size[1], BLOCK):
        token = first + tl.arange(0, BLOCK)
        position_y = token // size[1]
        position_x = token % size[1]
        y = position_y // size[2]
        x = position_x // size[3]
        group_y = position_y % size[2]
        group_x = position_x % size[3]
        length_y = size[0] // size[2] + tl.where(group_y < size[0] % size[2], 1, 0)
        length_x = size[1] // size[3] + tl.where(group_x < size[1] % size[3], 1, 0)
        place_y = y + entry // PITCH - (KERNEL_Y - 1) - window_start(y, length_y, KERNEL_Y, False)
        place_x = x + entry % PITCH - (KERNEL_X - 1) - window_start(x, length_x, KERNEL_X, False)
        seen = (place_y >= 0) & (place_y < KERNEL_Y) & (place_x >= 0) & (place_x < KERNEL_X)
        seen = seen & (position_y < size[0])
        rows = (head * (KERNEL_Y * KERNEL_X) + place_y * KERNEL_X + place_x) * tokens + token
        for chunk in range(0, chunks):
            of_chunk = tl.cast(chunk, tl.int64) * heads * (KERNEL_Y * KERNEL_X) * tokens
            sums += tl.load(partials + of_chunk + rows, mask=seen, other=0.0)
    place = (
        head * stride_h + (entry // PITCH).to(tl.int64) * stride_y + (entry % PITCH).to(tl.int64) * stride_x
    )
    tl.store(grad_rpb + place, tl.sum(sums, 0).to(grad_rpb.dtype.element_ty))
