"""Attention within lines (rows, or columns) of the map with a decay along them, in Triton: the criss-cross sweeps.

A program owns LINES neighboring lines of up to BLOCK_M tokens, or a block of BLOCK_M tokens of one line; lines shorter
than a tile share it, and pairs of different lines are masked. Nobody adds to another's result.

Floor per map and head, N tokens of lines of L, element size s: a sweep reads q, k and its values and writes as many,
s N (2 d + 2 values); 2 N L (d + values) FLOPs and N L exponentials.

`size` holds (lines, length, groups of lines, blocks of a line), strides go (batch, line, position, head, channel) and
those of planes [batch, heads, height, width] (line, position): rows and columns differ in nothing else.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import (
    INF,
    LOG2E,
    dot,
    dot_in_parts,
    natural_lse,
    softmax_start,
    softmax_step,
)
from vitkernels.kernels.polyline_path_attention.triton_map import load_tokens, plane_offset, store_tokens


@jit
def line_place(size, heads, LINES: tl.constexpr):
    """(batch, head, first line, block) of a program; heads vary fastest, as they share cache lines."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program = program // heads
    block = program % size[3]
    program = program // size[3]
    return (program // size[2]).to(tl.int64), head, program % size[2] * LINES, block


@jit
def line_tokens(line, first, size, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """(line, position, whether there is a token) of the slots of a block of each of LINES lines."""
    slots = tl.arange(0, LINES * BLOCK)
    lines = line + slots // BLOCK
    positions = first + slots % BLOCK
    return lines, positions, (lines < size[0]) & (positions < size[1])


@jit
def line_cells(plane_s, lines, positions):
    return lines.to(tl.int64) * plane_s[0] + positions.to(tl.int64) * plane_s[1]


@jit
def met(lines, other_lines, other_positions, size, LINES: tl.constexpr):
    """Which pairs are of one line; other positions beyond the line's end are none."""
    there = (other_positions < size[1])[None, :]
    if LINES == 1:
        return there
    else:
        return there & (lines[:, None] == other_lines[None, :])


@jit
def line_mask(own, other, later):
    """What the decays add to base-2 logits: sums[later] - sums[earlier] by the order of positions."""
    return tl.where(later, LOG2E, -LOG2E) * (own[:, None] - other[None, :])


@jit
def forward_lines(
    out, second_out, lse, base, q, k, v, second_v, sums, out_s, so_s, base_s, q_s, k_s, v_s, sv_s, size, plane_s,
    heads, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out = A v, and unless they are None second_out = A second_v, and lse. With a base, out = (base + A v) / 2."""
    batch, head, line, block = line_place(size, heads, LINES)
    lines, positions, valid = line_tokens(line, block * BLOCK_M, size, LINES, BLOCK_M)
    plane = plane_offset(batch, heads, head, size)
    own = tl.load(sums + plane + line_cells(plane_s, lines, positions), mask=valid, other=0.0)
    query = load_tokens(q, q_s, batch, head, lines, positions, valid, BLOCK_D, HEAD_DIM)
    maximum, total = softmax_start(LINES * BLOCK_M)
    first = tl.zeros([LINES * BLOCK_M, BLOCK_V], tl.float32)
    second = tl.zeros([LINES * BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, size[1], BLOCK_N):
        key_lines, key_positions, key_valid = line_tokens(line, start, size, LINES, BLOCK_N)
        cells = line_cells(plane_s, key_lines, key_positions)
        other = tl.load(sums + plane + cells, mask=key_valid, other=0.0)
        key = load_tokens(k, k_s, batch, head, key_lines, key_positions, key_valid, BLOCK_D, HEAD_DIM)
        value = load_tokens(v, v_s, batch, head, key_lines, key_positions, key_valid, BLOCK_V, VALUE_DIM)
        later = positions[:, None] >= key_positions[None, :]
        logits = dot(query, tl.trans(key)) * (scale * LOG2E) + line_mask(own, other, later)
        logits = tl.where(met(lines, key_lines, key_positions, size, LINES), logits, -INF)
        weights, rescale, maximum, total = softmax_step(logits, maximum, total)
        weights = weights.to(value.dtype)
        first = dot_in_parts(weights, value, first * rescale[:, None])
        if second_v is not None:
            value = load_tokens(
                second_v, sv_s, batch, head, key_lines, key_positions, key_valid, BLOCK_V, VALUE_DIM
            )
            second = dot_in_parts(weights, value, second * rescale[:, None])
    first = first / total[:, None]
    if base is not None:
        added = load_tokens(base, base_s, batch, head, lines, positions, valid, BLOCK_V, VALUE_DIM)
        first = 0.5 * first + 0.5 * added.to(tl.float32)
    store_tokens(out, out_s, batch, head, lines, positions, valid, first, BLOCK_V, VALUE_DIM)
    if second_v is not None:
        second = second / total[:, None]
        store_tokens(second_out, so_s, batch, head, lines, positions, valid, second, BLOCK_V, VALUE_DIM)
    if lse is not None:
        cells = plane + line_cells(plane_s, lines, positions)
        tl.store(lse + cells, natural_lse(maximum, total), mask=valid)
