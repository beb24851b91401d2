"""Backward of strip attention in Triton; every result has one owner, sums are in a fixed order, no atomics.

Where one tile holds all keys, `backward_keys` does everything: a program walks through a share of the queries, whose
gradients it owns; the weights are computed once, and out is not read. The shares' gradients of keys and values are
summed by `sum_shares`. With several tiles, `backward_queries` owns the gradients of queries and logits and what each
query subtracts (delta), and `backward_keys` those of a tile of keys and a share of the queries.

The gradient of a query of one channel could follow from delta and the product of (weights * key) with the values. That
costs what the product for the weights' gradient costs, rounds its operand, and takes the difference of two sums that
nearly cancel; so queries and keys take theirs from the logits' gradient, as with several channels.

Floor of a head: reads q, k, v, grad_out, lse (out too with several tiles) and writes the three gradients,
s (N (2 r + dv) + 2 M (r + dv)) + 4 N bytes; 4 N M dv FLOPs and N M exponentials (6 N M dv and 2 N M with several).
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
    store_tile,
    tile_mask,
    tile_offsets,
)
from vitkernels.kernels.strip_attention.triton_logits import load_channels, store_channels, tile_logits


@jit
def load_rows(base, rows, valid, row_stride, other):
    return tl.load(base + rows.to(tl.int64) * row_stride, mask=valid, other=other)


@jit
def store_logit_gradient(base, queries, keys, query_valid, key_valid, stride_n, stride_m, gradient):
    offsets = queries.to(tl.int64)[:, None] * stride_n + keys.to(tl.int64)[None, :] * stride_m
    store_tile(base, offsets, query_valid[:, None] & key_valid[None, :], gradient)


@jit
def query_gradient(grad_logits, key, OUTER: tl.constexpr):
    """Without the scale. [queries] for one channel, else [queries, BLOCK_R]."""
    if OUTER:
        return tl.sum(grad_logits * key.to(tl.float32)[None, :], 1)
    else:
        return dot(grad_logits.to(key.dtype), key)


@jit(do_not_specialize=["shares", "tiles_a_share"])
def backward_keys(
    grad_q, grad_k, grad_v, grad_bias, partial_k, partial_v, delta, factors, grad_out, grad_lse, lse, q, k, v, bias,
    gq_b, gq_h, gq_n, gq_c, gk_b, gk_h, gk_n, gk_c, gv_b, gv_h, gv_n, gv_c, gb_b, gb_h, gb_n, gb_m,
    go_b, go_h, go_n, go_c, gl_b, gl_h, gl_n, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c,
    v_b, v_h, v_n, v_c, bias_b, bias_h, bias_n, bias_m,
    heads, query_count, key_count, shares, tiles_a_share, scale,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and of their values from a share of the queries: into partial_k and partial_v
    [batch * heads, shares, keys, channels] where these are given, else into grad_k and grad_v, any of them absent.

    Without delta the tile holds all keys, and the gradients of queries and logits are written too. factors are those
    of `backward_queries`, or None.

    local memory: up to 40 bytes: where it holds all keys, values stay in registers as operands from tile to tile, and
    what is used once, at the end, makes room.
    """
    tiles = (key_count + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    share = (program % shares).to(tl.int32)
    pair = program // shares // tiles
    batch = pair // heads
    head = pair % heads
    keys = (program // shares % tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_valid = keys < key_count
    mask_v = tile_mask(key_valid, BLOCK_V, VALUE_DIM)
    key = load_channels(k + batch * k_b + head * k_h, keys, key_valid, k_n, k_c, WIDTH, OUTER, BLOCK_R)
    value = load_tile(v + batch * v_b + head * v_h, tile_offsets(keys, v_n, v_c, BLOCK_V), mask_v)
    q += batch * q_b + head * q_h
    lse += batch * lse_b + head * lse_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if grad_out is not None:
        grad_out += batch * go_b + head * go_h
    # Of one channel, the terms of a key lie in a tile that is summed over the queries once, at the end.
    key_gradient = tl.zeros([BLOCK_M, BLOCK_N] if OUTER else [BLOCK_N, BLOCK_R], tl.float32)
    value_gradient = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    last = tl.minimum((share + 1) * tiles_a_share * BLOCK_M, query_count)
    for first in range(share * tiles_a_share * BLOCK_M, last, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        query_valid = queries < query_count
        query = load_channels(q, queries, query_valid, q_n, q_c, WIDTH, OUTER, BLOCK_R)
        logits = tile_logits(
            query, key, queries, keys, query_valid, key_valid, bias, bias_n, bias_m, scale, OUTER
        )
        weights = probabilities(logits, load_rows(lse, queries, query_valid, lse_n, INF))
        if delta is None:
            # lse is rounded, for logits of 1e4 to a thousandth; with all keys at hand their weights sum to one.
            total = tl.sum(weights, 1)
            weights = weights / tl.where(total == 0, 1.0, total)[:, None]
        elif factors is not None:
            weights *= tl.load(factors + pair * query_count + queries, mask=query_valid, other=0.0)[:, None]
        grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if grad_out is not None:
            grad_result = load_tile(
                grad_out,
                tile_offsets(queries, go_n, go_c, BLOCK_V),
                tile_mask(query_valid, BLOCK_V, VALUE_DIM),
            )
            grad_weights = dot(grad_result, tl.trans(value))
            if grad_v is not None or partial_v is not None:
                rounded = tl.trans(weights.to(grad_result.dtype))
                value_gradient = dot(rounded, grad_result, value_gradient)
        if delta is not None:
            row_delta = tl.load(delta + pair * query_count + queries, mask=query_valid, other=0.0)
            grad_logits = logit_gradient(weights, grad_weights, row_delta)
        else:
            # The difference first: of a single key it is exactly zero.
            grad_logits = logit_gradient(weights, grad_weights, tl.sum(weights * grad_weights, 1))
            if grad_lse is not None:
                row_gradient = load_rows(
                    grad_lse + batch * gl_b + head * gl_h, queries, query_valid, gl_n, 0.0
                )
                grad_logits += weights * row_gradient.to(tl.float32)[:, None]
        if grad_bias is not None:
            store_logit_gradient(
                grad_bias + batch * gb_b + head * gb_h, queries, keys, query_valid, key_valid, gb_n, gb_m,
                grad_logits,
            )  # fmt: skip
        if grad_q is not None:
            store_channels(
                grad_q + batch * gq_b + head * gq_h, queries, query_valid, gq_n, gq_c,
                query_gradient(grad_logits, key, OUTER) * scale, WIDTH, OUTER, BLOCK_R,
            )  # fmt: skip
        if grad_k is not None or partial_k is not None:
            if OUTER:
                key_gradient += grad_logits * query.to(tl.float32)[:, None]
            else:
                key_gradient = dot(tl.trans(grad_logits.to(query.dtype)), query, key_gradient)
    place = pair * shares + share
    if grad_k is not None or partial_k is not None:
        total = (tl.sum(key_gradient, 0) if OUTER else key_gradient) * scale
        if partial_k is not None:
            start = partial_k + place * key_count * WIDTH
            store_channels(start, keys, key_valid, WIDTH, 1, total, WIDTH, OUTER, BLOCK_R)
        else:
            start = grad_k + batch * gk_b + head * gk_h
            store_channels(start, keys, key_valid, gk_n, gk_c, total, WIDTH, OUTER, BLOCK_R)
    if partial_v is not None:
        offsets = tile_offsets(keys, VALUE_DIM, 1, BLOCK_V)
        store_tile(partial_v + place * key_count * VALUE_DIM, offsets, mask_v, value_gradient)
    elif grad_v is not None:
        offsets = tile_offsets(keys, gv_n, gv_c, BLOCK_V)
        store_tile(grad_v + batch * gv_b + head * gv_h, offsets, mask_v, value_gradient)


@jit
def backward_queries(
    grad_q, grad_bias, delta, factors, grad_out, grad_lse, out, lse, q, k, v, bias,
    gq_b, gq_h, gq_n, gq_c, gb_b, gb_h, gb_n, gb_m, go_b, go_h, go_n, go_c, gl_b, gl_h, gl_n,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    bias_b, bias_h, bias_n, bias_m, heads, query_count, key_count, scale,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills delta [batch, heads, N] and, unless they are absent, factors [batch, heads, N], grad_q and the gradient of
    the logits.

    Float32 has factors, of the weights. Where one weight of a row is large, the roundings of lse and of the product of
    grad_out and out exceed what the weights and their gradients err, which plain PyTorch's cancel; so what the weights
    sum to is divided out, but of the gradient of the logits, which is written before it is known, and what that
    gradient sums to goes into delta.
    """
    tiles = (query_count + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    batch = pair // heads
    head = pair % heads
    queries = (program % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < query_count
    mask_v = tile_mask(query_valid, BLOCK_V, VALUE_DIM)
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    grad_result = tl.zeros([BLOCK_M, BLOCK_V], q.dtype.element_ty)
    if grad_out is not None:
        grad_result = load_tile(
            grad_out + batch * go_b + head * go_h, tile_offsets(queries, go_n, go_c, BLOCK_V), mask_v
        )
        result = load_tile(
            out + batch * out_b + head * out_h, tile_offsets(queries, out_n, out_c, BLOCK_V), mask_v
        )
        row_delta = tl.sum(grad_result.to(tl.float32) * result.to(tl.float32), 1)
    row_gradient = tl.zeros([BLOCK_M], tl.float32)
    if grad_lse is not None:
        start = grad_lse + batch * gl_b + head * gl_h
        row_gradient = load_rows(start, queries, query_valid, gl_n, 0.0).to(tl.float32)
    row_delta -= row_gradient
    if factors is None:
        tl.store(delta + pair * query_count + queries, row_delta, mask=query_valid)
    if grad_q is not None or grad_bias is not None or factors is not None:
        k += batch * k_b + head * k_h
        v += batch * v_b + head * v_h
        if bias is not None:
            bias += batch * bias_b + head * bias_h
        query = load_channels(
            q + batch * q_b + head * q_h, queries, query_valid, q_n, q_c, WIDTH, OUTER, BLOCK_R
        )
        row_lse = load_rows(lse + batch * lse_b + head * lse_h, queries, query_valid, lse_n, INF)
        # Of one channel, the terms of a query lie in a tile that is summed over the keys once, at the end.
        gradient = tl.zeros([BLOCK_M, BLOCK_N] if OUTER else [BLOCK_M, BLOCK_R], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        surplus = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, key_count, BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            key_valid = keys < key_count
            key = load_channels(k, keys, key_valid, k_n, k_c, WIDTH, OUTER, BLOCK_R)
            logits = tile_logits(
                query, key, queries, keys, query_valid, key_valid, bias, bias_n, bias_m, scale, OUTER
            )
            weights = probabilities(logits, row_lse)
            grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if grad_out is not None:
                value = load_tile(
                    v, tile_offsets(keys, v_n, v_c, BLOCK_V), tile_mask(key_valid, BLOCK_V, VALUE_DIM)
                )
                grad_weights = dot(grad_result, tl.trans(value))
            grad_logits = logit_gradient(weights, grad_weights, row_delta)
            if factors is not None:
                total += tl.sum(weights, 1)
                surplus += tl.sum(grad_logits, 1)
            if grad_bias is not None:
                store_logit_gradient(
                    grad_bias + batch * gb_b + head * gb_h, queries, keys, query_valid, key_valid, gb_n, gb_m,
                    grad_logits,
                )  # fmt: skip
            if OUTER:
                gradient += grad_logits * key.to(tl.float32)[None, :]
            else:
                gradient = dot(grad_logits.to(key.dtype), key, gradient)
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        if factors is not None:
            factor = 1.0 / tl.where(total == 0, 1.0, total)
            tl.store(factors + pair * query_count + queries, factor, mask=query_valid)
            row_delta += surplus * factor - row_gradient
            tl.store(delta + pair * query_count + queries, row_delta, mask=query_valid)
        if grad_q is not None:
            result = tl.sum(gradient, 1) * factor if OUTER else gradient * factor[:, None]
            start = grad_q + batch * gq_b + head * gq_h
            store_channels(start, queries, query_valid, gq_n, gq_c, result * scale, WIDTH, OUTER, BLOCK_R)


@jit(do_not_specialize=["shares"])
def sum_shares(
    grad, partial, grad_b, grad_h, grad_n, grad_c, heads, key_count, shares,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """grad [batch, heads, keys, WIDTH]: partial [batch * heads, shares, keys, WIDTH] summed in order of the shares.

    Floor: 4 bytes of each partial, read once.
    """
    tiles = (key_count + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    keys = (program % tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = tile_mask(keys < key_count, BLOCK_W, WIDTH)
    offsets = tile_offsets(keys, WIDTH, 1, BLOCK_W)
    partial += pair * shares * key_count * WIDTH
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for share in range(0, shares):
        total += tl.load(
            partial + tl.cast(share, tl.int64) * key_count * WIDTH + offsets, mask=mask, other=0.0
        )
    place = grad + pair // heads * grad_b + pair % heads * grad_h
    store_tile(place, tile_offsets(keys, grad_n, grad_c, BLOCK_W), mask, total)
