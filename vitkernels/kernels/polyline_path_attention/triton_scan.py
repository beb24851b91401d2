"""Sums of decays along rows and columns, and the gradients of decays from those of the sums, in Triton.

Both walk over lines (rows, or columns) in steps of BLOCK positions, a few lines a program, and carry what came before.
Floor: bytes. Decays are read and sums written once; gradients of sums are read once a part and written once.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit


@jit
def line_place(size, heads, LINES: tl.constexpr):
    """(batch, head, lines, their mask) of a program; size holds (lines, length, groups of lines)."""
    program = tl.program_id(0)
    group = program % size[2]
    head = (program // size[2] % heads).to(tl.int64)
    batch = (program // size[2] // heads).to(tl.int64)
    lines = group * LINES + tl.arange(0, LINES)
    return batch, head, lines, lines < size[0]


@jit
def sum_decays(
    sums, log_decay, plane_s, decay_s, size, heads, LINES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Inclusive sums [batch, heads, height, width] along lines; decay_s goes (batch, line, position, head).

    In float64, rounded once: the masks are differences of these sums. A line's first decay is in none, and is not
    read: it may be anything.
    """
    batch, head, lines, line_valid = line_place(size, heads, LINES)
    source = log_decay + batch * decay_s[0] + head * decay_s[3] + (lines.to(tl.int64) * decay_s[1])[:, None]
    target = sums + (batch * heads + head) * size[0] * size[1] + (lines.to(tl.int64) * plane_s[0])[:, None]
    carry = tl.zeros([LINES], tl.float64)
    for first in range(0, size[1], BLOCK):
        positions = first + tl.arange(0, BLOCK)
        inside = line_valid[:, None] & (positions < size[1])[None, :]
        place = positions.to(tl.int64)[None, :]
        inner = inside & (positions > 0)[None, :]
        tile = tl.load(source + place * decay_s[2], mask=inner, other=0.0).to(tl.float64)
        tl.store(
            target + place * plane_s[1], (tl.cumsum(tile, 1) + carry[:, None]).to(tl.float32), mask=inside
        )
        carry += tl.sum(tile, 1)


@jit(do_not_specialize=["pair"])
def decay_gradient(
    grad, parts, plane_s, grad_s, size, heads, pair, count, LINES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums from each position to the end of its line of the `count` parts, `pair` elements apart, in fixed order.

    A line's first position belongs to no step between tokens: 0.
    """
    batch, head, lines, line_valid = line_place(size, heads, LINES)
    source = parts + (batch * heads + head) * size[0] * size[1] + (lines.to(tl.int64) * plane_s[0])[:, None]
    target = grad + batch * grad_s[0] + head * grad_s[3] + (lines.to(tl.int64) * grad_s[1])[:, None]
    carry = tl.zeros([LINES], tl.float64)
    for first in range(0, size[1], BLOCK):
        positions = size[1] - 1 - first - tl.arange(0, BLOCK)
        inside = line_valid[:, None] & (positions >= 0)[None, :]
        place = positions.to(tl.int64)[None, :]
        tile = tl.zeros([LINES, BLOCK], tl.float64)
        for part in range(0, count):
            of_part = tl.cast(part, tl.int64) * pair
            tile += tl.load(source + of_part + place * plane_s[1], mask=inside, other=0.0)
        result = tl.where((positions > 0)[None, :], tl.cumsum(tile, 1) + carry[:, None], 0.0)
        tl.store(target + place * grad_s[2], result.to(grad.dtype.element_ty), mask=inside)
        carry += tl.sum(tile, 1)
