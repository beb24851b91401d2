"""Windows of any number of tokens in Triton: online softmax over key tiles; each result has one owner.

Query tiles own out, lse, grad_q and delta; key tiles own grad_k and grad_v; (query tile, key tile) pairs own
the logit gradient summed over a chunk of windows. Nobody adds to another's result: no atomics, a fixed order.

Floor per window and head: as for whole windows (triton_whole.py). Tiling adds the re-reading of keys and
values by every query tile (which the L2 cache serves) and, in the backward, 2 N^2 (d + dv) FLOPs and N^2
exponentials for each owner after the first.
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
    softmax_finish,
    softmax_start,
    softmax_step,
    store_tile,
    tile_mask,
    tile_offsets,
)
from vitkernels.core.triton_window_bias import bias_logits, partial_offset


@jit
def forward_tiled(
    out, lse, q, k, v, table,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c,
    v_b, v_h, v_n, v_c, table_h, table_t, heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    window = program // TILES // heads
    head = program // TILES % heads
    queries = (program % TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < TOKENS
    query = load_tile(
        q + window * q_b + head * q_h, tile_offsets(queries, q_n, q_c, BLOCK_D),
        tile_mask(query_valid, BLOCK_D, HEAD_DIM),
    )  # fmt: skip
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    maximum, total = softmax_start(BLOCK_M)
    for first in range(0, TOKENS, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_valid = keys < TOKENS
        key = load_tile(
            k + window * k_b + head * k_h, tile_offsets(keys, k_n, k_c, BLOCK_D),
            tile_mask(key_valid, BLOCK_D, HEAD_DIM),
        )  # fmt: skip
        value = load_tile(
            v + window * v_b + head * v_h, tile_offsets(keys, v_n, v_c, BLOCK_V),
            tile_mask(key_valid, BLOCK_V, VALUE_DIM),
        )  # fmt: skip
        bias = bias_logits(table, head, table_h, table_t, queries, keys, WINDOW_H, WINDOW_W, SIGNED)
        logits = dot(query, tl.trans(key)) * (scale * LOG2E) + bias
        weights, rescale, maximum, total = softmax_step(logits, maximum, total)
        accumulator = accumulator * rescale[:, None] + dot(weights.to(value.dtype), value)
    result, row_lse = softmax_finish(accumulator, maximum, total)
    store_tile(
        out + window * out_b + head * out_h, tile_offsets(queries, out_n, out_c, BLOCK_V),
        tile_mask(query_valid, BLOCK_V, VALUE_DIM), result,
    )  # fmt: skip
    tl.store(lse + window * lse_b + head * lse_h + queries.to(tl.int64) * lse_n, row_lse, mask=query_valid)


@jit
def tile_logit_gradient(
    query, key, value, grad_result, row_lse, delta, bias, scale, HAS_GRAD_OUT: tl.constexpr
):  # fmt: skip
    """Softmax weights and logit gradient [queries, keys] of one pair of tiles."""
    weights = probabilities(dot(query, tl.trans(key)) * (scale * LOG2E) + bias, row_lse)
    if HAS_GRAD_OUT:
        return weights, logit_gradient(weights, dot(grad_result, tl.trans(value)), delta)
    else:
        return weights, -weights * delta[:, None]


@jit
def backward_query_tiled(
    grad_q, delta, grad_out, grad_lse, out, lse, q, k, v, table,
    gq_b, gq_h, gq_n, gq_c, go_b, go_h, go_n, go_c, gl_b, gl_h, gl_n, out_b, out_h, out_n, out_c,
    lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    table_h, table_t, heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills delta [batch, heads, N] and, unless it is absent, grad_q."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    window = program // TILES // heads
    head = program // TILES % heads
    queries = (program % TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < TOKENS
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    grad_result = tl.zeros([BLOCK_M, BLOCK_V], q.dtype.element_ty)
    mask_v = tile_mask(query_valid, BLOCK_V, VALUE_DIM)
    if grad_out is not None:
        grad_result = load_tile(
            grad_out + window * go_b + head * go_h, tile_offsets(queries, go_n, go_c, BLOCK_V), mask_v
        )
        result = load_tile(
            out + window * out_b + head * out_h, tile_offsets(queries, out_n, out_c, BLOCK_V), mask_v
        )
        row_delta = tl.sum(grad_result.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        gl_rows = queries.to(tl.int64) * gl_n
        row_delta -= tl.load(grad_lse + window * gl_b + head * gl_h + gl_rows, mask=query_valid, other=0.0)
    tl.store(delta + (window * heads + head) * TOKENS + queries, row_delta, mask=query_valid)
    if grad_q is not None:
        mask_q = tile_mask(query_valid, BLOCK_D, HEAD_DIM)
        query = load_tile(q + window * q_b + head * q_h, tile_offsets(queries, q_n, q_c, BLOCK_D), mask_q)
        lse_rows = queries.to(tl.int64) * lse_n
        row_lse = tl.load(lse + window * lse_b + head * lse_h + lse_rows, mask=query_valid, other=INF)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, TOKENS, BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            key_valid = keys < TOKENS
            key = load_tile(
                k + window * k_b + head * k_h, tile_offsets(keys, k_n, k_c, BLOCK_D),
                tile_mask(key_valid, BLOCK_D, HEAD_DIM),
            )  # fmt: skip
            value = load_tile(
                v + window * v_b + head * v_h, tile_offsets(keys, v_n, v_c, BLOCK_V),
                tile_mask(key_valid, BLOCK_V, VALUE_DIM),
            )  # fmt: skip
            bias = bias_logits(table, head, table_h, table_t, queries, keys, WINDOW_H, WINDOW_W, SIGNED)
            _, grad_logits = tile_logit_gradient(
                query, key, value, grad_result, row_lse, row_delta, bias, scale, grad_out is not None
            )
            accumulator += dot(grad_logits.to(key.dtype), key)
        store_tile(
            grad_q + window * gq_b + head * gq_h, tile_offsets(queries, gq_n, gq_c, BLOCK_D), mask_q,
            accumulator * scale,
        )  # fmt: skip


@jit
def load_query_side(
    grad_out, lse, delta, q, queries, window, head, heads,
    go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """q, grad_out (zeros when absent), lse and delta of a tile of queries."""
    query_valid = queries < TOKENS
    query = load_tile(
        q + window * q_b + head * q_h, tile_offsets(queries, q_n, q_c, BLOCK_D),
        tile_mask(query_valid, BLOCK_D, HEAD_DIM),
    )  # fmt: skip
    if grad_out is not None:
        grad_result = load_tile(
            grad_out + window * go_b + head * go_h, tile_offsets(queries, go_n, go_c, BLOCK_V),
            tile_mask(query_valid, BLOCK_V, VALUE_DIM),
        )  # fmt: skip
    else:
        grad_result = tl.zeros([BLOCK_M, BLOCK_V], q.dtype.element_ty)
    lse_rows = queries.to(tl.int64) * lse_n
    row_lse = tl.load(lse + window * lse_b + head * lse_h + lse_rows, mask=query_valid, other=INF)
    row_delta = tl.load(delta + (window * heads + head) * TOKENS + queries, mask=query_valid, other=0.0)
    return query, grad_result, row_lse, row_delta


@jit
def backward_key_tiled(
    grad_k, grad_v, grad_out, lse, delta, q, k, v, table,
    gk_b, gk_h, gk_n, gk_c, gv_b, gv_h, gv_n, gv_c, go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n,
    q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c, table_h, table_t, heads, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills grad_k and grad_v, either of which may be absent."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    window = program // TILES // heads
    head = program // TILES % heads
    keys = (program % TILES).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_valid = keys < TOKENS
    mask_k = tile_mask(key_valid, BLOCK_D, HEAD_DIM)
    mask_v = tile_mask(key_valid, BLOCK_V, VALUE_DIM)
    key = load_tile(k + window * k_b + head * k_h, tile_offsets(keys, k_n, k_c, BLOCK_D), mask_k)
    value = load_tile(v + window * v_b + head * v_h, tile_offsets(keys, v_n, v_c, BLOCK_V), mask_v)
    key_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, TOKENS, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        query, grad_result, row_lse, row_delta = load_query_side(
            grad_out, lse, delta, q, queries, window, head, heads,
            go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c,
            TOKENS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        bias = bias_logits(table, head, table_h, table_t, queries, keys, WINDOW_H, WINDOW_W, SIGNED)
        weights, grad_logits = tile_logit_gradient(
            query, key, value, grad_result, row_lse, row_delta, bias, scale, grad_out is not None
        )
        if grad_v is not None:
            value_gradient += dot(tl.trans(weights.to(grad_result.dtype)), grad_result)
        if grad_k is not None:
            key_gradient += dot(tl.trans(grad_logits.to(query.dtype)), query)
    if grad_k is not None:
        gk_tile = tile_offsets(keys, gk_n, gk_c, BLOCK_D)
        store_tile(grad_k + window * gk_b + head * gk_h, gk_tile, mask_k, key_gradient * scale)
    if grad_v is not None:
        gv_tile = tile_offsets(keys, gv_n, gv_c, BLOCK_V)
        store_tile(grad_v + window * gv_b + head * gv_h, gv_tile, mask_v, value_gradient)


@jit(do_not_specialize=["batch", "chunks"])
def backward_bias_tiled(
    partials, grad_out, lse, delta, q, k, v, table,
    go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    table_h, table_t, batch, heads, chunks, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills partials [chunks, heads, N, N]: the logit gradient summed over the windows of a chunk."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES_M: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    tile = (program % (TILES_M * TILES_N)).to(tl.int32)
    head = program // (TILES_M * TILES_N) % heads
    chunk = program // (TILES_M * TILES_N) // heads
    queries = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    key_valid = keys < TOKENS
    k_tile = tile_offsets(keys, k_n, k_c, BLOCK_D)
    v_tile = tile_offsets(keys, v_n, v_c, BLOCK_V)
    bias = bias_logits(table, head, table_h, table_t, queries, keys, WINDOW_H, WINDOW_W, SIGNED)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    windows = ((batch - chunk + chunks - 1) // chunks).to(tl.int32)
    for i in range(0, windows):
        window = chunk + i * chunks
        query, grad_result, row_lse, row_delta = load_query_side(
            grad_out, lse, delta, q, queries, window, head, heads,
            go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c,
            TOKENS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        key = load_tile(k + window * k_b + head * k_h, k_tile, tile_mask(key_valid, BLOCK_D, HEAD_DIM))
        value = load_tile(v + window * v_b + head * v_h, v_tile, tile_mask(key_valid, BLOCK_V, VALUE_DIM))
        _, grad_logits = tile_logit_gradient(
            query, key, value, grad_result, row_lse, row_delta, bias, scale, grad_out is not None
        )
        accumulator += grad_logits
    pair = queries[:, None] * TOKENS + keys[None, :]
    mask = (queries < TOKENS)[:, None] & key_valid[None, :]
    store_tile(partials + partial_offset(chunk, heads, head, TOKENS), pair, mask, accumulator)
