"""What the Triton kernels of cascaded group attention share: windows of a map, one head's queries, keys, values.

A tile of rows holds PACK windows of BLOCK rows each, a window's N tokens first. Row `window * N + token` is
where `heads` and every token-major scratch keep a token, padded tokens of the map included; where the map
itself keeps it follows by address arithmetic.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, dot
from vitkernels.core.triton_window_bias import bias_logits


@jit
def tile_tokens(group, windows, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """(window, token, row, valid) of each row of the tile that holds windows group * PACK and following."""
    local = tl.arange(0, PACK * BLOCK)
    token = local % BLOCK
    window = group.to(tl.int64) * PACK + local // BLOCK
    return window, token, window * TOKENS + token, (token < TOKENS) & (window < windows)


@jit
def map_place(
    window, token, rows, columns, height, width, stride_b, stride_y, stride_x, WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):  # fmt: skip
    """(element offset of a token in the map, whether it lies in it) of tokens of windows ordered (b, row, column)."""
    column = window % columns
    band = window // columns
    y = (band % rows) * WINDOW_H + token // WINDOW_W
    x = column * WINDOW_W + token % WINDOW_W
    return (band // rows) * stride_b + y * stride_y + x * stride_x, (y < height) & (x < width)


@jit
def pixel_tokens(
    pixel, rows, columns, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr
):  # fmt: skip
    """(image, y, x, row) of the pixels of a batch of maps, numbered row by row."""
    x = pixel % width
    y = pixel // width % height
    batch = pixel // width // height
    window = (batch * rows + y // WINDOW_H) * columns + x // WINDOW_W
    return batch, y, x, window * (WINDOW_H * WINDOW_W) + (y % WINDOW_H) * WINDOW_W + x % WINDOW_W


@jit
def channel_mask(rows_valid, channels, LIMIT: tl.constexpr, FULL: tl.constexpr):
    """Mask [rows, channels]; FULL says that every channel is below LIMIT, which keeps rows vectorised."""
    if FULL:
        return rows_valid[:, None] & tl.full([1, channels.shape[0]], 1, tl.int1)
    else:
        return rows_valid[:, None] & (channels < LIMIT)[None, :]


@jit
def load_map(
    base, place, inside, channels, stride_c, LIMIT: tl.constexpr, FULL: tl.constexpr, NCHW: tl.constexpr
):  # fmt: skip
    """Tile [tokens, channels] of a map, zeros outside it.

    Lanes follow the last dimension of what is loaded, so with NCHW, where neighbouring tokens are neighbours
    in memory, the tile is loaded transposed.
    """
    offsets = channels.to(tl.int64) * stride_c
    if NCHW:
        mask = tl.trans(channel_mask(inside, channels, LIMIT, FULL))
        return tl.trans(tl.load(base + (offsets[:, None] + place[None, :]), mask=mask, other=0.0))
    else:
        mask = channel_mask(inside, channels, LIMIT, FULL)
        return tl.load(base + (place[:, None] + offsets[None, :]), mask=mask, other=0.0)


@jit
def store_map(
    base, place, inside, channels, stride_c, tile, LIMIT: tl.constexpr, FULL: tl.constexpr,
    NCHW: tl.constexpr,
):  # fmt: skip
    offsets = channels.to(tl.int64) * stride_c
    tile = tile.to(base.dtype.element_ty)
    mask = channel_mask(inside, channels, LIMIT, FULL)
    if NCHW:
        tl.store(base + (offsets[:, None] + place[None, :]), tl.trans(tile), mask=tl.trans(mask))
    else:
        tl.store(base + (place[:, None] + offsets[None, :]), tile, mask=mask)


@jit
def load_rows(base, row, valid, stride, channels, LIMIT: tl.constexpr, FULL: tl.constexpr):
    """Tile [rows, channels] of a token-major tensor with dense channels."""
    mask = channel_mask(valid, channels, LIMIT, FULL)
    return tl.load(base + row[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@jit
def store_rows(base, row, valid, stride, channels, tile, LIMIT: tl.constexpr, FULL: tl.constexpr):
    mask = channel_mask(valid, channels, LIMIT, FULL)
    tl.store(base + row[:, None] * stride + channels[None, :], tile.to(base.dtype.element_ty), mask=mask)


@jit
def load_weight(
    base, outputs, inputs, stride_o, stride_i, OUT_LIMIT: tl.constexpr, IN_LIMIT: tl.constexpr,
    DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Tile [outputs, inputs] of a weight matrix in the dtype of the product, zeros beyond the limits."""
    offsets = outputs.to(tl.int64)[:, None] * stride_o + inputs.to(tl.int64)[None, :] * stride_i
    if FULL:
        return tl.load(base + offsets).to(DTYPE)
    else:
        mask = (outputs < OUT_LIMIT)[:, None] & (inputs < IN_LIMIT)[None, :]
        return tl.load(base + offsets, mask=mask, other=0.0).to(DTYPE)


@jit
def load_bias(base, channels, stride, LIMIT: tl.constexpr):
    """Row [1, channels] of a bias, in fp32."""
    bias = tl.load(base + channels.to(tl.int64) * stride, mask=channels < LIMIT, other=0.0)
    return bias.to(tl.float32)[None, :]


@jit
def load_cascade(
    x, heads, place, inside, row, valid, head, channels, x_c, CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr, FULL: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """Channels of a head's input U: its share of x plus the output of the head before it, rounded."""
    share = load_map(x + head * VALUE_DIM * x_c, place, inside, channels, x_c, VALUE_DIM, FULL, NCHW)
    before = (head - 1) * VALUE_DIM
    previous = load_rows(heads + before, row, valid & (head > 0), CHANNELS, channels, VALUE_DIM, FULL)
    return (share.to(tl.float32) + previous.to(tl.float32)).to(x.dtype.element_ty)


@jit
def head_projection(
    x, heads, weight, bias, place, inside, row, valid, head, x_c, weight_o, weight_i, bias_o,
    CHANNELS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr, REST: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, NCHW: tl.constexpr,
):  # fmt: skip
    """(q~, k, v of the first PART channels, v of the rest) of a head in x's dtype; weight, bias point at it.

    Value channels are held in two tiles of a power of two each, as 96 = 64 + 32; U passes by in slices that
    divide it, so nothing is multiplied with padding at the published widths. Without a REST
    the last result is the third again.
    """
    ROWS: tl.constexpr = row.shape[0]
    dtype: tl.constexpr = x.dtype.element_ty
    DIVIDES: tl.constexpr = VALUE_DIM % SLICE == 0
    # In 64 bits: multiples of the strides of any view.
    weight_o = tl.cast(weight_o, tl.int64)
    bias_o = tl.cast(bias_o, tl.int64)
    keys = tl.arange(0, BLOCK_K)
    part = tl.arange(0, PART)
    query = tl.zeros([ROWS, BLOCK_K], tl.float32)
    key = tl.zeros([ROWS, BLOCK_K], tl.float32)
    value = tl.zeros([ROWS, PART], tl.float32)
    if REST:
        rest = PART + tl.arange(0, REST)
        value_rest = tl.zeros([ROWS, REST], tl.float32)
    for first in tl.range(0, VALUE_DIM, SLICE, num_stages=STAGES):
        channels = first + tl.arange(0, SLICE)
        u = load_cascade(
            x, heads, place, inside, row, valid, head, channels, x_c, CHANNELS, VALUE_DIM, DIVIDES, NCHW
        )
        full: tl.constexpr = DIVIDES and BLOCK_K == KEY_DIM
        matrix = load_weight(weight, keys, channels, weight_o, weight_i, KEY_DIM, VALUE_DIM, dtype, full)
        query = dot(u, tl.trans(matrix), query)
        matrix = load_weight(
            weight + KEY_DIM * weight_o, keys, channels, weight_o, weight_i, KEY_DIM, VALUE_DIM, dtype, full
        )
        key = dot(u, tl.trans(matrix), key)
        values = weight + 2 * KEY_DIM * weight_o
        full_part: tl.constexpr = DIVIDES and PART <= VALUE_DIM
        matrix = load_weight(
            values, part, channels, weight_o, weight_i, VALUE_DIM, VALUE_DIM, dtype, full_part
        )
        value = dot(u, tl.trans(matrix), value)
        if REST:
            full_rest: tl.constexpr = DIVIDES and PART + REST == VALUE_DIM
            matrix = load_weight(
                values, rest, channels, weight_o, weight_i, VALUE_DIM, VALUE_DIM, dtype, full_rest
            )
            value_rest = dot(u, tl.trans(matrix), value_rest)
    query = (query + load_bias(bias, keys, bias_o, KEY_DIM)).to(dtype)
    key = (key + load_bias(bias + KEY_DIM * bias_o, keys, bias_o, KEY_DIM)).to(dtype)
    value = (value + load_bias(bias + 2 * KEY_DIM * bias_o, part, bias_o, VALUE_DIM)).to(dtype)
    if REST:
        last = value_rest + load_bias(bias + 2 * KEY_DIM * bias_o, rest, bias_o, VALUE_DIM)
        return query, key, value, last.to(dtype)
    else:
        return query, key, value, value  # Triton 3.6 has no None among several results


@jit
def depthwise(
    source, row, valid, token, stride, weight, weight_c, weight_y, weight_x, size,
    MIRROR: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr, KERNEL_MAX: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution [rows, BLOCK_K] in fp32 within each window, of a token-major source in memory.

    A row's neighbours belong to other threads, so they come from memory (the first-level cache: this program
    wrote them) as one vectorised load a tap; exchanging them in registers would take shuffles or shared
    memory a tap and two barriers each, and as products with shift matrices 64 MACs a tap instead of one.
    `size` is the head's own kernel size, one branch each, so that the taps of a row of the kernel unroll;
    the taps beyond it are never read. MIRROR gives the transposed convolution.
    """
    channels = tl.arange(0, BLOCK_K)
    # All ones where the width is whole, so that a row's mask is constant along it.
    live = channels < KEY_DIM if KEY_DIM < BLOCK_K else tl.full([BLOCK_K], 1, tl.int1)
    weight += channels.to(tl.int64) * weight_c
    weight_y = tl.cast(weight_y, tl.int64)
    weight_x = tl.cast(weight_x, tl.int64)
    place = source + (row[:, None] * stride + channels[None, :])
    y = token // WINDOW_W
    x = token % WINDOW_W
    total = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    for candidate in tl.static_range(1, KERNEL_MAX + 1, 2):
        if size == candidate:
            for tap_y in range(0, candidate):
                dy = candidate // 2 - tap_y if MIRROR else tap_y - candidate // 2
                in_row = valid & (y + dy >= 0) & (y + dy < WINDOW_H)
                taps = weight + (tap_y + (KERNEL_MAX - candidate) // 2) * weight_y
                for tap_x in tl.static_range(candidate):
                    dx = candidate // 2 - tap_x if MIRROR else tap_x - candidate // 2
                    inside = in_row & (x + dx >= 0) & (x + dx < WINDOW_W)
                    neighbour = tl.load(
                        place + (dy * WINDOW_W + dx) * stride, mask=inside[:, None] & live[None, :], other=0.0
                    )
                    tap = tl.load(
                        taps + (tap_x + (KERNEL_MAX - candidate) // 2) * weight_x, mask=live, other=0.0
                    )
                    total += tap.to(DTYPE).to(tl.float32)[None, :] * neighbour.to(tl.float32)
    return total


@jit
def by_window(tile, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """[rows, width] as [PACK, BLOCK, width], or as it is when it holds one window.

    Products in three dimensions keep packed windows apart: no masked logits between them, and a NaN of one
    never meets the zero weights of another.
    """
    if PACK == 1:
        return tile
    else:
        return tl.reshape(tile, (PACK, BLOCK, tile.shape[1]))


@jit
def by_row(tile, BLOCK: tl.constexpr, PACK: tl.constexpr):
    if PACK == 1:
        return tile
    else:
        return tl.reshape(tile, (PACK * BLOCK, tile.shape[2]))


@jit
def swap(tile):
    """Swaps the last two dimensions."""
    if len(tile.shape) == 2:
        return tl.trans(tile)
    else:
        return tl.permute(tile, (0, 2, 1))


@jit
def attention_weights(
    query, key, table, head, table_h, table_t, scale, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Softmax numerators in fp32 and their row sums (a dimension of 1 kept); query and key are by window."""
    tokens = tl.arange(0, BLOCK)
    bias = bias_logits(table, head, table_h, table_t, tokens, tokens, WINDOW_H, WINDOW_W, False)
    if PACK > 1:
        bias = bias[None, :, :]
    logits = dot(query, swap(key)) * (scale * LOG2E) + bias
    axis: tl.constexpr = len(logits.shape) - 1
    maximum = tl.max(logits, axis, keep_dims=True)
    # A row whose every key is forbidden by the table: -inf - -inf; plain PyTorch's NaN comes from 0 / 0.
    weights = tl.exp2(logits - tl.where(maximum == -INF, 0.0, maximum))
    return weights, tl.sum(weights, axis, keep_dims=True)
