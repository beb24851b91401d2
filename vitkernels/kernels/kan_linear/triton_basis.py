"""The basis of kan_linear in Triton, and the forward kernels that make it inside a product.

A tile of phi [rows, channels, grid points] is made in registers from a tile of x and becomes the left operand of a
product; channels and grid points are padded to powers of two by columns whose weights are zero. phi takes the
two-sided form 4 e / (1 + e)^2 with e = exp(-2 |u - g| / h), which neither overflows nor cancels for any u or grid.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import LOG2E, dot_in_parts


@jit
def row_statistics(mean, rstd, x, rows, channels, x_row, eps, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / standard deviation of each row, in two passes. Floor: x read once from memory."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    place = x + row[:, None] * x_row
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (channel < channels)[None, :]
        total += tl.load(place + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    average = tl.sum(total, 1) / channels
    rest = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (channel < channels)[None, :]
        value = tl.load(place + channel[None, :], mask=mask, other=0.0).to(tl.float32) - average[:, None]
        rest += tl.where(mask, value, 0.0)
        squares += tl.where(mask, value * value, 0.0)
    # What the average was rounded by: where all channels are alike, 1 / sqrt(eps) would multiply it.
    shift = tl.sum(rest, 1) / channels
    variance = tl.sum(squares, 1) / channels - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(mean + row, average + shift, mask=inside)
    tl.store(rstd + row, 1 / tl.sqrt_rn(variance + eps), mask=inside)


@jit
def normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row):
    """(x - mean) * rstd as [rows, channels], finite where padded."""
    mask = row_inside[:, None] & (channel < channels)[None, :]
    value = tl.load(x + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    average = tl.load(mean + row, mask=row_inside, other=0.0)
    return (value - average[:, None]) * tl.load(rstd + row, mask=row_inside, other=0.0)[:, None]


@jit
def affine(normed, ln_weight, ln_bias, channel, channels):
    """u, 0 where the channel is padded."""
    gamma = tl.load(ln_weight + channel, mask=channel < channels, other=0.0)
    beta = tl.load(ln_bias + channel, mask=channel < channels, other=0.0)
    return normed * gamma[None, :] + beta[None, :]


@jit
def centres(grid, inverse, GRIDS: tl.constexpr, PADDED: tl.constexpr):
    """The grid [PADDED], and whether exponentials of all of it, and their products, are normal numbers."""
    point = tl.arange(0, PADDED)
    centre = tl.load(grid + point, mask=point < GRIDS, other=0.0)
    return centre, tl.max(tl.abs(centre), 0) * (inverse * 2 * LOG2E) <= 60.0


@jit
def distances(u, centre, inverse):
    """(u - g) / h as [rows, channels, PADDED]."""
    return (u[:, :, None] - centre[None, None, :]) * inverse


@jit
def basis(u, centre, narrow, inverse, HALF: tl.constexpr):
    """phi as [rows, channels, PADDED]. HALF: for a product in 16 bits.

    There, e is the lesser of e^(2 u / h) e^(-2 g / h) and its inverse: two exponentials serve all points of a channel.
    """
    if HALF:
        if narrow:
            unit = inverse * (2 * LOG2E)
            exponent = tl.maximum(u * unit, -100.0, propagate_nan=tl.PropagateNan.ALL)
            exponent = tl.minimum(exponent, 100.0, propagate_nan=tl.PropagateNan.ALL)
            falling = tl.exp2(exponent)[:, :, None] * tl.exp2(centre * -unit)[None, None, :]
            rising = tl.exp2(-exponent)[:, :, None] * tl.exp2(centre * unit)[None, None, :]
            e = tl.minimum(falling, rising)
        else:
            e = tl.exp2(tl.abs(distances(u, centre, inverse)) * (-2 * LOG2E))
    else:
        e = tl.exp2(tl.abs(distances(u, centre, inverse)) * (-2 * LOG2E))
    q = 1 / (1 + e)
    return 4 * e * q * q


@jit
def basis_slope(distance):
    """(phi, tanh) of distances; tanh never as sqrt(1 - phi), which cancels near a centre."""
    magnitude = tl.abs(distance)
    e = tl.exp2(magnitude * (-2 * LOG2E))
    q = 1 / (1 + e)
    far = tl.where(distance < 0, -(1 - e) * q, (1 - e) * q)
    # 1 - e loses the digits of a small tanh, which broad functions live on.
    square = distance * distance
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return 4 * e * q * q, tl.where(magnitude < 0.25, distance * series, far)


@jit
def weight_columns(first, channels, GRIDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr):
    """(columns of the weight for a tile of channels [BLOCK_C * PADDED], which of them exist)."""
    k = tl.arange(0, BLOCK_C * PADDED)
    channel = first + k // PADDED
    return channel * GRIDS + k % PADDED, (channel < channels) & (k % PADDED < GRIDS)


@jit(do_not_specialize=["rows"])
def forward_product(
    y, mean, rstd, x, weight, ln_weight, ln_bias, grid, rows, channels, outputs, x_row, weight_row, inverse,
    GRIDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of y = Phi W^T, whose Phi is made on the way.

    Floor: 2 rows * channels * GRIDS * outputs FLOPs at the matrix rate. Special functions: a reciprocal for each
    element of Phi and each tile of BLOCK_J outputs, and two exponentials a channel (in fp32 one an element).
    """
    tiles = tl.cdiv(outputs, BLOCK_J)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    row_inside, output_inside = row < rows, output < outputs
    centre, narrow = centres(grid, inverse, GRIDS, PADDED)
    total = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        normed = normed_tile(x, mean, rstd, row, row_inside, channel, channels, x_row)
        u = affine(normed, ln_weight, ln_bias, channel, channels)
        phi = basis(u, centre, narrow, inverse, weight.dtype.element_ty != tl.float32)
        phi = tl.reshape(phi, [BLOCK_N, BLOCK_C * PADDED]).to(weight.dtype.element_ty)
        column, exists = weight_columns(first, channels, GRIDS, PADDED, BLOCK_C)
        place = weight + output[None, :] * weight_row + column[:, None]
        w = tl.load(place, mask=exists[:, None] & output_inside[None, :], other=0.0)
        total = dot_in_parts(phi, w, total)
    mask = row_inside[:, None] & output_inside[None, :]
    tl.store(y + row[:, None] * outputs + output[None, :], total.to(y.dtype.element_ty), mask=mask)
