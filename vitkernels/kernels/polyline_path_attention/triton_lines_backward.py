"""Gradients of the criss-cross sweeps in Triton. One kernel serves queries and keys as owners, rows and columns.

With g = grad_out, and for rows A = A_w, y = A_h v, z = A_h^T g, for columns A_h, A_w v, A_w^T g: the gradient of the
weights A is (g y^T + z v^T) / 2. Sweeps: rows give A_w^T g; columns give A_h^T g and their share of every gradient;
rows add theirs. Of lines that fit a tile one program owns queries and keys, so that a sweep is one launch and computes
the logits once. Of longer lines a walk of its own finds what each row needs, and then queries and keys have owners of
their own.

Floor of a sweep per map and head, N tokens of lines of L, element size s: reads q, k, v, g, y, z and writes three
gradients, s N (4 d + 5 dv); 2 N L (3 d + 3 dv) FLOPs, N L exponentials.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, dot, dot_in_parts, softmax_start, softmax_step
from vitkernels.kernels.polyline_path_attention.triton_lines import (
    line_cells,
    line_mask,
    line_place,
    line_tokens,
    met,
)
from vitkernels.kernels.polyline_path_attention.triton_map import load_tokens, plane_offset, store_tokens


@jit(do_not_specialize=["pair"])
def rows_lines(
    rows, q, grad_out, z, k, y, v, sums, q_s, go_s, z_s, k_s, y_s, v_s, size, plane_s, heads, pair, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills rows [3] planes: the largest base-2 logit of each query, 1 / the sum of its weights, and delta, the sum of
    weights times their gradients. None of them is rounded as lse and saved outputs are, whose errors do not cancel.
    """
    batch, head, line, block = line_place(size, heads, LINES)
    lines, positions, valid = line_tokens(line, block * BLOCK_M, size, LINES, BLOCK_M)
    plane = plane_offset(batch, heads, head, size)
    own_cells = plane + line_cells(plane_s, lines, positions)
    own = tl.load(sums + own_cells, mask=valid, other=0.0)
    query = load_tokens(q, q_s, batch, head, lines, positions, valid, BLOCK_D, HEAD_DIM)
    own_g = load_tokens(grad_out, go_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
    own_z = load_tokens(z, z_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
    maximum, total = softmax_start(LINES * BLOCK_M)
    delta = tl.zeros([LINES * BLOCK_M], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        key_lines, key_positions, key_valid = line_tokens(line, start, size, LINES, BLOCK_N)
        cells = plane + line_cells(plane_s, key_lines, key_positions)
        other = tl.load(sums + cells, mask=key_valid, other=0.0)
        key = load_tokens(k, k_s, batch, head, key_lines, key_positions, key_valid, BLOCK_D, HEAD_DIM)
        key_y = load_tokens(y, y_s, batch, head, key_lines, key_positions, key_valid, BLOCK_V, VALUE_DIM)
        value = load_tokens(v, v_s, batch, head, key_lines, key_positions, key_valid, BLOCK_V, VALUE_DIM)
        later = positions[:, None] >= key_positions[None, :]
        logits = dot(query, tl.trans(key)) * (scale * LOG2E) + line_mask(own, other, later)
        logits = tl.where(met(lines, key_lines, key_positions, size, LINES), logits, -INF)
        grad_weights = dot(own_g, tl.trans(key_y)) + dot(own_z, tl.trans(value))
        weights, rescale, maximum, total = softmax_step(logits, maximum, total)
        delta = delta * rescale + tl.sum(weights * grad_weights, 1)
    planes = tl.cast(pair, tl.int64)
    tl.store(rows + own_cells, maximum, mask=valid)
    tl.store(rows + planes + own_cells, 1.0 / total, mask=valid)
    tl.store(rows + 2 * planes + own_cells, delta / total, mask=valid)


@jit(do_not_specialize=["pair"])
def backward_lines(
    grad, other_grad, grad_v, passed, part, other_part, left, left_y, left_z, walked, walked_y, walked_z,
    sums, lse, rows, grad_s, og_s, gv_s, passed_s, left_s, ly_s, lz_s, walked_s, wy_s, wz_s, size, plane_s,
    heads, pair, scale,
    KEYS: tl.constexpr, ONE: tl.constexpr, ADD: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """With KEYS the owners are keys: left = k, left_y = y, left_z = v, walked = q, g, z. Else they are queries: left =
    q, g, z, walked = k, y, v. What is None is not wanted, or not needed for what is:

    grad of the owners; grad_v and passed = A^T g of keys; part, a plane, what the owners give to the gradient of the
    sums. With ADD grad, other_grad and grad_v are added to what they hold. With ONE, which is for KEYS and lines of one
    block, other_grad and other_part are what the queries would have given, and lse and rows are not read; where
    nothing but passed is wanted, lse is.

    local memory: up to 128 bytes: float32 products take whole rows of their operands in registers, which beyond 64
    channels are more than there are.
    """
    batch, head, line, block = line_place(size, heads, LINES)
    lines, positions, valid = line_tokens(line, block * BLOCK_M, size, LINES, BLOCK_M)
    plane = plane_offset(batch, heads, head, size)
    own_cells = plane + line_cells(plane_s, lines, positions)
    own = tl.load(sums + own_cells, mask=valid, other=0.0)
    planes = tl.cast(pair, tl.int64)
    if not KEYS:
        shift = tl.load(rows + own_cells, mask=valid, other=INF)
        factor = tl.load(rows + planes + own_cells, mask=valid, other=0.0)
        row_delta = tl.load(rows + 2 * planes + own_cells, mask=valid, other=0.0)[:, None]
    token = load_tokens(left, left_s, batch, head, lines, positions, valid, BLOCK_D, HEAD_DIM)
    if left_y is not None:
        own_y = load_tokens(left_y, ly_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
        own_z = load_tokens(left_z, lz_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
    gradient = tl.zeros([LINES * BLOCK_M, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([LINES * BLOCK_M, BLOCK_V], tl.float32)
    through = tl.zeros([LINES * BLOCK_M, BLOCK_V], tl.float32)
    of_sums = tl.zeros([LINES * BLOCK_M], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        other_lines, other_positions, other_valid = line_tokens(line, start, size, LINES, BLOCK_N)
        other_cells = plane + line_cells(plane_s, other_lines, other_positions)
        other_sums = tl.load(sums + other_cells, mask=other_valid, other=0.0)
        other = load_tokens(
            walked, walked_s, batch, head, other_lines, other_positions, other_valid, BLOCK_D, HEAD_DIM
        )
        other_y = load_tokens(
            walked_y, wy_s, batch, head, other_lines, other_positions, other_valid, BLOCK_V, VALUE_DIM
        )
        later = positions[:, None] >= other_positions[None, :]
        logits = dot(token, tl.trans(other)) * (scale * LOG2E) + line_mask(own, other_sums, later)
        there = met(lines, other_lines, other_positions, size, LINES)
        if KEYS:
            there = tl.trans(met(other_lines, lines, positions, size, LINES))
        if ONE:
            # A query's weights are a column, and all of them are here.
            logits = tl.where(there, logits, -INF)
            weights = tl.exp2(logits - tl.max(logits, 0)[None, :])
            weights = weights / tl.sum(weights, 0)[None, :]
        elif rows is None:
            other_shift = tl.load(lse + other_cells, mask=other_valid, other=INF) * LOG2E
            weights = tl.exp2(tl.where(there, logits, -INF) - other_shift[None, :])
        elif KEYS:
            other_shift = tl.load(rows + other_cells, mask=other_valid, other=INF)
            other_factor = tl.load(rows + planes + other_cells, mask=other_valid, other=0.0)
            weights = tl.exp2(tl.where(there, logits, -INF) - other_shift[None, :]) * other_factor[None, :]
        else:
            weights = tl.exp2(tl.where(there, logits, -INF) - shift[:, None]) * factor[:, None]
        exact: tl.constexpr = other_y.dtype == tl.float32
        if passed is not None and not exact:
            through = dot(weights.to(other_y.dtype), other_y, through)
        if left_y is not None:
            other_z = load_tokens(
                walked_z, wz_s, batch, head, other_lines, other_positions, other_valid, BLOCK_V, VALUE_DIM
            )
            grad_weights = dot(own_y, tl.trans(other_y)) + dot(own_z, tl.trans(other_z))
            if grad_v is not None:
                value_gradient = dot_in_parts(weights.to(other_z.dtype), other_z, value_gradient)
            if ONE:
                row_delta = tl.sum(weights * grad_weights, 0)[None, :]
            elif KEYS:
                row_delta = tl.load(rows + 2 * planes + other_cells, mask=other_valid, other=0.0)[None, :]
            grad_logits = weights * (grad_weights - row_delta)
            if grad is not None:
                gradient = dot_in_parts(grad_logits.to(other.dtype), other, gradient)
            if other_grad is not None:
                turned = 0.5 * scale * dot(tl.trans(grad_logits).to(token.dtype), token)
                if ADD:
                    turned += load_tokens(
                        other_grad, og_s, batch, head, other_lines, other_positions, other_valid, BLOCK_D,
                        HEAD_DIM,
                    ).to(tl.float32)  # fmt: skip
                store_tokens(
                    other_grad, og_s, batch, head, other_lines, other_positions, other_valid, turned, BLOCK_D,
                    HEAD_DIM,
                )  # fmt: skip
            if part is not None:
                # A token is no step from itself.
                same = positions[:, None] == other_positions[None, :]
                signed = tl.where(same, 0.0, tl.where(later, grad_logits, -grad_logits))
                of_sums += tl.sum(signed, 1)
                if ONE:
                    tl.store(other_part + other_cells, -0.5 * tl.sum(signed, 0), mask=other_valid)
        if passed is not None and exact:
            # Last: beside the sums of the other products of wide heads these would not fit in registers.
            through = dot_in_parts(weights, other_y, through)
    if grad is not None:
        gradient *= 0.5 * scale
        if ADD:
            held = load_tokens(grad, grad_s, batch, head, lines, positions, valid, BLOCK_D, HEAD_DIM)
            gradient += held.to(tl.float32)
        store_tokens(grad, grad_s, batch, head, lines, positions, valid, gradient, BLOCK_D, HEAD_DIM)
    if grad_v is not None:
        value_gradient *= 0.5
        if ADD:
            held = load_tokens(grad_v, gv_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
            value_gradient += held.to(tl.float32)
        store_tokens(grad_v, gv_s, batch, head, lines, positions, valid, value_gradient, BLOCK_V, VALUE_DIM)
    if passed is not None:
        store_tokens(passed, passed_s, batch, head, lines, positions, valid, through, BLOCK_V, VALUE_DIM)
    if part is not None:
        tl.store(part + own_cells, 0.5 * of_sums, mask=valid)
