"""The products of learnable token merging in Triton: the mask with tokens, both ways, and tokens with tokens.

y = G^T z, dz = G dy and dother = G dy_other are one kernel, which takes the mask by its strides and normalises each
tile between memory and matrix unit. The gradient of the mask, z dy^T + other dy_other^T, is the other kernel.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot, load_tile, place_of, store_tile
from vitkernels.kernels.learnable_token_merge.triton_mask import load_norm, normalized


@jit(do_not_specialize=["rows", "depth", "norm_b"])
def mask_product(
    out, g, shifts, divisors, x, out_b, out_n, out_c, g_b, g_row, g_depth, norm_b, x_b, x_n, x_c, rows, depth, width,
    NORMALIZE: tl.constexpr, BY_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [batch, rows, width] = G x, G [rows, depth] being the mask or its transpose.

    BY_ROW: what normalises the mask belongs to its rows, as G has them; else to the depth. Programs of one image and a
    tile of rows are neighbours, which share the mask in the second-level cache. Floor: 2 rows * depth * width FLOPs an
    image at the matrix rate; mask, x and out once from or to memory.
    """
    tiles_n = tl.cdiv(width, BLOCK_N)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles_n // tiles_m
    row = (program // tiles_n % tiles_m).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % tiles_n).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_valid, column_valid = row < rows, column < width
    g += image * g_b
    x += image * x_b
    norms = image * norm_b
    if NORMALIZE != "none" and BY_ROW:
        shift = load_norm(shifts, norms + row, row_valid, 0.0)[:, None]
        divisor = load_norm(divisors, norms + row, row_valid, 1.0)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        inner_valid = inner < depth
        mask = row_valid[:, None] & inner_valid[None, :]
        raw = load_tile(g, place_of(row, g_row, inner, g_depth), mask)
        if NORMALIZE == "none":
            weights = raw
        else:
            if not BY_ROW:
                shift = load_norm(shifts, norms + inner, inner_valid, 0.0)[None, :]
                divisor = load_norm(divisors, norms + inner, inner_valid, 1.0)[None, :]
            # An exponential of the zeros beyond the mask may overflow.
            weights = tl.where(mask, normalized(raw.to(tl.float32), shift, divisor, NORMALIZE), 0.0)
        tile = load_tile(x, place_of(inner, x_n, column, x_c), inner_valid[:, None] & column_valid[None, :])
        total = dot(weights.to(tile.dtype), tile, total)
    store_tile(
        out + image * out_b, place_of(row, out_n, column, out_c), row_valid[:, None] & column_valid[None, :], total
    )  # fmt: skip


@jit
def outer_sum(
    total, left, right, left_rows, right_rows, left_valid, right_valid, left_n, left_c, right_n, right_c, width,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + left right^T over the channels of one image."""
    for first in range(0, width, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        inside = (channel < width)[None, :]
        a = load_tile(left, place_of(left_rows, left_n, channel, left_c), left_valid[:, None] & inside)
        b = load_tile(right, place_of(right_rows, right_n, channel, right_c), right_valid[:, None] & inside)
        total = dot(a, tl.trans(b), total)
    return total


@jit(do_not_specialize=["batch", "tokens", "merged_tokens", "shares", "out_b"])
def mask_gradient(
    out, z, grad_y, other, grad_other, out_b, out_n, out_p, z_b, z_n, z_c, gy_b, gy_p, gy_c, o_b, o_n, o_c, go_b, go_p,
    go_c, batch, tokens, merged_tokens, shares, width, other_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [shares, N, P]: z grad_y^T + other grad_other^T, summed over each share of the batch in rising order.

    Either pair may be absent. Floor: 2 N P (D + D') FLOPs an image at the matrix rate; the operands read once.

    local memory: up to 24 bytes: on sm_90 without wgmma the sums, both operands' fragments and the addresses of
    the next ones do not quite fit the registers.
    """
    tiles_p = tl.cdiv(merged_tokens, BLOCK_N)
    tiles_n = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    share = program // tiles_p // tiles_n
    token = (program // tiles_p % tiles_n).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    merged = (program % tiles_p).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_valid, merged_valid = token < tokens, merged < merged_tokens
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for image in range((share * batch // shares).to(tl.int32), ((share + 1) * batch // shares).to(tl.int32)):
        at = tl.cast(image, tl.int64)
        if grad_y is not None:
            total = outer_sum(
                total, z + at * z_b, grad_y + at * gy_b, token, merged, token_valid, merged_valid, z_n, z_c, gy_p, gy_c,
                width, BLOCK_K,
            )  # fmt: skip
        if grad_other is not None:
            total = outer_sum(
                total, other + at * o_b, grad_other + at * go_b, token, merged, token_valid, merged_valid, o_n, o_c,
                go_p, go_c, other_width, BLOCK_K,
            )  # fmt: skip
    store_tile(
        out + share * out_b, place_of(token, out_n, merged, out_p), token_valid[:, None] & merged_valid[None, :],
        total,
    )  # fmt: skip
