"""Where tokens lie on the map, and what the decays do to a logit, in Triton.

A program owns a tile of tokens (queries, or keys) and walks over the other side, one row of the map at a time. So the
corner of a path is either in the row of the owner and the column of the other token, or the other way round, and all
that a mask takes are values per owner, values per walked token, and tables that do not change from row to row. No
gathers inside the walk. The same function serves both sides: M as a query's owner sees it is M^T as a key's does.

`size` holds (height, width, tiles_y, tiles_x) of the owners' tiles, strides go (batch, y, x, head, channel), planes of
sums are [batch, heads, height, width].
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E


@jit
def tile_tokens(tile, size, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """(y, x, whether there is a token) of the slots of a tile."""
    slots = tl.arange(0, TILE_Y * TILE_X)
    y = tile // size[3] * TILE_Y + slots // TILE_X
    x = tile % size[3] * TILE_X + slots % TILE_X
    return y, x, (y < size[0]) & (x < size[1])


@jit
def token_offsets(strides, batch, head, y, x):
    """Element offsets of tokens, in 64 bits; `batch` and `head` are 64-bit integers."""
    place = batch * strides[0] + head * strides[3]
    return place + tl.cast(y, tl.int64) * strides[1] + tl.cast(x, tl.int64) * strides[2]


@jit
def load_tokens(base, strides, batch, head, y, x, valid, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """The channels of tokens, [tokens, WIDTH], zero where there are none."""
    columns = tl.arange(0, WIDTH)
    offsets = token_offsets(strides, batch, head, y, x)[:, None] + columns[None, :].to(tl.int64) * strides[4]
    # Without the column test a row's mask is constant along it, which keeps its loads vectorised.
    if LIMIT == WIDTH:
        return tl.load(base + offsets, mask=valid[:, None], other=0.0)
    else:
        return tl.load(base + offsets, mask=valid[:, None] & (columns < LIMIT)[None, :], other=0.0)


@jit
def store_tokens(base, strides, batch, head, y, x, valid, tile, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    offsets = token_offsets(strides, batch, head, y, x)[:, None] + columns[None, :].to(tl.int64) * strides[4]
    if LIMIT == WIDTH:
        tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=valid[:, None])
    else:
        mask = valid[:, None] & (columns < LIMIT)[None, :]
        tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=mask)


@jit
def plane_offset(batch, heads, head, size):
    """Where the plane of a head begins, in 64 bits."""
    return (batch * heads + head) * size[0] * size[1]


@jit
def cell_offsets(y, x, size):
    """Of tokens in a plane."""
    return tl.cast(y, tl.int64) * size[1] + x


@jit
def owner_tables(sums_w, own_w, y, x, columns, valid, column_valid, size):
    """(whether the owner is not left of a column, path along the owner's row, corners' offsets, their mask).

    Tables [owners, columns] that hold for every walked row: the corners are in the owner's row. The path is in base 2.
    """
    right = x[:, None] >= columns[None, :]
    corner = cell_offsets(y[:, None], columns[None, :], size)
    inside = valid[:, None] & column_valid[None, :]
    difference = own_w[:, None] - tl.load(sums_w + corner, mask=inside, other=0.0)
    return right, tl.where(right, difference, -difference) * LOG2E, corner, inside


@jit
def masks(
    sums_w, sums_h, table, right, corner_h, own_h, y, x, row, columns, valid, column_valid, size
):  # fmt: skip
    """What the decays add to base-2 logits of owners and a row of the map, both [owners, columns].

    First with the corner in the owner's row and the walked token's column, then with the corner in the walked row and
    the owner's column. The order of positions decides the sign, never that of the sums.
    """
    walked = cell_offsets(row, columns, size)
    walked_w = tl.load(sums_w + walked, mask=column_valid, other=0.0)
    walked_h = tl.load(sums_h + walked, mask=column_valid, other=0.0)
    across = cell_offsets(row, x, size)
    across_w = tl.load(sums_w + across, mask=valid, other=0.0)
    across_h = tl.load(sums_h + across, mask=valid, other=0.0)
    below = tl.where(y >= row, LOG2E, -LOG2E)
    own = table + below[:, None] * (corner_h - walked_h[None, :])
    along = tl.where(right, LOG2E, -LOG2E) * (across_w[:, None] - walked_w[None, :])
    return own, along + (below * (own_h - across_h))[:, None]


@jit
def masked(logits, column_valid):
    return tl.where(column_valid[None, :], logits, -INF)
