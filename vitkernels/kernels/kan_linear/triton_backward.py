"""The backward kernels of kan_linear in Triton: of u and of everything below it, and of the weight.

No float atomics: every program owns its outputs or leaves partial sums that are added in a fixed order.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot_in_parts
from vitkernels.kernels.kan_linear.triton_basis import (
    affine,
    basis,
    basis_slope,
    centres,
    distances,
    normed_tile,
    weight_columns,
)


@jit(do_not_specialize=["rows"])
def backward_u(
    grad_u, scale_partials, shift_partials, grid_partials, grad_y, mean, rstd, x, weight, ln_weight, ln_bias, grid,
    rows, channels, outputs, grad_row, x_row, weight_row, inverse, GRIDS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """du [rows, channels] of a tile: dPhi = dY W stays in registers and is contracted with phi' over the grid.

    Each tile of rows leaves its sums for the norm's scale and shift [tiles, channels], and each tile its sums for
    the grid [tiles, channel tiles, PADDED]. Floor: the FLOPs of the forward pass.
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    tile, slice_c = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = slice_c * BLOCK_C
    row = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    column, exists = weight_columns(first, channels, GRIDS, PADDED, BLOCK_C)
    grad_phi = tl.zeros([BLOCK_N, BLOCK_C * PADDED], tl.float32)
    for start in range(0, outputs, BLOCK_J):
        output = start + tl.arange(0, BLOCK_J)
        output_inside = output < outputs
        mask = row_inside[:, None] & output_inside[None, :]
        dy = tl.load(grad_y + row[:, None] * grad_row + output[None, :], mask=mask, other=0.0)
        place = weight + output.to(tl.int64)[:, None] * weight_row + column[None, :]
        w = tl.load(place, mask=output_inside[:, None] & exists[None, :], other=0.0)
        grad_phi = dot_in_parts(dy, w, grad_phi)
    channel = first + tl.arange(0, BLOCK_C)
    normed = normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row)
    u = affine(normed, ln_weight, ln_bias, channel, channels)
    centre, _ = centres(grid, inverse, GRIDS, PADDED)
    phi, tanh = basis_slope(distances(u, centre, inverse))
    terms = tl.reshape(grad_phi, [BLOCK_N, BLOCK_C, PADDED]) * phi * tanh * (-2 * inverse)
    result = tl.sum(terms, 2)
    mask = row_inside[:, None] & (channel < channels)[None, :]
    if grad_u is not None:
        tl.store(grad_u + row[:, None] * channels + channel[None, :], result, mask=mask)
    partial = tile.to(tl.int64) * channels + channel
    tl.store(
        scale_partials + partial, tl.sum(tl.where(mask, result * normed, 0.0), 0), mask=channel < channels
    )
    tl.store(shift_partials + partial, tl.sum(tl.where(mask, result, 0.0), 0), mask=channel < channels)
    if grid_partials is not None:
        whole = tl.where(mask[:, :, None], terms, 0.0)
        place = grid_partials + tl.program_id(0).to(tl.int64) * PADDED + tl.arange(0, PADDED)
        tl.store(place, -tl.sum(tl.sum(whole, 0), 0))


@jit
def backward_norm(
    grad_x, grad_u, mean, rstd, x, ln_weight, rows, channels, x_row, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w - mean(w) - normed * mean(w * normed)), w = du * gamma. Floor: x and du read, dx written once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    projection = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = row_inside[:, None] & (channel < channels)[None, :]
        gamma = tl.load(ln_weight + channel, mask=channel < channels, other=0.0)
        w = (
            tl.load(grad_u + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            * gamma[None, :]
        )
        total += w
        projection += tl.where(
            mask, w * normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row), 0.0
        )
    a = tl.sum(total, 1) / channels
    b = tl.sum(projection, 1) / channels
    scale = tl.load(rstd + row, mask=row_inside, other=0.0)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = row_inside[:, None] & (channel < channels)[None, :]
        gamma = tl.load(ln_weight + channel, mask=channel < channels, other=0.0)
        w = (
            tl.load(grad_u + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            * gamma[None, :]
        )
        normed = normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row)
        result = (w - a[:, None] - normed * b[:, None]) * scale[:, None]
        tl.store(
            grad_x + row[:, None] * channels + channel[None, :], result.to(grad_x.dtype.element_ty), mask=mask
        )


@jit(do_not_specialize=["rows", "share"])
def backward_weight(
    grad_weight, grad_y, mean, rstd, x, ln_weight, ln_bias, grid, rows, share, channels, outputs, grad_row, x_row,
    inverse, GRIDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of dW = dY^T Phi over `share` rows, Phi made again; grad_weight is [shares of rows, J, I * G].

    Floor: the FLOPs of the forward pass. Special functions: as forward_product.
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    first = (tl.program_id(0) % tiles) * BLOCK_C
    output = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    output_inside = output < outputs
    channel = first + tl.arange(0, BLOCK_C)
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    centre, narrow = centres(grid, inverse, GRIDS, PADDED)
    total = tl.zeros([BLOCK_J, BLOCK_C * PADDED], tl.float32)
    for start in range(0, share, BLOCK_N):
        row = begin + start + tl.arange(0, BLOCK_N)
        row_inside = row < end
        place = grad_y + row[None, :] * grad_row + output[:, None]
        dy = tl.load(place, mask=output_inside[:, None] & row_inside[None, :], other=0.0)
        normed = normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row)
        u = affine(normed, ln_weight, ln_bias, channel, channels)
        phi = basis(u, centre, narrow, inverse, dy.dtype != tl.float32)
        total = dot_in_parts(dy, tl.reshape(phi, [BLOCK_N, BLOCK_C * PADDED]).to(dy.dtype), total)
    column, exists = weight_columns(first, channels, GRIDS, PADDED, BLOCK_C)
    depth = tl.cast(channels, tl.int64) * GRIDS
    place = grad_weight + (tl.program_id(1) * outputs + output)[:, None] * depth + column[None, :]
    mask = output_inside[:, None] & exists[None, :]
    tl.store(place, total.to(grad_weight.dtype.element_ty), mask=mask)
