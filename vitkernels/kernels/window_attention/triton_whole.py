"""Windows of at most 64 tokens in Triton: one tile holds a window, so nothing is read twice.

A program owns one head of the windows chunk, chunk + chunks, ... and keeps the bias tile (and, in the backward,
the summed logit gradient) in registers from window to window. Tiles are [tokens rounded up to 16, 32 or 64]
with one warp per 16 rows, which for 4x4 windows is one warp a program: packing several of them into a larger
tile would only multiply the logits by masked blocks, and would let a NaN of one window reach its neighbours.

Floor per window and head, N tokens, element size s: forward reads q, k, v and writes out, lse:
s N (2 d + 2 dv) + 4 N bytes; 2 N^2 (d + dv) FLOPs; N^2 exponentials. Backward reads q, k, v, grad_out, lse and
writes grad_q, grad_k, grad_v: s N (4 d + 3 dv) + 4 N bytes; 2 N^2 (3 d + 2 dv) FLOPs; N^2 exponentials. At
N = 49, d = 16, dv = 32 in fp16 that is 23 and 31 FLOP/byte: bound by memory on every GPU with tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
from vitkernels.kernels.window_attention.triton_bias import bias_logits, partial_offset


@triton.jit(do_not_specialize=["batch", "chunks"])
def forward_whole(
    out, lse, q, k, v, table,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    table_h, table_t, batch, heads, chunks, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    chunk = program // heads
    tokens = tl.arange(0, BLOCK)
    valid = tokens < WINDOW_H * WINDOW_W
    mask_d = tile_mask(valid, BLOCK_D, HEAD_DIM)
    mask_v = tile_mask(valid, BLOCK_V, VALUE_DIM)
    q_tile = tile_offsets(tokens, q_n, q_c, BLOCK_D)
    k_tile = tile_offsets(tokens, k_n, k_c, BLOCK_D)
    v_tile = tile_offsets(tokens, v_n, v_c, BLOCK_V)
    out_tile = tile_offsets(tokens, out_n, out_c, BLOCK_V)
    bias = bias_logits(table, head, table_h, table_t, tokens, tokens, WINDOW_H, WINDOW_W, SIGNED)
    windows = ((batch - chunk + chunks - 1) // chunks).to(tl.int32)
    for i in range(0, windows):
        window = chunk + i * chunks
        query = load_tile(q + window * q_b + head * q_h, q_tile, mask_d)
        key = load_tile(k + window * k_b + head * k_h, k_tile, mask_d)
        value = load_tile(v + window * v_b + head * v_h, v_tile, mask_v)
        logits = dot(query, tl.trans(key)) * (scale * LOG2E) + bias
        maximum, total = softmax_start(BLOCK)
        weights, _, maximum, total = softmax_step(logits, maximum, total)
        result, row_lse = softmax_finish(dot(weights.to(value.dtype), value), maximum, total)
        store_tile(out + window * out_b + head * out_h, out_tile, mask_v, result)
        tl.store(lse + window * lse_b + head * lse_h + tokens.to(tl.int64) * lse_n, row_lse, mask=valid)


@triton.jit(do_not_specialize=["batch", "chunks"])
def backward_whole(
    grad_q, grad_k, grad_v, partials, grad_out, grad_lse, lse, q, k, v, table,
    gq_b, gq_h, gq_n, gq_c, gk_b, gk_h, gk_n, gk_c, gv_b, gv_h, gv_n, gv_c, go_b, go_h, go_n, go_c,
    gl_b, gl_h, gl_n, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    table_h, table_t, batch, heads, chunks, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Every gradient of a window from one reading; partials [chunks, heads, N, N] get the summed dL.

    delta is sum_m P dP, taken from the tile at hand, so that out need not be read.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    chunk = program // heads
    tokens = tl.arange(0, BLOCK)
    valid = tokens < TOKENS
    mask_d = tile_mask(valid, BLOCK_D, HEAD_DIM)
    mask_v = tile_mask(valid, BLOCK_V, VALUE_DIM)
    q_tile = tile_offsets(tokens, q_n, q_c, BLOCK_D)
    k_tile = tile_offsets(tokens, k_n, k_c, BLOCK_D)
    bias = bias_logits(table, head, table_h, table_t, tokens, tokens, WINDOW_H, WINDOW_W, SIGNED)
    bias_gradient = tl.zeros([BLOCK, BLOCK], tl.float32)
    windows = ((batch - chunk + chunks - 1) // chunks).to(tl.int32)
    for i in range(0, windows):
        window = chunk + i * chunks
        query = load_tile(q + window * q_b + head * q_h, q_tile, mask_d)
        key = load_tile(k + window * k_b + head * k_h, k_tile, mask_d)
        row_lse = tl.load(
            lse + window * lse_b + head * lse_h + tokens.to(tl.int64) * lse_n, mask=valid, other=INF
        )
        logits = dot(query, tl.trans(key)) * (scale * LOG2E) + bias
        weights = probabilities(logits, row_lse)
        grad_weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        delta = tl.zeros([BLOCK], tl.float32)
        if grad_out is not None:
            go_tile = tile_offsets(tokens, go_n, go_c, BLOCK_V)
            grad_result = load_tile(grad_out + window * go_b + head * go_h, go_tile, mask_v)
            if grad_v is not None:
                gv_tile = tile_offsets(tokens, gv_n, gv_c, BLOCK_V)
                grad_value = dot(tl.trans(weights.to(grad_result.dtype)), grad_result)
                store_tile(grad_v + window * gv_b + head * gv_h, gv_tile, mask_v, grad_value)
            v_tile = tile_offsets(tokens, v_n, v_c, BLOCK_V)
            value = load_tile(v + window * v_b + head * v_h, v_tile, mask_v)
            grad_weights = dot(grad_result, tl.trans(value))
            delta = tl.sum(weights * grad_weights, 1)
        if grad_lse is not None:
            gl_rows = tokens.to(tl.int64) * gl_n
            delta -= tl.load(grad_lse + window * gl_b + head * gl_h + gl_rows, mask=valid, other=0.0)
        grad_logits = logit_gradient(weights, grad_weights, delta)
        if partials is not None:
            bias_gradient += grad_logits
        rounded = grad_logits.to(query.dtype)
        if grad_q is not None:
            gq_tile = tile_offsets(tokens, gq_n, gq_c, BLOCK_D)
            store_tile(grad_q + window * gq_b + head * gq_h, gq_tile, mask_d, dot(rounded, key) * scale)
        if grad_k is not None:
            gk_tile = tile_offsets(tokens, gk_n, gk_c, BLOCK_D)
            grad_key = dot(tl.trans(rounded), query) * scale
            store_tile(grad_k + window * gk_b + head * gk_h, gk_tile, mask_d, grad_key)
    if partials is not None:
        place = partials + partial_offset(chunk, heads, head, TOKENS)
        pair = tile_offsets(tokens, TOKENS, 1, BLOCK)
        store_tile(place, pair, tile_mask(valid, BLOCK, TOKENS), bias_gradient)
