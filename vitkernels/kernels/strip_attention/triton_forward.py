"""Forward of strip attention in Triton: a tile of queries, all keys.

Floor of a head, N queries, M keys, element size s: reads q, k, v and writes out and, where wanted, lse,
s (N (r + dv) + M (r + dv)) + 4 N bytes; 2 N M dv FLOPs of the value product; N M exponentials. At M = 49 and dv = 64
in fp16 a query costs 130 bytes, 6300 FLOPs and 49 exponentials: bound by memory. From M of about 250 on the
exponentials bind.
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
from vitkernels.kernels.strip_attention.triton_logits import (
    load_channels,
    row_maximum,
    tile_logits,
    weights_below,
)


@jit
def forward_queries(
    out, lse, q, k, v, bias,
    out_b, out_h, out_n, out_c, lse_b, lse_h, lse_n, q_b, q_h, q_n, q_c, k_b, k_h, k_n, k_c, v_b, v_h, v_n, v_c,
    bias_b, bias_h, bias_n, bias_m, heads, query_count, key_count, scale,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, VALUE_DIM: tl.constexpr, CLOSED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """CLOSED: the largest logit of a row is known beforehand, with one channel and without a bias."""
    tiles = (query_count + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    batch = program // tiles // heads
    head = program // tiles % heads
    queries = (program % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_valid = queries < query_count
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    query = load_channels(q + batch * q_b + head * q_h, queries, query_valid, q_n, q_c, WIDTH, OUTER, BLOCK_R)
    maximum, total = softmax_start(BLOCK_M)
    if CLOSED:
        single = load_channels(q + batch * q_b + head * q_h, queries, query_valid, q_n, q_c, 1, True, BLOCK_R)
        maximum = row_maximum(single, k, key_count, k_n, scale, OUTER, BLOCK_K)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(0, key_count, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_valid = keys < key_count
        key = load_channels(k, keys, key_valid, k_n, k_c, WIDTH, OUTER, BLOCK_R)
        value = load_tile(v, tile_offsets(keys, v_n, v_c, BLOCK_V), tile_mask(key_valid, BLOCK_V, VALUE_DIM))
        logits = tile_logits(
            query, key, queries, keys, query_valid, key_valid, bias, bias_n, bias_m, scale, OUTER
        )
        if CLOSED:
            weights = weights_below(logits, maximum)
            total += tl.sum(weights, 1)
        else:
            weights, rescale, maximum, total = softmax_step(logits, maximum, total)
            accumulator *= rescale[:, None]
        accumulator = dot(weights.to(value.dtype), value, accumulator)
    result, row_lse = softmax_finish(accumulator, maximum, total)
    store_tile(
        out + batch * out_b + head * out_h, tile_offsets(queries, out_n, out_c, BLOCK_V),
        tile_mask(query_valid, BLOCK_V, VALUE_DIM), result,
    )  # fmt: skip
    if lse is not None:
        rows = queries.to(tl.int64) * lse_n
        tl.store(lse + batch * lse_b + head * lse_h + rows, row_lse, mask=query_valid)
