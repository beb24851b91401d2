"""Where the tokens of a tile lie on the map, and which pairs of tokens are neighbors, in Triton.

Dilation splits each axis into groups that never meet; a token is numbered inside its group, where dilation does
not exist. Tokens are owned by tiles of TILE_Y x TILE_X numbers of one group, their slots row by row. What a tile
meets, the keys of its queries or the queries of its keys, is a box of its group: it is walked in slots too, as many
at a time as a block takes, so that no block is torn at a row's end. A sequence is a map of height 1.

`size` holds (height, width, dilation_y, dilation_x, tiles_y, tiles_x), and strides go (batch, y, x, head, channel).
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E

# The number of an empty slot, which no window holds.
NOWHERE = tl.constexpr(1 << 30)


@jit
def axis_place(group, extent, dilation, tile, TILE: tl.constexpr):
    """(length of a group, a tile's first number, its end) along one axis; an empty tile ends where it begins."""
    length = extent // dilation + tl.where(group < extent % dilation, 1, 0)
    first = tile * TILE
    return length, first, tl.maximum(tl.minimum(first + TILE, length), first)


@jit
def tile_place(index, size, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """(group, length, first, end) of each axis, y before x. Groups vary fastest: they share cache lines."""
    group_x = index % size[3]
    index = index // size[3]
    group_y = index % size[2]
    index = index // size[2]
    length_y, first_y, end_y = axis_place(group_y, size[0], size[2], index // size[5], TILE_Y)
    length_x, first_x, end_x = axis_place(group_x, size[1], size[3], index % size[5], TILE_X)
    return group_y, group_x, length_y, length_x, first_y, first_x, end_y, end_x


@jit
def window_start(number, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key of a query's window, which near a border is shifted inward."""
    if CAUSAL:
        return tl.maximum(number - (KERNEL - 1), 0)
    else:
        return tl.maximum(tl.minimum(number - KERNEL // 2, length - KERNEL), 0)


@jit
def window_size(number, start, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys in a query's window, as an unsigned integer or a constant."""
    if CAUSAL:
        return (number + 1 - start).to(tl.uint32, bitcast=True)
    else:
        return KERNEL


@jit
def keys_of(first, end, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """(first, count) of the keys along one axis that the queries first .. end - 1 see."""
    begin = window_start(first, length, KERNEL, CAUSAL)
    if CAUSAL:
        stop = end
    else:
        stop = window_start(end - 1, length, KERNEL, CAUSAL) + KERNEL
    return begin, tl.where(end > first, stop - begin, 0)


@jit
def queries_of(first, end, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """(first, count) of the queries along one axis that see any of the keys first .. end - 1."""
    if CAUSAL:
        begin = first
        stop = tl.minimum(end + KERNEL - 1, length)
    else:
        # The windows of a border's queries are those of the query half a window further in.
        begin = tl.where(first < KERNEL, 0, first - (KERNEL - 1 - KERNEL // 2))
        stop = tl.where(end > length - KERNEL, length, end + KERNEL // 2)
    return begin, tl.where(end > first, stop - begin, 0)


@jit
def tile_numbers(
    first_y, first_x, end_y, end_x, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr
):
    """(y, x, whether there is a token) of a tile's slots."""
    slots = tl.arange(0, BLOCK)
    y = first_y + slots // TILE_X
    x = first_x + slots % TILE_X
    return y, x, (y < end_y) & (x < end_x)


@jit
def box_numbers(first, begin_y, begin_x, width, count, BLOCK: tl.constexpr):
    """(y, x, whether there is a token) of the slots from `first` on of a box of `width` numbers a row."""
    slots = first + tl.arange(0, BLOCK)
    # Exact for boxes of up to 2^20 slots, and a few times cheaper than a division of integers.
    rows = ((slots.to(tl.float32) + 0.5) * (1.0 / width.to(tl.float32))).to(tl.int32)
    return begin_y + rows, begin_x + slots - rows * width, slots < count


@jit
def token_offsets(strides, y, x, group_y, group_x, size):
    """Element offsets of tokens from their numbers, in 64 bits."""
    position_y = (group_y + y * size[2]).to(tl.int64)
    position_x = (group_x + x * size[3]).to(tl.int64)
    return position_y * strides[1] + position_x * strides[2]


@jit
def map_offset(strides, batch, head):
    """Element offset of a head of a map; `batch` is a 64-bit integer."""
    return batch * strides[0] + tl.cast(head, tl.int64) * strides[3]


@jit
def in_window(
    query_y, query_x, key_y, key_x, length_y, length_x, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, TILE_Y: tl.constexpr,
):  # fmt: skip
    """Which pairs of tokens are neighbors; of the two shapes [n, 1] and [1, n], one is the queries'."""
    start = window_start(query_x, length_x, KERNEL_X, CAUSAL_X)
    # As an unsigned integer what lies before the window is beyond its end.
    distance = (key_x - start).to(tl.uint32, bitcast=True)
    inside = distance < window_size(query_x, start, KERNEL_X, CAUSAL_X)
    # A tile of one row with a kernel of one row meets nothing else.
    if TILE_Y * KERNEL_Y != 1:
        start = window_start(query_y, length_y, KERNEL_Y, CAUSAL_Y)
        distance = (key_y - start).to(tl.uint32, bitcast=True)
        inside = inside & (distance < window_size(query_y, start, KERNEL_Y, CAUSAL_Y))
    return inside


@jit
def neighbor_logits(
    products, scale, rpb, head, query_y, query_x, key_y, key_x, inside, KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
):  # fmt: skip
    """Base-2 logits from the products of queries and keys; -inf for pairs that are no neighbors."""
    logits = products * (scale * LOG2E)
    if rpb is not None:
        PITCH: tl.constexpr = 2 * KERNEL_X - 1
        table = rpb + tl.cast(head, tl.int64) * ((2 * KERNEL_Y - 1) * PITCH)
        of_query = (KERNEL_Y - 1 - query_y) * PITCH + (KERNEL_X - 1 - query_x)
        bias = tl.load(table + (key_y * PITCH + key_x + of_query), mask=inside, other=0.0)
        logits += bias.to(tl.float32) * LOG2E
    return tl.where(inside, logits, -INF)
