"""Weight gradients of cascaded group attention in Triton: sums over all tokens, in an order fixed by the sizes.

Each kernel splits the tokens into chunks and writes one fp32 partial a chunk; reduce_partials adds them up.
A program takes the blocks of tokens chunk, chunk + chunks, ... .

Floor: the projection's reads grad_out and heads, 2 s T C bytes of T tokens, 2 T C^2 FLOPs; the q, k, v
convolutions' read `saved`, heads and x, s T (h (2 k + d) + 2 C) bytes, 2 T C (2 k + d) FLOPs; the depthwise
one reads q~ and the gradient of Q, 2 s T h k bytes, 2 T k sum(kappa^2) FLOPs on the FMA units.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot
from vitkernels.kernels.cascaded_group_attention.triton_windows import (
    load_cascade,
    load_map,
    load_rows,
    map_place,
    pixel_tokens,
)


@jit
def store_product(partials, bias_partials, total, sums, outputs, inputs, M: tl.constexpr, N: tl.constexpr):
    """A chunk's partial [M, N] of a weight's gradient, and [M] of its bias's from the first column of sums."""
    mask = (outputs < M)[:, None] & (inputs < N)[None, :]
    tl.store(partials + outputs[:, None] * N + inputs[None, :], total, mask=mask)
    column = tl.arange(0, sums.shape[1])
    sums = tl.sum(tl.where(column[None, :] == 0, sums, 0.0), 1)
    # Programs that share the outputs have the same sums: the first one writes.
    tl.store(bias_partials + outputs, sums, mask=(outputs < M) & (tl.min(inputs, 0) == 0))


@jit(do_not_specialize=["pixels", "chunks"])
def projection_weight_gradient(
    partials, bias_partials, grad_out, heads, go_b, go_c, go_y, go_x, pixels, chunks, rows, columns, height,
    width,
    CHANNELS: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """partials [chunks, C, C], bias_partials [chunks, C] of grad_out^T ReLU(heads) and of the sum of grad_out."""
    TILES_M: tl.constexpr = (CHANNELS + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    inputs = (program % TILES_N).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = (program // TILES_N % TILES_M).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = program // (TILES_N * TILES_M)
    dtype: tl.constexpr = heads.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_M, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, dtype)
    blocks = (pixels + BLOCK_T - 1) // BLOCK_T
    for turn in tl.range(0, ((blocks - chunk + chunks - 1) // chunks).to(tl.int32), num_stages=STAGES):
        pixel = (chunk + turn * chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = pixel < pixels
        batch, y, x, row = pixel_tokens(pixel, rows, columns, height, width, WINDOW_H, WINDOW_W)
        place = batch * go_b + y * go_y + x * go_x
        grad = load_map(grad_out, place, valid, outputs, go_c, CHANNELS, CHANNELS % BLOCK_M == 0, NCHW)
        features = load_rows(heads, row, valid, CHANNELS, inputs, CHANNELS, CHANNELS % BLOCK_N == 0)
        features = tl.where(features < 0, 0.0, features).to(dtype)
        grad = tl.trans(grad)
        total = dot(grad, features, total)
        sums = dot(grad, ones, sums)
    store_product(
        partials + chunk * CHANNELS * CHANNELS, bias_partials + chunk * CHANNELS, total, sums, outputs,
        inputs, CHANNELS, CHANNELS,
    )  # fmt: skip


@jit(do_not_specialize=["windows", "chunks"])
def qkv_weight_gradient(
    partials, bias_partials, saved, heads, x, x_b, x_c, x_y, x_x, windows, chunks, rows, columns, height,
    width,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """partials [chunks, heads, 2 k + d, d], bias_partials [chunks, heads, 2 k + d]: [dq~ | dk | dv]^T U and sums."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    OUTPUTS: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    SAVED: tl.constexpr = OUTPUTS + 2 * KEY_DIM
    TILES_M: tl.constexpr = (OUTPUTS + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (VALUE_DIM + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    inputs = (program % TILES_N).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = (program // TILES_N % TILES_M).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // (TILES_N * TILES_M) % HEADS
    chunk = program // (TILES_N * TILES_M * HEADS)
    tokens = tl.cast(windows, tl.int64) * TOKENS
    saved += head * tokens * SAVED
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_M, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, x.dtype.element_ty)
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    for turn in tl.range(0, ((blocks - chunk + chunks - 1) // chunks).to(tl.int32), num_stages=STAGES):
        row = (chunk + turn * chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = row < tokens
        place, inside = map_place(
            row // TOKENS, row % TOKENS, rows, columns, height, width, x_b, x_y, x_x, WINDOW_H, WINDOW_W
        )
        grad = tl.trans(load_rows(saved, row, valid, SAVED, outputs, OUTPUTS, OUTPUTS % BLOCK_M == 0))
        u = load_cascade(
            x, heads, place, inside & valid, row, valid, head, inputs, x_c, HEADS * VALUE_DIM, VALUE_DIM,
            VALUE_DIM % BLOCK_N == 0, NCHW,
        )  # fmt: skip
        total = dot(grad, u, total)
        sums = dot(grad, ones, sums)
    index = chunk * HEADS + head
    store_product(
        partials + index * OUTPUTS * VALUE_DIM, bias_partials + index * OUTPUTS, total, sums, outputs, inputs,
        OUTPUTS, VALUE_DIM,
    )  # fmt: skip


@jit(do_not_specialize=["windows", "chunks"])
def depthwise_weight_gradient(
    partials, bias_partials, saved, windows, chunks,
    HEADS: tl.constexpr, SIZES: tl.constexpr, KERNEL_MAX: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partials [chunks, heads, k, kmax, kmax] and bias_partials [chunks, heads, k] of the depthwise kernels.

    A program takes one row of the kernel, whose taps are the first dimension of its tiles: q~ of a token
    meets the gradient of Q of the tokens that the taps carry it to. Dead taps get the sum of nothing.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    SAVED: tl.constexpr = 4 * KEY_DIM + VALUE_DIM
    program = tl.program_id(0).to(tl.int64)
    tap_y = (program % KERNEL_MAX).to(tl.int32)
    head = program // KERNEL_MAX % HEADS
    chunk = program // (KERNEL_MAX * HEADS)
    tokens = tl.cast(windows, tl.int64) * TOKENS
    grads = saved + head * tokens * SAVED + (2 * KEY_DIM + VALUE_DIM)
    half = ((SIZES >> (4 * head)) & 15).to(tl.int32)
    tap_x = tl.arange(0, BLOCK_X)
    channels = tl.arange(0, BLOCK_K)
    dy = tap_y - KERNEL_MAX // 2
    dx = tap_x - KERNEL_MAX // 2
    live = (tl.abs(dy) <= half) & (tl.abs(dx) <= half)
    total = tl.zeros([BLOCK_X, BLOCK_T, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    for turn in tl.range(0, ((blocks - chunk + chunks - 1) // chunks).to(tl.int32), num_stages=1):
        row = (chunk + turn * chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = row < tokens
        token = (row % TOKENS).to(tl.int32)
        query = load_rows(grads + KEY_DIM, row, valid, SAVED, channels, KEY_DIM, BLOCK_K == KEY_DIM)
        y = token // WINDOW_W - dy
        x = (token % WINDOW_W)[None, :] - dx[:, None]
        inside = (valid & (y >= 0) & (y < WINDOW_H))[None, :] & (x >= 0) & (x < WINDOW_W) & live[:, None]
        mask = inside[:, :, None] & (channels < KEY_DIM)[None, None, :]
        places = (row[None, :] - (dy * WINDOW_W + dx)[:, None]) * SAVED
        grad = tl.load(grads + (places[:, :, None] + channels[None, None, :]), mask=mask, other=0.0)
        total += query.to(tl.float32)[None, :, :] * grad.to(tl.float32)
        centre = valid & (dy == 0)
        sums += load_rows(grads, row, centre, SAVED, channels, KEY_DIM, BLOCK_K == KEY_DIM).to(tl.float32)
    index = chunk * HEADS + head
    place = ((index * KEY_DIM + channels[None, :]) * KERNEL_MAX + tap_y) * KERNEL_MAX + tap_x[:, None]
    mask = (tap_x < KERNEL_MAX)[:, None] & (channels < KEY_DIM)[None, :]
    tl.store(partials + place, tl.sum(total, 1), mask=mask)
    tl.store(
        bias_partials + index * KEY_DIM + channels, tl.sum(sums, 0), mask=(channels < KEY_DIM) & (dy == 0)
    )


@jit(
    do_not_specialize=[
        "stride_0", "stride_1", "stride_2", "stride_3", "size_1", "size_2", "size_3", "count", "chunks"
    ]
)  # fmt: skip
def reduce_partials(
    grad, partials, stride_0, stride_1, stride_2, stride_3, size_1, size_2, size_3, count, chunks,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad, of four dimensions and any strides, = the sum of partials [chunks, count]."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk_ids = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for first in range(0, chunks, BLOCK_C):
        chunk = (first + chunk_ids).to(tl.int64)
        mask = (chunk < chunks)[:, None] & (element < count)[None, :]
        total += tl.load(partials + (chunk[:, None] * count + element[None, :]), mask=mask, other=0.0)
    i3 = element % size_3
    i2 = element // size_3 % size_2
    i1 = element // size_3 // size_2 % size_1
    i0 = element // size_3 // size_2 // size_1
    place = grad + (i0 * stride_0 + i1 * stride_1 + i2 * stride_2 + i3 * stride_3)
    tl.store(place, tl.sum(total, 0).to(grad.dtype.element_ty), mask=element < count)


@jit
def reduce_table(
    grad_table, sums, stride_h, stride_t, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """grad_table [heads, N] from sums [heads, N, N] of the logit gradient: one program a head and |dy|."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    program = tl.program_id(0)
    dy = program % WINDOW_H
    head = (program // WINDOW_H).to(tl.int64)
    dx = tl.arange(0, BLOCK_X)
    query = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_X, BLOCK_T], tl.float32)
    for sign in tl.static_range(4):
        key_y = query // WINDOW_W + (dy if sign & 1 else -dy)
        key_x = (query % WINDOW_W)[None, :] + (dx[:, None] if sign & 2 else -dx[:, None])
        pair = ((query < TOKENS) & (key_y >= 0) & (key_y < WINDOW_H))[None, :]
        pair = pair & (key_x >= 0) & (key_x < WINDOW_W)
        # An offset of 0 is its own mirror image: count it once.
        if sign & 1:
            pair = pair & (dy != 0)
        if sign & 2:
            pair = pair & (dx != 0)[:, None]
        place = head * (TOKENS * TOKENS) + (query * TOKENS + key_y * WINDOW_W)[None, :] + key_x
        total += tl.load(sums + place, mask=pair, other=0.0)
    place = grad_table + head * stride_h + (dy * WINDOW_W + dx).to(tl.int64) * stride_t
    tl.store(place, tl.sum(total, 1).to(grad_table.dtype.element_ty), mask=dx < WINDOW_W)
