"""Gradients of polyline path attention over the whole map in Triton. One kernel serves queries and keys as owners.

Floor per map and head, N tokens, element size s: reads q, k, v, grad_out and writes three gradients, s N (4 d + 3 dv)
+ 32 N bytes; 2 N^2 (3 d + 2 dv) FLOPs and 2 N^2 exponentials. Here logits and their gradient are computed once more,
2 N^2 (d + dv) FLOPs and 2 N^2 exponentials, since queries and keys have owners of their own: nobody adds to another's
result. In float32 a walk of its own does so again for what the rows subtract.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, dot, dot_in_parts, softmax_start, softmax_step
from vitkernels.kernels.polyline_path_attention.triton_map import (
    cell_offsets,
    load_tokens,
    masked,
    masks,
    owner_tables,
    plane_offset,
    store_tokens,
    tile_tokens,
)
from vitkernels.kernels.polyline_path_attention.triton_whole import owner_place


@jit(do_not_specialize=["pair"])
def rows_whole(
    rows, q, grad_out, k, v, sums, q_s, go_s, k_s, v_s, size, heads, pair, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills rows [3, 2] planes: the largest base-2 logit of each row and softmax, 1 / the sum of its weights, and
    delta, the sum of weights times their gradients.

    Float32 takes these in place of lse and of products with saved outputs: their roundings, which would not cancel in
    rows of a single large weight, exceed the errors of the weights themselves.
    """
    BLOCK_M: tl.constexpr = TILE_Y * TILE_X
    batch, head, tile = owner_place(size, heads)
    y, x, valid = tile_tokens(tile, size, TILE_Y, TILE_X)
    plane = plane_offset(batch, heads, head, size)
    sums_w = sums + plane
    sums_h = sums_w + pair
    own = cell_offsets(y, x, size)
    own_w = tl.load(sums_w + own, mask=valid, other=0.0)
    own_h = tl.load(sums_h + own, mask=valid, other=0.0)
    query = load_tokens(q, q_s, batch, head, y, x, valid, BLOCK_D, HEAD_DIM)
    gradient = load_tokens(grad_out, go_s, batch, head, y, x, valid, BLOCK_V, VALUE_DIM)
    first_max, first_total = softmax_start(BLOCK_M)
    second_max, second_total = softmax_start(BLOCK_M)
    first_delta = tl.zeros([BLOCK_M], tl.float32)
    second_delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_valid = columns < size[1]
        right, table, corner, inside = owner_tables(
            sums_w, own_w, y, x, columns, valid, column_valid, size
        )  # fmt: skip
        corner_h = tl.load(sums_h + corner, mask=inside, other=0.0)
        for row in range(0, size[0]):
            key = load_tokens(k, k_s, batch, head, row, columns, column_valid, BLOCK_D, HEAD_DIM)
            value = load_tokens(v, v_s, batch, head, row, columns, column_valid, BLOCK_V, VALUE_DIM)
            of_first, of_second = masks(
                sums_w, sums_h, table, right, corner_h, own_h, y, x, row, columns, valid, column_valid, size
            )
            products = dot(query, tl.trans(key)) * (scale * LOG2E)
            grad_weights = dot(gradient, tl.trans(value))
            weights, rescale, first_max, first_total = softmax_step(
                masked(products + of_first, column_valid), first_max, first_total
            )
            first_delta = first_delta * rescale + tl.sum(weights * grad_weights, 1)
            weights, rescale, second_max, second_total = softmax_step(
                masked(products + of_second, column_valid), second_max, second_total
            )
            second_delta = second_delta * rescale + tl.sum(weights * grad_weights, 1)
    cells = rows + plane + own
    planes = 2 * tl.cast(pair, tl.int64)
    tl.store(cells, first_max, mask=valid)
    tl.store(cells + pair, second_max, mask=valid)
    tl.store(cells + planes, 1.0 / first_total, mask=valid)
    tl.store(cells + planes + pair, 1.0 / second_total, mask=valid)
    tl.store(cells + 2 * planes, first_delta / first_total, mask=valid)
    tl.store(cells + 2 * planes + pair, second_delta / second_total, mask=valid)


@jit
def load_row(rows, lse, place, pair, valid, EXACT: tl.constexpr):
    """(base-2 shift, factor, delta) of a softmax's rows: exp2(logits - shift) * factor are their weights."""
    if EXACT:
        planes = 2 * tl.cast(pair, tl.int64)
        shift = tl.load(rows + place, mask=valid, other=INF)
        factor = tl.load(rows + place + planes, mask=valid, other=0.0)
        delta = tl.load(rows + place + 2 * planes, mask=valid, other=0.0)
    else:
        shift = tl.load(lse + place, mask=valid, other=INF) * LOG2E
        factor = tl.full(shift.shape, 1.0, tl.float32)
        delta = tl.load(rows + place, mask=valid, other=0.0)
    return shift, factor, delta


@jit(do_not_specialize=["pair"])
def backward_whole(
    grad, grad_value, parts_w, parts_h, left, left_result, walked, walked_result, sums, lse, rows,
    grad_s, gv_s, left_s, lr_s, walked_s, wr_s, size, heads, pair, scale,
    KEYS: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the owners: of queries (left = q, left_result = grad_out; walked = k and v), or with KEYS of keys
    and values (left = k and v, walked = q and grad_out). What is None is not wanted.

    parts_w and parts_h [2 + 2 tiles_x] planes take the gradients of the sums: one of the owners themselves a side, and
    of the corners, which lie in the owners' rows, one a side and column of tiles. rows are delta, [2] planes, or with
    EXACT what rows_whole says, in place of lse.

    local memory: up to 16 bytes: in half precision keys of 128 channels own two tiles and two sums of registers.
    From Triton 3.7 on it is 8.
    """
    BLOCK_M: tl.constexpr = TILE_Y * TILE_X
    batch, head, tile = owner_place(size, heads)
    y, x, valid = tile_tokens(tile, size, TILE_Y, TILE_X)
    plane = plane_offset(batch, heads, head, size)
    sums_w = sums + plane
    sums_h = sums_w + pair
    own = cell_offsets(y, x, size)
    own_w = tl.load(sums_w + own, mask=valid, other=0.0)
    own_h = tl.load(sums_h + own, mask=valid, other=0.0)
    # The softmax whose corners are in the owner's row: that of M for queries, that of M^T for keys.
    near = plane + tl.where(KEYS, tl.cast(pair, tl.int64), 0)
    far = plane + tl.where(KEYS, 0, tl.cast(pair, tl.int64))
    if not KEYS:
        near_shift, near_factor, near_delta = load_row(rows, lse, near + own, pair, valid, EXACT)
        far_shift, far_factor, far_delta = load_row(rows, lse, far + own, pair, valid, EXACT)
    token = load_tokens(left, left_s, batch, head, y, x, valid, BLOCK_D, HEAD_DIM)
    result = load_tokens(left_result, lr_s, batch, head, y, x, valid, BLOCK_V, VALUE_DIM)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    down = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_valid = columns < size[1]
        right, table, corner, inside = owner_tables(
            sums_w, own_w, y, x, columns, valid, column_valid, size
        )  # fmt: skip
        corner_h = tl.load(sums_h + corner, mask=inside, other=0.0)
        at_corner_w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        at_corner_h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for row in range(0, size[0]):
            other = load_tokens(walked, walked_s, batch, head, row, columns, column_valid, BLOCK_D, HEAD_DIM)
            other_result = load_tokens(
                walked_result, wr_s, batch, head, row, columns, column_valid, BLOCK_V, VALUE_DIM
            )
            of_near, of_far = masks(
                sums_w, sums_h, table, right, corner_h, own_h, y, x, row, columns, valid, column_valid, size
            )
            products = dot(token, tl.trans(other)) * (scale * LOG2E)
            grad_weights = dot(result, tl.trans(other_result))
            if KEYS:
                there = valid[:, None]
                place = cell_offsets(row, columns, size)
                shift, factor, row_delta = load_row(rows, lse, near + place, pair, column_valid, EXACT)
                near_weights = tl.exp2(tl.where(there, products + of_near, -INF) - shift[None, :])
                if EXACT:
                    near_weights *= factor[None, :]
                grad_near = near_weights * (grad_weights - row_delta[None, :])
                shift, factor, row_delta = load_row(rows, lse, far + place, pair, column_valid, EXACT)
                far_weights = tl.exp2(tl.where(there, products + of_far, -INF) - shift[None, :])
                if EXACT:
                    far_weights *= factor[None, :]
                grad_far = far_weights * (grad_weights - row_delta[None, :])
                if grad_value is not None:
                    weights = (near_weights + far_weights).to(other_result.dtype)
                    value_gradient = dot_in_parts(weights, other_result, value_gradient)
            else:
                near_weights = tl.exp2(masked(products + of_near, column_valid) - near_shift[:, None])
                far_weights = tl.exp2(masked(products + of_far, column_valid) - far_shift[:, None])
                if EXACT:
                    near_weights *= near_factor[:, None]
                    far_weights *= far_factor[:, None]
                grad_near = near_weights * (grad_weights - near_delta[:, None])
                grad_far = far_weights * (grad_weights - far_delta[:, None])
            if grad is not None:
                gradient = dot_in_parts((grad_near + grad_far).to(other.dtype), other, gradient)
            if parts_w is not None:
                below = tl.where(y > row, 1.0, tl.where(y < row, -1.0, 0.0))
                at_corner_w += grad_near
                at_corner_h += below[:, None] * grad_near
                down += below * tl.sum(grad_far, 1)
        if parts_w is not None:
            # Tokens of one column are no steps apart: what they would add and subtract again is left out.
            at_corner_w = tl.where(right, at_corner_w, -at_corner_w)
            at_corner_w = tl.where(x[:, None] == columns[None, :], 0.0, at_corner_w)
            along += tl.sum(at_corner_w, 1)
            corner_part = (2 + tl.where(KEYS, size[3], 0) + tile % size[3]).to(tl.int64) * pair + plane
            of_tile = tile // size[3] * TILE_Y + tl.arange(0, TILE_Y)
            cells = corner_part + cell_offsets(of_tile[:, None], columns[None, :], size)
            row_valid = (of_tile < size[0])[:, None] & column_valid[None, :]
            sums_of_rows = tl.sum(tl.reshape(at_corner_w, [TILE_Y, TILE_X, BLOCK_N]), 1)
            tl.store(parts_w + cells, -0.5 * sums_of_rows, mask=row_valid)
            sums_of_rows = tl.sum(tl.reshape(at_corner_h, [TILE_Y, TILE_X, BLOCK_N]), 1)
            tl.store(parts_h + cells, 0.5 * sums_of_rows, mask=row_valid)
    if grad is not None:
        gradient *= 0.5 * scale
        store_tokens(grad, grad_s, batch, head, y, x, valid, gradient, BLOCK_D, HEAD_DIM)
    if grad_value is not None:
        store_tokens(grad_value, gv_s, batch, head, y, x, valid, 0.5 * value_gradient, BLOCK_V, VALUE_DIM)
    if parts_w is not None:
        own_part = tl.cast(pair, tl.int64) * tl.where(KEYS, 1, 0) + plane + own
        tl.store(parts_w + own_part, 0.5 * along, mask=valid)
        tl.store(parts_h + own_part, 0.5 * down, mask=valid)
