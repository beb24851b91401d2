"""Windows of at most 64 tokens in Triton: one tile holds a window, so nothing is read twice.

A program owns one head of the windows chunk, chunk + chunks, ... and keeps the bias tile (and, in the
backward, the summed logit gradient) in registers from window to window. Tokens are padded to 16, 32 or 64
with one warp per 16 of them (two in fp32), so a 4x4 window is one warp: packing several into a larger tile
would only surround their logits with masked blocks, and let a NaN of one window reach its neighbours.

Floor per window and head, N tokens, element size s. The forward reads q, k, v and writes out, lse:
s N (2 d + 2 dv) + 4 N bytes; 2 N^2 (d + dv) FLOPs; N^2 exponentials. The backward reads q, k, v, grad_out,
lse and writes grad_q, grad_k, grad_v: s N (4 d + 3 dv) + 4 N bytes; 2 N^2 (3 d + 2 dv) FLOPs; N^2
exponentials; and, for the bias gradient, 8 N^2 bytes per chunk, written here and read by its reduction. At
N = 49, d = 16, dv = 32 in fp16 that is 24 and 34 FLOP/byte: bound by memory on GPUs with tensor cores.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    INF,
    LOG2E,
    channel_offset,
    dot,
    load_tile,
    logit_gradient,
    natural_lse,
    probabilities,
    slice_mask,
    softmax_start,
    softmax_step,
    store_tile,
    tile_offsets,
)
from vitkernels.core.triton_window_bias import bias_logits, partial_offset


@jit
def whole_logits(
    q, k, tokens, valid, bias, q_n, q_c, k_n, k_c, scale,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL_D: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of one window; q and k point at it."""
    logits = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.range(0, HEAD_DIM, BLOCK_D, loop_unroll_factor=UNROLL_D):
        mask = slice_mask(valid, first, BLOCK_D, HEAD_DIM)
        query = load_tile(q + channel_offset(first, q_c), tile_offsets(tokens, q_n, q_c, BLOCK_D), mask)
        key = load_tile(k + channel_offset(first, k_c), tile_offsets(tokens, k_n, k_c, BLOCK_D), mask)
        logits = dot(query, tl.trans(key), logits)
    return logits * (scale * LOG2E) + bias


@jit(do_not_specialize=["batch", "chunks"])
def forward_whole(
    out, lse, q, k, v, table,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c,
    v_b, v_h, v_n, v_c, table_h, table_t, batch, heads, chunks, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    UNROLL_D: tl.constexpr, UNROLL_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    chunk = program // heads
    tokens = tl.arange(0, BLOCK)
    valid = tokens < WINDOW_H * WINDOW_W
    bias = bias_logits(table, head, table_h, table_t, tokens, tokens, WINDOW_H, WINDOW_W, SIGNED)
    windows = ((batch - chunk + chunks - 1) // chunks).to(tl.int32)
    for i in range(0, windows):
        window = chunk + i * chunks
        logits = whole_logits(
            q + window * q_b + head * q_h, k + window * k_b + head * k_h, tokens, valid, bias,
            q_n, q_c, k_n, k_c, scale, HEAD_DIM, BLOCK, BLOCK_D, UNROLL_D,
        )  # fmt: skip
        maximum, total = softmax_start(BLOCK)
        weights, _, maximum, total = softmax_step(logits, maximum, total)
        rounded = weights.to(v.dtype.element_ty)
        for first in tl.range(0, VALUE_DIM, BLOCK_V, loop_unroll_factor=UNROLL_V):
            mask = slice_mask(valid, first, BLOCK_V, VALUE_DIM)
            place = v + window * v_b + head * v_h + channel_offset(first, v_c)
            value = load_tile(place, tile_offsets(tokens, v_n, v_c, BLOCK_V), mask)
            result = dot(rounded, value) / total[:, None]
            place = out + window * out_b + head * out_h + channel_offset(first, out_c)
            store_tile(place, tile_offsets(tokens, out_n, out_c, BLOCK_V), mask, result)
        rows = tokens.to(tl.int64) * lse_n
        tl.store(lse + window * lse_b + head * lse_h + rows, natural_lse(maximum, total), mask=valid)


@jit(do_not_specialize=["batch", "chunks"])
def backward_whole(
    grad_q, grad_k, grad_v, partials, grad_out, grad_lse, lse, q, k, v, table,
    gq_b, gq_h, gq_n, gq_c, gk_b, gk_h, gk_n, gk_c, gv_b, gv_h, gv_n, gv_c, go_b, go_h, go_n, go_c,
    gl_b, gl_h, gl_n, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    table_h, table_t, batch, heads, chunks, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SIGNED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    UNROLL_D: tl.constexpr, UNROLL_V: tl.constexpr,
):  # fmt: skip
    """Every gradient of a window; partials [chunks, heads, N, N] get the chunk's summed logit gradient.

    delta is sum_m P dP, taken from the tile at hand, so that out need not be read. q and k are read a second
    time, from the cache, rather than kept in registers across the values.

    local memory: up to 448 bytes: where rows are not dense (views of NCHW maps, over 16 tokens) every element
    has a mask and a 64-bit offset of its own, beside four N x N tiles. Dense rows do not spill.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    chunk = program // heads
    tokens = tl.arange(0, BLOCK)
    valid = tokens < TOKENS
    bias = bias_logits(table, head, table_h, table_t, tokens, tokens, WINDOW_H, WINDOW_W, SIGNED)
    bias_gradient = tl.zeros([BLOCK, BLOCK], tl.float32)
    windows = ((batch - chunk + chunks - 1) // chunks).to(tl.int32)
    for i in range(0, windows):
        window = chunk + i * chunks
        logits = whole_logits(
            q + window * q_b + head * q_h, k + window * k_b + head * k_h, tokens, valid, bias,
            q_n, q_c, k_n, k_c, scale, HEAD_DIM, BLOCK, BLOCK_D, UNROLL_D,
        )  # fmt: skip
        rows = tokens.to(tl.int64)
        row_lse = tl.load(lse + window * lse_b + head * lse_h + rows * lse_n, mask=valid, other=INF)
        weights = probabilities(logits, row_lse)
        if q.dtype.element_ty == tl.float32:
            # lse is rounded, for logits of 100 to a hundred-thousandth, which drowns in half precision's weights; with
            # all keys at hand they sum to one.
            row_sum = tl.sum(weights, 1)
            weights = weights / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
        grad_weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        delta = tl.zeros([BLOCK], tl.float32)
        if grad_out is not None:
            rounded = weights.to(v.dtype.element_ty)
            for first in tl.range(0, VALUE_DIM, BLOCK_V, loop_unroll_factor=UNROLL_V):
                mask = slice_mask(valid, first, BLOCK_V, VALUE_DIM)
                place = grad_out + window * go_b + head * go_h + channel_offset(first, go_c)
                grad_result = load_tile(place, tile_offsets(tokens, go_n, go_c, BLOCK_V), mask)
                if grad_v is not None:
                    place = grad_v + window * gv_b + head * gv_h + channel_offset(first, gv_c)
                    grad_value = dot(tl.trans(rounded), grad_result)
                    store_tile(place, tile_offsets(tokens, gv_n, gv_c, BLOCK_V), mask, grad_value)
                place = v + window * v_b + head * v_h + channel_offset(first, v_c)
                value = load_tile(place, tile_offsets(tokens, v_n, v_c, BLOCK_V), mask)
                grad_weights = dot(grad_result, tl.trans(value), grad_weights)
            delta = tl.sum(weights * grad_weights, 1)
        if grad_lse is not None:
            delta -= tl.load(grad_lse + window * gl_b + head * gl_h + rows * gl_n, mask=valid, other=0.0)
        grad_logits = logit_gradient(weights, grad_weights, delta)
        if partials is not None:
            bias_gradient += grad_logits
        rounded = grad_logits.to(q.dtype.element_ty)
        for first in tl.range(0, HEAD_DIM, BLOCK_D, loop_unroll_factor=UNROLL_D):
            mask = slice_mask(valid, first, BLOCK_D, HEAD_DIM)
            if grad_q is not None:
                place = k + window * k_b + head * k_h + channel_offset(first, k_c)
                key = load_tile(place, tile_offsets(tokens, k_n, k_c, BLOCK_D), mask)
                place = grad_q + window * gq_b + head * gq_h + channel_offset(first, gq_c)
                store_tile(place, tile_offsets(tokens, gq_n, gq_c, BLOCK_D), mask, dot(rounded, key) * scale)
            if grad_k is not None:
                place = q + window * q_b + head * q_h + channel_offset(first, q_c)
                query = load_tile(place, tile_offsets(tokens, q_n, q_c, BLOCK_D), mask)
                place = grad_k + window * gk_b + head * gk_h + channel_offset(first, gk_c)
                grad_key = dot(tl.trans(rounded), query) * scale
                store_tile(place, tile_offsets(tokens, gk_n, gk_c, BLOCK_D), mask, grad_key)
    if partials is not None:
        place = partials + partial_offset(chunk, heads, head, TOKENS)
        pair = tokens[:, None] * TOKENS + tokens[None, :]
        store_tile(place, pair, valid[:, None] & valid[None, :], bias_gradient)
