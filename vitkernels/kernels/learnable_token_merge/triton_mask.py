"""The mask of learnable token merging in Triton: what divides it, its tiles as they multiply, and its gradient.

A mask is normalised along lines: its columns for "sum" and "softmax", its rows for "softmax_rows". What a line divides
by (the logarithm of it, for exponentials) is found once, by `line_divisors`; every tile is then normalised as it is
loaded. Backward, the chain through the normalisation is linear in the gradient of the normalised mask, so that of a
shared mask is summed over the batch first and goes through it once (`close_gradient`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitkernels.core.triton_tiles import INF, LOG2E, natural_lse, softmax_start, softmax_step


@triton.jit
def load_lines(g, lines, places, line_valid, place_valid, line_stride, place_stride, NORMALIZE: tl.constexpr):
    """Raw elements [lines, places] in fp32, outside the mask such that nothing is added to a sum along the line."""
    offsets = lines.to(tl.int64)[:, None] * line_stride + places.to(tl.int64)[None, :] * place_stride
    mask = line_valid[:, None] & place_valid[None, :]
    nothing: tl.constexpr = 0.0 if NORMALIZE == "none" or NORMALIZE == "sum" else -INF
    return tl.load(g + offsets, mask=mask, other=nothing).to(tl.float32)


@triton.jit
def normalized(raw, divisor, NORMALIZE: tl.constexpr):
    """raw as it multiplies; the divisor has a value for every line, in raw's shape or to be broadcast to it."""
    if NORMALIZE == "none":
        return raw
    elif NORMALIZE == "sum":
        return raw / divisor
    else:
        return tl.exp2((raw - divisor) * LOG2E)


@triton.jit(do_not_specialize=["line_count", "place_count"])
def line_divisors(
    divisors, g, g_b, g_line, g_place, line_count, place_count, NORMALIZE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """divisors [masks, lines]: sums of lines, an exact 0 counting as 1, or logarithms of sums of exponentials.

    Floor: the mask read once.
    """
    tiles = tl.cdiv(line_count, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    lines = (program % tiles).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
    line_valid = lines < line_count
    g += image * g_b
    if NORMALIZE == "sum":
        result = line_sums(g, lines, line_valid, g_line, g_place, place_count, BLOCK_L, BLOCK_K)
        result = tl.where(result == 0, 1.0, result)
    else:
        maximum, total = softmax_start(BLOCK_L)
        for first in range(0, place_count, BLOCK_K):
            places = first + tl.arange(0, BLOCK_K)
            raw = load_lines(g, lines, places, line_valid, places < place_count, g_line, g_place, NORMALIZE)
            _, _, maximum, total = softmax_step(raw * LOG2E, maximum, total)
        result = natural_lse(maximum, total)
    tl.store(divisors + image * line_count + lines, result, mask=line_valid)


@triton.jit
def line_sums(
    g, lines, line_valid, g_line, g_place, place_count, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """In one order wherever it is called, so that a sum of exactly 0 is one both times."""
    total = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        total += load_lines(g, lines, places, line_valid, places < place_count, g_line, g_place, "sum")
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["line_count", "place_count"])
def close_gradient(
    grad_g, partial, divisors, g, grad_b, grad_line, grad_place, partial_line, partial_place, g_b, g_line, g_place,
    line_count, place_count, NORMALIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_g: the gradient of the normalised mask, in partial [masks, N, P], through the normalisation.

    Its mean along a line, weighed by the mask, is taken off; the mask is divided or multiplied. Floor: mask and
    partial read, grad_g written (the second reading of a line comes from the cache).
    """
    tiles = tl.cdiv(line_count, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    lines = (program % tiles).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
    line_valid = lines < line_count
    g += image * g_b
    partial += image * line_count * place_count
    divisor = tl.load(divisors + image * line_count + lines, mask=line_valid, other=1.0)[:, None]
    taken_off = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        place_valid = places < place_count
        raw = load_lines(g, lines, places, line_valid, place_valid, g_line, g_place, NORMALIZE)
        offsets = lines.to(tl.int64)[:, None] * partial_line + places.to(tl.int64)[None, :] * partial_place
        mask = line_valid[:, None] & place_valid[None, :]
        gradient = tl.load(partial + offsets, mask=mask, other=0.0)
        taken_off += normalized(raw, divisor, NORMALIZE) * gradient
    mean = tl.sum(taken_off, 1)
    if NORMALIZE == "sum":  # a sum of 0 is a constant 1
        sums = line_sums(g, lines, line_valid, g_line, g_place, place_count, BLOCK_L, BLOCK_K)
        mean = tl.where(sums == 0, 0.0, mean)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        place_valid = places < place_count
        offsets = lines.to(tl.int64)[:, None] * partial_line + places.to(tl.int64)[None, :] * partial_place
        mask = line_valid[:, None] & place_valid[None, :]
        gradient = tl.load(partial + offsets, mask=mask, other=0.0) - mean[:, None]
        if NORMALIZE == "sum":
            gradient = gradient / divisor
        else:
            raw = load_lines(g, lines, places, line_valid, place_valid, g_line, g_place, NORMALIZE)
            gradient *= normalized(raw, divisor, NORMALIZE)
        place = grad_g + image * grad_b
        place += lines.to(tl.int64)[:, None] * grad_line + places.to(tl.int64)[None, :] * grad_place
        tl.store(place, gradient.to(grad_g.dtype.element_ty), mask=mask)
