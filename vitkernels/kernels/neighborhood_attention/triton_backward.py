"""Neighborhood attention backward in Triton: query tiles own delta and grad_q, key tiles own grad_k and grad_v.

A key tile meets the box of the queries that see any of its keys (the inverse neighborhood, an interval along each
axis). Nobody adds to another's result: no atomics, a fixed order.

Floor per map and head: reads q, k, v, grad_out, lse and writes grad_q, grad_k, grad_v: s T (4 d + 3 dv) + 4 T
bytes; 2 T K (3 d + 2 dv) FLOPs; T K exponentials. Here the second owner computes logits and their gradient again,
2 T K (d + dv) FLOPs, as does the walk for delta in float32; else delta reads out.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    INF,
    LOG2E,
    dot,
    load_tile,
    logit_gradient,
    probabilities,
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
    queries_of,
    tile_numbers,
    tile_place,
    token_offsets,
)


@jit
def delta_offsets(batch, heads, head, y, x, group_y, group_x, size):
    """Offsets of tokens in delta, [batch, height, width, heads]."""
    position_y = (group_y + y * size[2]).to(tl.int64)
    position_x = (group_x + x * size[3]).to(tl.int64)
    return ((batch * size[0] + position_y) * size[1] + position_x) * heads + head


@jit
def query_block(
    first, query, grad_result, row_lse, keys, values, rpb, k_s, v_s, query_y, query_x, query_valid, group_y,
    group_x, length_y, length_x, begin_y, begin_x, width, count, size, head, scale, HAS_GRAD_OUT: tl.constexpr,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(keys, softmax weights, their gradient) of a tile of queries and the keys from slot `first` of its box on."""
    y, x, key_valid = box_numbers(first, begin_y, begin_x, width, count, BLOCK_N)
    k_rows = token_offsets(k_s, y, x, group_y, group_x, size)
    key = load_tile(keys, tile_offsets(k_rows, 1, k_s[4], BLOCK_D), tile_mask(key_valid, BLOCK_D, HEAD_DIM))
    v_rows = token_offsets(v_s, y, x, group_y, group_x, size)
    x = tl.where(key_valid, x, NOWHERE)
    inside = query_valid[:, None] & in_window(
        query_y[:, None], query_x[:, None], y[None, :], x[None, :], length_y, length_x,
        KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, TILE_Y,
    )  # fmt: skip
    logits = neighbor_logits(
        dot(query, tl.trans(key)), scale, rpb, head, query_y[:, None], query_x[:, None],
        y[None, :], x[None, :], inside, KERNEL_Y, KERNEL_X,
    )  # fmt: skip
    weights = probabilities(logits, row_lse)
    grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_GRAD_OUT:
        value = load_tile(
            values, tile_offsets(v_rows, 1, v_s[4], BLOCK_V), tile_mask(key_valid, BLOCK_V, VALUE_DIM)
        )
        grad_weights = dot(grad_result, tl.trans(value))
    return key, weights, grad_weights


@jit
def backward_query_map(
    grad_q, delta, norm, grad_out, grad_lse, out, lse, q, k, v, rpb,
    gq_s, go_s, gl_s, out_s, lse_s, q_s, k_s, v_s, size, heads, scale,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills delta [batch, height, width, heads] and, unless they are absent, norm of the same shape and grad_q.

    norm, for float32, is the factor with which a row's softmax weights sum to 1: lse is rounded, which scales a whole
    row by more than its weights' own errors. There delta is the sum of weights and their gradients, from a walk of its
    own, because the rounding of out would not cancel in rows of a single large weight.

    local memory: up to 384 bytes: float32 products take whole rows of q and grad_out in registers, which beyond 64
    channels are more than there are.
    """
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
    mask_q = tile_mask(query_valid, BLOCK_D, HEAD_DIM)
    mask_v = tile_mask(query_valid, BLOCK_V, VALUE_DIM)
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    grad_result = tl.zeros([BLOCK_M, BLOCK_V], q.dtype.element_ty)
    if grad_out is not None:
        rows = token_offsets(go_s, query_y, query_x, group_y, group_x, size)
        grad_result = load_tile(
            grad_out + map_offset(go_s, batch, head), tile_offsets(rows, 1, go_s[4], BLOCK_V), mask_v
        )
    rows = token_offsets(q_s, query_y, query_x, group_y, group_x, size)
    query = load_tile(q + map_offset(q_s, batch, head), tile_offsets(rows, 1, q_s[4], BLOCK_D), mask_q)
    rows = token_offsets(lse_s, query_y, query_x, group_y, group_x, size)
    row_lse = tl.load(lse + map_offset(lse_s, batch, head) + rows, mask=query_valid, other=INF)
    keys = k + map_offset(k_s, batch, head)
    values = v + map_offset(v_s, batch, head)
    delta_rows = delta_offsets(batch, heads, head, query_y, query_x, group_y, group_x, size)
    if norm is not None:
        for first in range(0, height * width, BLOCK_N):
            _, weights, grad_weights = query_block(
                first, query, grad_result, row_lse, keys, values, rpb, k_s, v_s, query_y, query_x,
                query_valid, group_y, group_x, length_y, length_x, begin_y, begin_x, width, height * width, size, head,
                scale, grad_out is not None, KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, HEAD_DIM, VALUE_DIM, TILE_Y,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            row_sum += tl.sum(weights, 1)
            row_delta += tl.sum(weights * grad_weights, 1)
        row_delta = row_delta / row_sum
        tl.store(norm + delta_rows, 1.0 / row_sum, mask=query_valid)
    elif grad_out is not None:
        rows = token_offsets(out_s, query_y, query_x, group_y, group_x, size)
        result = load_tile(
            out + map_offset(out_s, batch, head), tile_offsets(rows, 1, out_s[4], BLOCK_V), mask_v
        )
        row_delta = tl.sum(grad_result.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        rows = token_offsets(gl_s, query_y, query_x, group_y, group_x, size)
        row_delta -= tl.load(grad_lse + map_offset(gl_s, batch, head) + rows, mask=query_valid, other=0.0)
    tl.store(delta + delta_rows, row_delta, mask=query_valid)
    if grad_q is not None:
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, height * width, BLOCK_N):
            key, weights, grad_weights = query_block(
                first, query, grad_result, row_lse, keys, values, rpb, k_s, v_s, query_y, query_x,
                query_valid, group_y, group_x, length_y, length_x, begin_y, begin_x, width, height * width, size, head,
                scale, grad_out is not None, KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, HEAD_DIM, VALUE_DIM, TILE_Y,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            grad_logits = logit_gradient(weights, grad_weights, row_delta)
            accumulator += dot(grad_logits.to(key.dtype), key)
        if norm is not None:
            accumulator = accumulator / row_sum[:, None]
        rows = token_offsets(gq_s, query_y, query_x, group_y, group_x, size)
        place = grad_q + map_offset(gq_s, batch, head)
        store_tile(place, tile_offsets(rows, 1, gq_s[4], BLOCK_D), mask_q, accumulator * scale)


@jit
def backward_key_map(
    grad_k, grad_v, grad_out, lse, delta, norm, q, k, v, rpb,
    gk_s, gv_s, go_s, lse_s, q_s, k_s, v_s, size, heads, scale,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills grad_k and grad_v, either of which may be absent.

    Logits lie transposed, [keys, queries], so that a product with the queries' rows takes them as they are.

    local memory: up to 32 bytes: at 256 channels two accumulators of whole rows leave few registers for addresses.
    """
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    tiles = size[2] * size[3] * size[4] * size[5]
    batch = (tile // tiles).to(tl.int64)
    group_y, group_x, length_y, length_x, first_y, first_x, end_y, end_x = tile_place(
        tile % tiles, size, TILE_Y, TILE_X
    )
    key_y, key_x, key_valid = tile_numbers(first_y, first_x, end_y, end_x, TILE_Y, TILE_X, BLOCK_M)
    begin_y, height = queries_of(first_y, end_y, length_y, KERNEL_Y, CAUSAL_Y)
    begin_x, width = queries_of(first_x, end_x, length_x, KERNEL_X, CAUSAL_X)
    mask_k = tile_mask(key_valid, BLOCK_D, HEAD_DIM)
    mask_v = tile_mask(key_valid, BLOCK_V, VALUE_DIM)
    rows = token_offsets(k_s, key_y, key_x, group_y, group_x, size)
    key = load_tile(k + map_offset(k_s, batch, head), tile_offsets(rows, 1, k_s[4], BLOCK_D), mask_k)
    rows = token_offsets(v_s, key_y, key_x, group_y, group_x, size)
    value = load_tile(v + map_offset(v_s, batch, head), tile_offsets(rows, 1, v_s[4], BLOCK_V), mask_v)
    queries = q + map_offset(q_s, batch, head)
    lse_map = lse + map_offset(lse_s, batch, head)
    key_gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(0, height * width, BLOCK_N):
        y, x, query_valid = box_numbers(first, begin_y, begin_x, width, height * width, BLOCK_N)
        columns = token_offsets(q_s, y, x, group_y, group_x, size)
        query = load_tile(
            queries, tile_offsets(columns, 1, q_s[4], BLOCK_D), tile_mask(query_valid, BLOCK_D, HEAD_DIM)
        )
        columns = token_offsets(lse_s, y, x, group_y, group_x, size)
        column_lse = tl.load(lse_map + columns, mask=query_valid, other=INF)
        columns = delta_offsets(batch, heads, head, y, x, group_y, group_x, size)
        column_delta = tl.load(delta + columns, mask=query_valid, other=0.0)
        inside = in_window(
            y[None, :], x[None, :], key_y[:, None], key_x[:, None], length_y, length_x,
            KERNEL_Y, KERNEL_X, CAUSAL_Y, CAUSAL_X, TILE_Y,
        ) & (query_valid[None, :] & key_valid[:, None])  # fmt: skip
        logits = neighbor_logits(
            dot(key, tl.trans(query)), scale, rpb, head, y[None, :], x[None, :],
            key_y[:, None], key_x[:, None], inside, KERNEL_Y, KERNEL_X,
        )  # fmt: skip
        weights = tl.exp2(logits - (column_lse * LOG2E)[None, :])
        if norm is not None:
            weights *= tl.load(norm + columns, mask=query_valid, other=0.0)[None, :]
        if grad_out is not None:
            columns = token_offsets(go_s, y, x, group_y, group_x, size)
            grad_result = load_tile(
                grad_out + map_offset(go_s, batch, head), tile_offsets(columns, 1, go_s[4], BLOCK_V),
                tile_mask(query_valid, BLOCK_V, VALUE_DIM),
            )  # fmt: skip
            if grad_v is not None:
                value_gradient += dot(weights.to(grad_result.dtype), grad_result)
            grad_weights = dot(value, tl.trans(grad_result))
            grad_logits = weights * (grad_weights - column_delta[None, :])
        else:
            grad_logits = -weights * column_delta[None, :]
        if grad_k is not None:
            key_gradient += dot(grad_logits.to(query.dtype), query)
    if grad_k is not None:
        rows = token_offsets(gk_s, key_y, key_x, group_y, group_x, size)
        place = grad_k + map_offset(gk_s, batch, head)
        store_tile(place, tile_offsets(rows, 1, gk_s[4], BLOCK_D), mask_k, key_gradient * scale)
    if grad_v is not None:
        rows = token_offsets(gv_s, key_y, key_x, group_y, group_x, size)
        place = grad_v + map_offset(gv_s, batch, head)
        store_tile(place, tile_offsets(rows, 1, gv_s[4], BLOCK_V), mask_v, value_gradient)
