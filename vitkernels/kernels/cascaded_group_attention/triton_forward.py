"""Forward of cascaded group attention in Triton: the heads of a window, then the projection of all tokens.

Two launches, because the projection needs every channel of a token: with C >= 288 its accumulator and the
heads' outputs do not fit a program's registers. Between them the heads' outputs O pass through `heads`,
token-major, which the backward needs anyway.

Floor per window of N tokens, element size s: x read twice with the residual (once without), heads written
and read, out written: 4 to 5 s N C bytes, of which heads' stay in the second-level cache for small batches;
2 N h (2 k + d) d + 2 N k sum(kappa^2) + 2 N^2 (h k + C) + 2 N C^2 FLOPs, the depthwise part on the FMA units;
h N^2 exponentials. At C = 128, h = 4, N = 49 in fp16 that is 56 to 69 FLOP/byte.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot
from vitkernels.kernels.cascaded_group_attention.triton_windows import (
    attention_weights,
    by_row,
    by_window,
    depthwise,
    head_projection,
    load_bias,
    load_map,
    load_rows,
    load_weight,
    map_place,
    pixel_tokens,
    store_map,
    store_rows,
    tile_tokens,
)


@jit(do_not_specialize=["windows"])
def forward_heads(
    heads, queries, x, qkv_weight, qkv_bias, dw_weight, dw_bias, table,
    queries_h, queries_n, x_b, x_c, x_y, x_x, qw_h, qw_o, qw_i, qb_h, qb_o, dw_h, dw_c, dw_y, dw_x, db_h, db_c,
    table_h, table_t, windows, rows, columns, height, width, scale,
    HEADS: tl.constexpr, SIZES: tl.constexpr, KERNEL_MAX: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """heads[window, token] of PACK windows, head after head.

    Two things pass between a program's own threads through memory: O to the next head, and q~ to the taps
    of the depthwise convolution. Each barrier below orders a write and the reads around it; it makes global
    writes visible to the block, and the loads behind it are never moved in front of it. q~ lies in `queries`,
    which is the head's own place in heads where k <= d: O overwrites it after the last tap was read.

    local memory: up to 512 bytes: an fp32 product on the FMA units holds both operands in registers, and over
    64 value channels they do not fit. Half precision does not spill.
    """
    CHANNELS: tl.constexpr = HEADS * VALUE_DIM
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    dtype: tl.constexpr = x.dtype.element_ty
    window, token, row, valid = tile_tokens(tl.program_id(0), windows, TOKENS, BLOCK, PACK)
    place, inside = map_place(window, token, rows, columns, height, width, x_b, x_y, x_x, WINDOW_H, WINDOW_W)
    inside = inside & valid
    keys = tl.arange(0, BLOCK_K)
    part = tl.arange(0, PART)
    for index in tl.range(0, HEADS, num_stages=1):
        head = tl.cast(index, tl.int64)
        query, key, value, value_rest = head_projection(
            x, heads, qkv_weight + head * qw_h, qkv_bias + head * qb_h, place, inside, row, valid, head, x_c,
            qw_o, qw_i, qb_o, CHANNELS, KEY_DIM, VALUE_DIM, BLOCK_K, PART, REST, SLICE, STAGES, NCHW,
        )  # fmt: skip
        source = queries + head * queries_h
        store_rows(source, row, valid, queries_n, keys, query, KEY_DIM, BLOCK_K == KEY_DIM)
        tl.debug_barrier()
        size = 2 * ((SIZES >> (4 * head)) & 15) + 1
        query = depthwise(
            source, row, valid, token, queries_n, dw_weight + head * dw_h, dw_c, dw_y, dw_x, size,
            False, KEY_DIM, BLOCK_K, KERNEL_MAX, WINDOW_H, WINDOW_W, dtype,
        )  # fmt: skip
        query = (query + load_bias(dw_bias + head * db_h, keys, db_c, KEY_DIM)).to(dtype)
        weights, total = attention_weights(
            by_window(query, BLOCK, PACK), by_window(key, BLOCK, PACK), table, head, table_h, table_t, scale,
            WINDOW_H, WINDOW_W, BLOCK, PACK,
        )  # fmt: skip
        weights = weights.to(dtype)
        tl.debug_barrier()
        result = by_row(dot(weights, by_window(value, BLOCK, PACK)) / total, BLOCK, PACK)
        out = heads + head * VALUE_DIM
        store_rows(out, row, valid, CHANNELS, part, result, VALUE_DIM, PART <= VALUE_DIM)
        if REST:
            result = by_row(dot(weights, by_window(value_rest, BLOCK, PACK)) / total, BLOCK, PACK)
            rest = PART + tl.arange(0, REST)
            store_rows(out, row, valid, CHANNELS, rest, result, VALUE_DIM, PART + REST == VALUE_DIM)
        tl.debug_barrier()


@jit(do_not_specialize=["pixels"])
def forward_projection(
    out, heads, x, weight, bias,
    out_b, out_c, out_y, out_x, x_b, x_c, x_y, x_x, weight_o, weight_i, bias_o,
    pixels, rows, columns, height, width,
    CHANNELS: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    NCHW: tl.constexpr,
):  # fmt: skip
    """out = ReLU(heads) weight^T + bias (+ x) of BLOCK_M pixels and BLOCK_N channels; padded tokens are skipped.

    With NCHW the product is the transposed one, so that lanes follow the pixels in every store.
    """
    TILES: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = CHANNELS % BLOCK_N == 0
    DIVIDES: tl.constexpr = CHANNELS % SLICE == 0
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    # Programs next to each other share the pixels: they read the same heads.
    pixel = (program // TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = (program % TILES).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = pixel < pixels
    batch, y_at, x_at, row = pixel_tokens(pixel, rows, columns, height, width, WINDOW_H, WINDOW_W)
    total = tl.zeros([BLOCK_N, BLOCK_M] if NCHW else [BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, CHANNELS, SLICE, num_stages=STAGES):
        channels = first + tl.arange(0, SLICE)
        features = load_rows(heads, row, valid, CHANNELS, channels, CHANNELS, DIVIDES)
        # Written so that a NaN stays one, as in torch.relu.
        features = tl.where(features < 0, 0.0, features).to(dtype)
        matrix = load_weight(
            weight, outputs, channels, weight_o, weight_i, CHANNELS, CHANNELS, dtype, DIVIDES and EVEN
        )
        total = dot(matrix, tl.trans(features), total) if NCHW else dot(features, tl.trans(matrix), total)
    if NCHW:
        total = tl.trans(total)
    result = (total + load_bias(bias, outputs, bias_o, CHANNELS)).to(dtype)
    if RESIDUAL:
        place = batch * x_b + y_at * x_y + x_at * x_x
        share = load_map(x, place, valid, outputs, x_c, CHANNELS, EVEN, NCHW)
        result = result.to(tl.float32) + share.to(tl.float32)
    place = batch * out_b + y_at * out_y + x_at * out_x
    store_map(out, place, valid, outputs, out_c, result, CHANNELS, EVEN, NCHW)
