"""The best partner of every even token, in Triton; scores live in registers alone.

A program owns a tile of even tokens and walks through the odd ones, keeping the highest score so far and its token in
every lane: the row's own maximum is taken once, at the end. Walking in rising order and replacing only what is lower
leaves the first of equals. The norm of an odd token divides its column; that of an even token divides the row's
maximum alone, whose place it does not change.

Floor of an image: 2 ceil(t / 2) floor(t / 2) c FLOPs at the matrix rate, the metric read once.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, dot, load_tile


@jit
def square_sums(tile):
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@jit
def inverse_norm(squares):
    norm = tl.sqrt_rn(squares)
    return tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(norm == 0, 1.0, norm))


@jit
def load_channels(rows, valid, channel_stride, first, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [rows, BLOCK_C] from the first on, of rows at these addresses; zeros beyond the last."""
    channels = first + tl.arange(0, BLOCK_C)
    mask = valid[:, None]
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (channels < CHANNELS)[None, :]
    return load_tile(rows[:, None], channels.to(tl.int64)[None, :] * channel_stride, mask)


@jit(do_not_specialize=["tokens"])
def best_partners(
    best, partner, metric, metric_b, metric_t, metric_c, tokens,
    CLASS_TOKEN: tl.constexpr, DISTILL_TOKEN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """best and partner [batch, evens]: the highest cosine, and the number of its odd token (0 for token 1).

    Where no score is a number: -2 and the first; -inf for a class token. Channels that fit a tile stay in registers.
    """
    evens = (tokens + 1) // 2
    odds = tokens // 2
    tiles = tl.cdiv(evens, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    metric += image * metric_b
    a = (program % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    a_valid = a < evens
    left_rows = metric + (2 * a).to(tl.int64) * metric_t
    left = load_channels(left_rows, a_valid, metric_c, 0, CHANNELS, BLOCK_C)
    squares = square_sums(left)
    for channel in range(BLOCK_C, CHANNELS, BLOCK_C):
        squares += square_sums(load_channels(left_rows, a_valid, metric_c, channel, CHANNELS, BLOCK_C))

    first_partner: tl.constexpr = 1 if DISTILL_TOKEN else 0
    highest = tl.full([BLOCK_M, BLOCK_N], -INF, tl.float32)
    holder = tl.full([BLOCK_M, BLOCK_N], first_partner, tl.int32)
    for first in range(0, odds, BLOCK_N):
        b = first + tl.arange(0, BLOCK_N)
        b_valid = b < odds
        right_rows = metric + (2 * b + 1).to(tl.int64) * metric_t
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if CHANNELS <= BLOCK_C:
            right = load_channels(right_rows, b_valid, metric_c, 0, CHANNELS, BLOCK_C)
            scores = dot(left, tl.trans(right))
            right_squares = square_sums(right)
        else:
            right_squares = tl.zeros([BLOCK_N], tl.float32)
            for channel in range(0, CHANNELS, BLOCK_C):
                left = load_channels(left_rows, a_valid, metric_c, channel, CHANNELS, BLOCK_C)
                right = load_channels(right_rows, b_valid, metric_c, channel, CHANNELS, BLOCK_C)
                scores = dot(left, tl.trans(right), scores)
                right_squares += square_sums(right)
        scores *= inverse_norm(right_squares)[None, :]
        # What is not a number is above nothing.
        higher = (scores > highest) & (b_valid & (b >= first_partner))[None, :]
        highest = tl.where(higher, scores, highest)
        holder = tl.where(higher, b[None, :], holder)
    top = tl.max(highest, 1)
    choice = tl.min(tl.where(highest == top[:, None], holder, 2147483647), 1)
    # Of an even token that holds an infinity or NaN no score is a number.
    comparable = (squares < INF) & (top > -INF)
    top = tl.where(comparable, top * inverse_norm(squares), -2.0)
    choice = tl.where(comparable, choice, first_partner)
    if CLASS_TOKEN:
        top = tl.where(a == 0, -INF, top)
    tl.store(best + image * evens + a, top, mask=a_valid)
    tl.store(partner + image * evens + a, choice, mask=a_valid)
