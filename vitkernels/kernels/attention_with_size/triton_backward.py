"""Backward of proportional attention in Triton; every result has one owner, sums are in a fixed order, no atomics.

`backward_queries` owns the gradient of a tile of queries and what each of them subtracts (delta), `backward_keys` those
of a tile of keys and of their values. Both compute the weights again from lse. Floor of a head, N queries, M keys,
element size s: reads q, k, v, out, grad_out, lse and writes three gradients, 2 s (N + M) (d + dv) + 4 N bytes; with the
logits and the weights' gradients computed twice, N M (8 d + 6 dv) FLOPs and 2 N M exponentials.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, dot, logit_gradient, probabilities
from vitkernels.kernels.attention_with_size.triton_forward import (
    load_channels,
    load_rows,
    size_logits,
    store_channels,
    tile_logits,
)


@jit(do_not_specialize=["gl_b", "gl_h", "lse_b", "lse_h", "size_b", "query_count", "key_count"])
def backward_queries(
    grad_q, delta, factors, grad_out, grad_lse, out, lse, q, k, v, size,
    gq_b, gq_h, gq_n, gq_c, go_b, go_h, go_n, go_c, gl_b, gl_h, gl_n, out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n,
    q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c, size_b, size_m, heads, query_count, key_count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills delta [batch, heads, N] and, unless they are absent, factors [batch, heads, N] and grad_q.

    Float32 has factors, of the weights. Where one weight of a row is large, the roundings of lse and of the product of
    grad_out and out exceed what the weights and their gradients err, which plain PyTorch's cancel; so what the weights
    sum to is divided out, and what the logits' gradients sum to goes into delta.
    """
    tiles = tl.cdiv(query_count, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    batch = pair // heads
    head = pair % heads
    queries = (program % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < query_count
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    grad_result = tl.zeros([BLOCK_M, BLOCK_V], q.dtype.element_ty)
    if grad_out is not None:
        start = grad_out + batch * go_b + head * go_h
        grad_result = load_channels(start, queries, query_valid, go_n, go_c, VALUE_DIM, BLOCK_V)
        start = out + batch * out_b + head * out_h
        result = load_channels(start, queries, query_valid, out_n, out_c, VALUE_DIM, BLOCK_V)
        row_delta = tl.sum(grad_result.to(tl.float32) * result.to(tl.float32), 1)
    row_gradient = tl.zeros([BLOCK_M], tl.float32)
    if grad_lse is not None:
        row_gradient = load_rows(grad_lse + batch * gl_b + head * gl_h, queries, query_valid, gl_n, 0.0)
    row_delta -= row_gradient
    if factors is None:
        tl.store(delta + pair * query_count + queries, row_delta, mask=query_valid)
    if grad_q is not None or factors is not None:
        k += batch * k_b + head * k_h
        v += batch * v_b + head * v_h
        size += batch * size_b
        start = q + batch * q_b + head * q_h
        query = load_channels(start, queries, query_valid, q_n, q_c, HEAD_DIM, BLOCK_D)
        row_lse = load_rows(lse + batch * lse_b + head * lse_h, queries, query_valid, lse_n, INF)
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        surplus = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, key_count, BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            key_valid = keys < key_count
            key = load_channels(k, keys, key_valid, k_n, k_c, HEAD_DIM, BLOCK_D)
            sizes = size_logits(size, keys, key_valid, size_m)
            weights = probabilities(tile_logits(query, key, sizes, scale), row_lse)
            grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if grad_out is not None:
                value = load_channels(v, keys, key_valid, v_n, v_c, VALUE_DIM, BLOCK_V)
                grad_weights = dot(grad_result, tl.trans(value))
            grad_logits = logit_gradient(weights, grad_weights, row_delta)
            if factors is not None:
                total += tl.sum(weights, 1)
                surplus += tl.sum(grad_logits, 1)
            if grad_q is not None:
                gradient = dot(grad_logits.to(key.dtype), key, gradient)
        if factors is not None:
            tl.store(factors + pair * query_count + queries, 1.0 / total, mask=query_valid)
            gradient = gradient / total[:, None]
            row_delta += surplus / total - row_gradient
            tl.store(delta + pair * query_count + queries, row_delta, mask=query_valid)
        if grad_q is not None:
            start = grad_q + batch * gq_b + head * gq_h
            store_channels(start, queries, query_valid, gq_n, gq_c, gradient * scale, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["lse_b", "lse_h", "size_b", "query_count", "key_count"])
def backward_keys(
    grad_k, grad_v, delta, factors, grad_out, lse, q, k, v, size,
    gk_b, gk_h, gk_n, gk_c, gv_b, gv_h, gv_n, gv_c, go_b, go_h, go_n, go_c, lse_b, lse_h, lse_n,
    q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c, size_b, size_m, heads, query_count, key_count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills grad_k, for which delta is, and grad_v, for which grad_out is; either may be absent.

    factors are those of `backward_queries`, or None.
    """
    tiles = tl.cdiv(key_count, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    pair = program // tiles
    batch = pair // heads
    head = pair % heads
    keys = (program % tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_valid = keys < key_count
    key = load_channels(k + batch * k_b + head * k_h, keys, key_valid, k_n, k_c, HEAD_DIM, BLOCK_D)
    value = load_channels(v + batch * v_b + head * v_h, keys, key_valid, v_n, v_c, VALUE_DIM, BLOCK_V)
    sizes = size_logits(size + batch * size_b, keys, key_valid, size_m)
    q += batch * q_b + head * q_h
    lse += batch * lse_b + head * lse_h
    if grad_k is not None:
        delta += pair * query_count
    if factors is not None:
        factors += pair * query_count
    if grad_out is not None:
        grad_out += batch * go_b + head * go_h
    key_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, query_count, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        query_valid = queries < query_count
        query = load_channels(q, queries, query_valid, q_n, q_c, HEAD_DIM, BLOCK_D)
        row_lse = load_rows(lse, queries, query_valid, lse_n, INF)
        # Keys are the rows of these tiles: as such they multiply, without being transposed.
        logits = dot(key, tl.trans(query)) * (scale * LOG2E) + sizes[:, None]
        weights = tl.exp2(logits - (row_lse * LOG2E)[None, :])
        if factors is not None:
            weights *= tl.load(factors + queries, mask=query_valid, other=0.0)[None, :]
        grad_weights = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if grad_out is not None:
            grad_result = load_channels(grad_out, queries, query_valid, go_n, go_c, VALUE_DIM, BLOCK_V)
            if grad_v is not None:
                value_gradient = dot(weights.to(grad_result.dtype), grad_result, value_gradient)
            grad_weights = dot(value, tl.trans(grad_result))
        if grad_k is not None:
            row_delta = tl.load(delta + queries, mask=query_valid, other=0.0)
            grad_logits = weights * (grad_weights - row_delta[None, :])
            key_gradient = dot(grad_logits.to(query.dtype), query, key_gradient)
    if grad_k is not None:
        start = grad_k + batch * gk_b + head * gk_h
        store_channels(start, keys, key_valid, gk_n, gk_c, key_gradient * scale, HEAD_DIM, BLOCK_D)
    if grad_v is not None:
        start = grad_v + batch * gv_b + head * gv_h
        store_channels(start, keys, key_valid, gv_n, gv_c, value_gradient, VALUE_DIM, BLOCK_V)
