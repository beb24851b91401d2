"""Gradients of cascaded group attention with respect to tokens, in Triton: the projection, then head by head.

The cascade runs backwards: the gradient of a head's output is complete once the head after it is done. Each
head is a launch of its own, so that the logit gradient of a bias table is summed in registers from window to
window. What the weight gradients need is left in `saved`, token-major [heads, tokens, 4 k + d]: the gradients
of q~, k, v, that of Q, and q~ again.

Floor per window of N tokens, element size s: grad_out, heads and x read, grad_x written, and for each head's
`saved` written and read 2 s N (4 k + d) bytes; twice the forward's FLOPs, and the q, k, v products and the
logits once more rather than kept.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot
from vitkernels.core.triton_window_bias import partial_offset
from vitkernels.kernels.cascaded_group_attention.triton_windows import (
    attention_weights,
    by_row,
    by_window,
    channel_mask,
    depthwise,
    head_projection,
    load_bias,
    load_map,
    load_rows,
    load_weight,
    map_place,
    store_map,
    store_rows,
    swap,
    tile_tokens,
)


@jit(do_not_specialize=["tokens"])
def backward_projection(
    grads, grad_out, grad_heads, heads, weight,
    go_b, go_c, go_y, go_x, gh_w, gh_n, gh_c, weight_o, weight_i, tokens, rows, columns, height, width,
    CHANNELS: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """grads = gradient of heads, of BLOCK_M tokens and BLOCK_N channels: grad_out weight where heads > 0.

    local memory: up to 8 bytes: an NCHW tile takes an address for every element; on sm_90 without wgmma one of
    them does not fit where C is no multiple of 64.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = CHANNELS % BLOCK_N == 0
    DIVIDES: tl.constexpr = CHANNELS % SLICE == 0
    program = tl.program_id(0).to(tl.int64)
    row = (program // TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    inputs = (program % TILES).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < tokens
    window = row // TOKENS
    token = row % TOKENS
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if grad_out is not None:
        place, inside = map_place(
            window, token, rows, columns, height, width, go_b, go_y, go_x, WINDOW_H, WINDOW_W
        )
        inside = inside & valid
        for first in tl.range(0, CHANNELS, SLICE, num_stages=STAGES):
            channels = first + tl.arange(0, SLICE)
            grad = load_map(grad_out, place, inside, channels, go_c, CHANNELS, DIVIDES, NCHW)
            matrix = load_weight(
                weight, channels, inputs, weight_o, weight_i, CHANNELS, CHANNELS, grads.dtype.element_ty,
                DIVIDES and EVEN,
            )  # fmt: skip
            total = dot(grad, matrix, total)
        features = load_rows(heads, row, valid, CHANNELS, inputs, CHANNELS, EVEN)
        total = tl.where(features <= 0, 0.0, total)
    if grad_heads is not None:
        places = (window * gh_w + token * gh_n)[:, None] + (inputs.to(tl.int64) * gh_c)[None, :]
        mask = channel_mask(valid, inputs, CHANNELS, EVEN)
        total += tl.load(grad_heads + places, mask=mask, other=0.0).to(tl.float32)
    store_rows(grads, row, valid, CHANNELS, inputs, total, CHANNELS, EVEN)


@jit
def add_logit_gradient(target, gradient, add, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """target [N, N] = (target if add) + the sum over the packed windows."""
    if PACK > 1:
        gradient = tl.sum(gradient, 0)
    tokens = tl.arange(0, BLOCK)
    place = target + (tokens[:, None] * TOKENS + tokens[None, :])
    mask = (tokens < TOKENS)[:, None] & (tokens < TOKENS)[None, :]
    tl.store(place, gradient + tl.load(place, mask=mask & add, other=0.0), mask=mask)


@jit(do_not_specialize=["windows", "first_group", "index", "size"])
def backward_head(
    grad_x, grads, saved, partials, grad_out, heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, table,
    gx_b, gx_c, gx_y, gx_x, go_b, go_c, go_y, go_x, x_b, x_c, x_y, x_x, qw_h, qw_o, qw_i, qb_h, qb_o, dw_h,
    dw_c, dw_y, dw_x, db_h, db_c, table_h, table_t, windows, first_group, rows, columns, height, width, index,
    size, scale,
    HEADS: tl.constexpr, KERNEL_MAX: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    BLOCK_K: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, SLICE: tl.constexpr, SLICE_Y: tl.constexpr,
    STAGES: tl.constexpr, NCHW: tl.constexpr, GRAD_NCHW: tl.constexpr,
):  # fmt: skip
    """Gradients of one head in PACK windows; partials [programs, heads, N, N] get their logit gradients, which
    groups from first_group on add to those before.

    Of grads it reads the gradient of the head's output, puts that of the head's input U in its place, and
    adds the latter to the place of the head before, and to x (with what the residual adds, grad_out): slice by
    slice, since a token of an NCHW map takes a 64-bit address for every channel.

    q~, the gradient of Q, those of q~, k, v and that of U pass between a program's threads through memory;
    each barrier orders those writes and the reads behind it. A program does not loop over windows: compilers
    then move the addresses of weights, taps and table out of the loop, 100 registers of them, and spill.

    local memory: up to 2304 bytes: an fp32 product on the FMA units holds both operands in registers, and over
    64 value channels they do not fit. Half precision spills 8 bytes there on sm_80.
    """
    CHANNELS: tl.constexpr = HEADS * VALUE_DIM
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    OUTPUTS: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    SAVED: tl.constexpr = OUTPUTS + 2 * KEY_DIM
    WHOLE_K: tl.constexpr = BLOCK_K == KEY_DIM
    WHOLE_PART: tl.constexpr = PART <= VALUE_DIM
    WHOLE_REST: tl.constexpr = PART + REST == VALUE_DIM
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head = tl.cast(index, tl.int64)
    keys = tl.arange(0, BLOCK_K)
    part = tl.arange(0, PART)
    if REST:
        rest = PART + tl.arange(0, REST)
    # Rows of the head, channels: [gradient of q~ | of k | of v | of Q | q~].
    saved += head * tl.cast(windows, tl.int64) * TOKENS * SAVED
    incoming = grads + head * VALUE_DIM
    weight = qkv_weight + head * qw_h
    window, token, row, valid = tile_tokens(first_group + program, windows, TOKENS, BLOCK, PACK)
    place, inside = map_place(window, token, rows, columns, height, width, x_b, x_y, x_x, WINDOW_H, WINDOW_W)
    inside = inside & valid
    query, key, value, value_rest = head_projection(
        x, heads, weight, qkv_bias + head * qb_h, place, inside, row, valid, head, x_c, qw_o, qw_i, qb_o,
        CHANNELS, KEY_DIM, VALUE_DIM, BLOCK_K, PART, REST, SLICE, STAGES, NCHW,
    )  # fmt: skip
    store_rows(saved + (OUTPUTS + KEY_DIM), row, valid, SAVED, keys, query, KEY_DIM, WHOLE_K)
    tl.debug_barrier()
    query = depthwise(
        saved + (OUTPUTS + KEY_DIM), row, valid, token, SAVED, dw_weight + head * dw_h, dw_c, dw_y, dw_x,
        size, False, KEY_DIM, BLOCK_K, KERNEL_MAX, WINDOW_H, WINDOW_W, dtype,
    )  # fmt: skip
    query = (query + load_bias(dw_bias + head * db_h, keys, db_c, KEY_DIM)).to(dtype)
    query = by_window(query, BLOCK, PACK)
    key = by_window(key, BLOCK, PACK)
    weights, total = attention_weights(
        query, key, table, head, table_h, table_t, scale, WINDOW_H, WINDOW_W, BLOCK, PACK
    )
    weights = weights / total
    rounded = swap(weights.to(dtype))

    values = saved + 2 * KEY_DIM
    grad = by_window(load_rows(incoming, row, valid, CHANNELS, part, VALUE_DIM, WHOLE_PART), BLOCK, PACK)
    grad_value = by_row(dot(rounded, grad), BLOCK, PACK)
    store_rows(values, row, valid, SAVED, part, grad_value, VALUE_DIM, WHOLE_PART)
    grad_weights = dot(grad, swap(by_window(value, BLOCK, PACK)))
    if REST:
        grad = load_rows(incoming, row, valid, CHANNELS, rest, VALUE_DIM, WHOLE_REST)
        grad = by_window(grad, BLOCK, PACK)
        grad_value = by_row(dot(rounded, grad), BLOCK, PACK)
        store_rows(values, row, valid, SAVED, rest, grad_value, VALUE_DIM, WHOLE_REST)
        grad_weights = dot(grad, swap(by_window(value_rest, BLOCK, PACK)), grad_weights)
    axis: tl.constexpr = len(weights.shape) - 1
    delta = tl.sum(weights * grad_weights, axis, keep_dims=True)
    grad_logits = weights * (grad_weights - delta)
    if partials is not None:
        target = partials + partial_offset(program, HEADS, head, TOKENS)
        add_logit_gradient(target, grad_logits, first_group > 0, TOKENS, BLOCK, PACK)
    rounded = grad_logits.to(dtype)

    grad_key = by_row(dot(swap(rounded), query), BLOCK, PACK) * scale
    store_rows(saved + KEY_DIM, row, valid, SAVED, keys, grad_key, KEY_DIM, WHOLE_K)
    grad_query = by_row(dot(rounded, key), BLOCK, PACK) * scale
    store_rows(saved + OUTPUTS, row, valid, SAVED, keys, grad_query, KEY_DIM, WHOLE_K)
    tl.debug_barrier()
    grad_query = depthwise(
        saved + OUTPUTS, row, valid, token, SAVED, dw_weight + head * dw_h, dw_c, dw_y, dw_x, size,
        True, KEY_DIM, BLOCK_K, KERNEL_MAX, WINDOW_H, WINDOW_W, dtype,
    )  # fmt: skip
    store_rows(saved, row, valid, SAVED, keys, grad_query, KEY_DIM, WHOLE_K)
    tl.debug_barrier()

    gradient = tl.zeros([PACK * BLOCK, PART], tl.float32)
    if REST:
        gradient_rest = tl.zeros([PACK * BLOCK, REST], tl.float32)
    for first in tl.range(0, OUTPUTS, SLICE_Y, num_stages=STAGES):
        outputs = first + tl.arange(0, SLICE_Y)
        divides: tl.constexpr = OUTPUTS % SLICE_Y == 0
        grad_y = load_rows(saved, row, valid, SAVED, outputs, OUTPUTS, divides)
        matrix = load_weight(
            weight, outputs, part, qw_o, qw_i, OUTPUTS, VALUE_DIM, dtype, divides and WHOLE_PART
        )
        gradient = dot(grad_y, matrix, gradient)
        if REST:
            matrix = load_weight(
                weight, outputs, rest, qw_o, qw_i, OUTPUTS, VALUE_DIM, dtype, divides and WHOLE_REST
            )
            gradient_rest = dot(grad_y, matrix, gradient_rest)
    store_rows(incoming, row, valid, CHANNELS, part, gradient, VALUE_DIM, WHOLE_PART)
    if REST:
        store_rows(incoming, row, valid, CHANNELS, rest, gradient_rest, VALUE_DIM, WHOLE_REST)
    tl.debug_barrier()

    if grad_x is not None:
        place, _ = map_place(
            window, token, rows, columns, height, width, gx_b, gx_y, gx_x, WINDOW_H, WINDOW_W
        )
        go_place, _ = map_place(
            window, token, rows, columns, height, width, go_b, go_y, go_x, WINDOW_H, WINDOW_W
        )
    earlier = valid & (head > 0)
    for first in tl.range(0, VALUE_DIM, SLICE, num_stages=1):
        channels = first + tl.arange(0, SLICE)
        whole: tl.constexpr = VALUE_DIM % SLICE == 0
        passed = load_rows(incoming, row, valid, CHANNELS, channels, VALUE_DIM, whole).to(tl.float32)
        before = incoming - VALUE_DIM
        sofar = load_rows(before, row, earlier, CHANNELS, channels, VALUE_DIM, whole).to(tl.float32)
        store_rows(before, row, earlier, CHANNELS, channels, sofar + passed, VALUE_DIM, whole)
        if grad_x is not None:
            if grad_out is not None:
                share = grad_out + head * VALUE_DIM * go_c
                share = load_map(share, go_place, inside, channels, go_c, VALUE_DIM, whole, GRAD_NCHW)
                passed += share.to(tl.float32)
            store_map(
                grad_x + head * VALUE_DIM * gx_c,
                place,
                inside,
                channels,
                gx_c,
                passed,
                VALUE_DIM,
                whole,
                NCHW,
            )
