"""The mask of learnable token merging in Triton: what divides it, its tiles as they multiply, and its gradient.

A mask is normalised along lines: its columns for "sum" and "softmax", its rows for "softmax_rows". What belongs to a
line is found once, by `line_divisors`; every tile is then normalised as it is loaded. For exponentials that is the
logarithm of their sum, a shift; its rounding, of a number as large as the logits, is in every weight, which in half
precision drowns in theirs. In float32 it would not: there a line has a maximum, the shift, and a sum. Backward, the
chain through the normalisation is linear in the gradient of the normalised mask, so that of a shared mask is summed
over the batch first and goes through it once (`close_gradient`).
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, place_of, softmax_start


@jit
def load_lines(g, lines, places, line_valid, place_valid, line_stride, place_stride, NORMALIZE: tl.constexpr):
    """Raw elements [lines, places] in fp32, outside the mask such that nothing is added to a sum along the line."""
    mask = line_valid[:, None] & place_valid[None, :]
    nothing: tl.constexpr = 0.0 if NORMALIZE == "none" or NORMALIZE == "sum" else -INF
    return tl.load(g + place_of(lines, line_stride, places, place_stride), mask=mask, other=nothing).to(
        tl.float32
    )


@jit
def load_norm(norms, lines, valid, otherwise: tl.constexpr):
    """A number of each line; `otherwise` where there are none."""
    if norms is None:
        return tl.full(lines.shape, otherwise, tl.float32)
    else:
        return tl.load(norms + lines, mask=valid, other=otherwise)


@jit
def normalized(raw, shift, divisor, NORMALIZE: tl.constexpr):
    """raw as it multiplies; shift and divisor have a value for every line, in raw's shape or to be broadcast to it."""
    if NORMALIZE == "none":
        return raw
    elif NORMALIZE == "sum":
        return raw / divisor
    else:
        return tl.exp2((raw - shift) * LOG2E) / divisor


@jit(do_not_specialize=["line_count", "place_count"])
def line_divisors(
    divisors, maxima, sums, g, g_b, g_line, g_place, line_count, place_count, NORMALIZE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """divisors [masks, lines]: sums of lines, an exact 0 counting as 1, or logarithms of sums of exponentials; maxima
    and sums of the latter, where they are wanted. Each may be None.

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
            # Not softmax_step: logits of a few hundred lose digits on the way to base 2, their differences do not.
            higher = tl.maximum(maximum, tl.max(raw, 1))
            shift = tl.where(higher == -INF, 0.0, higher)  # so far, nothing but -inf
            weights = tl.exp2((raw - shift[:, None]) * LOG2E)
            total = total * tl.exp2((maximum - shift) * LOG2E) + tl.sum(weights, 1)
            maximum = higher
        result = maximum + tl.log(total)
        if maxima is not None:
            tl.store(maxima + image * line_count + lines, maximum, mask=line_valid)
        if sums is not None:
            tl.store(sums + image * line_count + lines, total, mask=line_valid)
    if divisors is not None:
        tl.store(divisors + image * line_count + lines, result, mask=line_valid)


@jit
def line_sums(
    g, lines, line_valid, g_line, g_place, place_count, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """In one order wherever it is called, so that a sum of exactly 0 is one both times."""
    total = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        total += load_lines(g, lines, places, line_valid, places < place_count, g_line, g_place, "sum")
    return tl.sum(total, 1)


@jit(do_not_specialize=["line_count", "place_count"])
def close_gradient(
    grad_g, partial, shifts, divisors, g, grad_b, grad_line, grad_place, partial_line, partial_place, g_b, g_line,
    g_place, line_count, place_count, NORMALIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
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
    shift = load_norm(shifts, image * line_count + lines, line_valid, 0.0)[:, None]
    divisor = load_norm(divisors, image * line_count + lines, line_valid, 1.0)[:, None]
    taken_off = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        place_valid = places < place_count
        raw = load_lines(g, lines, places, line_valid, place_valid, g_line, g_place, NORMALIZE)
        offsets = place_of(lines, partial_line, places, partial_place)
        mask = line_valid[:, None] & place_valid[None, :]
        gradient = tl.load(partial + offsets, mask=mask, other=0.0)
        taken_off += normalized(raw, shift, divisor, NORMALIZE) * gradient
    mean = tl.sum(taken_off, 1)
    if NORMALIZE == "sum":  # a sum of 0 is a constant 1
        sums = line_sums(g, lines, line_valid, g_line, g_place, place_count, BLOCK_L, BLOCK_K)
        mean = tl.where(sums == 0, 0.0, mean)
    for first in range(0, place_count, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        place_valid = places < place_count
        offsets = place_of(lines, partial_line, places, partial_place)
        mask = line_valid[:, None] & place_valid[None, :]
        gradient = tl.load(partial + offsets, mask=mask, other=0.0) - mean[:, None]
        if NORMALIZE == "sum":
            gradient = gradient / divisor
        else:
            raw = load_lines(g, lines, places, line_valid, place_valid, g_line, g_place, NORMALIZE)
            gradient *= normalized(raw, shift, divisor, NORMALIZE)
        place = grad_g + image * grad_b + place_of(lines, grad_line, places, grad_place)
        tl.store(place, gradient.to(grad_g.dtype.element_ty), mask=mask)
