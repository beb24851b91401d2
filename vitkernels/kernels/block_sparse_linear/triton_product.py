"""The products of block_sparse_linear in Triton: block lines that share their input, in lists of what they store.

A line is a block row (or a block column, for the product with the transpose), a place its position in the line. A
program makes the results of a group of lines: it walks the places at which any of them stores a block, loads the
input of a place once and multiplies it with each block stored there. Small blocks would otherwise read their input
from the second-level cache again for every line, which is slower than the dense product from a quarter of the
blocks on. Both directions read the same values; only the list and two strides differ.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import dot_in_parts


@jit(
    do_not_specialize=["lines", "across", "steps"],
    do_not_specialize_on_alignment=["pointers", "stored_places", "stored_blocks"],
)
def group_places(
    counts, places, blocks, pointers, stored_places, stored_blocks, lines, across, steps, GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """For a group of lines, the places at which any of them stores a block, ascending: counts [groups], places
    [groups, across], and each line's block there, or -1: blocks [groups, across, GROUP].

    stored_blocks gives the number of the block behind a pointer; without it that is the pointer itself. `steps`
    halvings must suffice to find a place in a line.
    """
    group = tl.program_id(0)
    begin = group.to(tl.int64) * across
    total = 0
    for first in range(0, across, CHUNK):
        place = first + tl.arange(0, CHUNK)
        used = tl.zeros([CHUNK], tl.int32)
        found = ()
        for member in tl.static_range(GROUP):
            line = group * GROUP + member
            start = tl.load(pointers + line, mask=line < lines, other=0)
            end = tl.load(pointers + line + 1, mask=line < lines, other=0)
            low = tl.zeros([CHUNK], tl.int32) + start
            high = tl.zeros([CHUNK], tl.int32) + end
            for _ in range(0, steps):
                halving = low < high
                middle = (low + high) // 2
                before = tl.load(stored_places + middle, mask=halving, other=0) < place
                low = tl.where(halving & before, middle + 1, low)
                high = tl.where(halving & (before == 0), middle, high)
            hit = tl.load(stored_places + low, mask=low < end, other=-1) == place
            block = low
            if stored_blocks is not None:
                block = tl.load(stored_blocks + low, mask=hit, other=0)
            found += (tl.where(hit, block, -1),)  # type: ignore[assignment]
            used |= hit.to(tl.int32)
        entry = begin + total + tl.cumsum(used, 0) - used
        tl.store(places + entry, place, mask=used > 0)
        for member in tl.static_range(GROUP):
            tl.store(blocks + entry * GROUP + member, found[member], mask=used > 0)
        total += tl.sum(used, 0)
    tl.store(counts + group, total)


@jit
def replaced(values, PLACE: tl.constexpr, value):
    """The tuple with another value at one place."""
    return values[:PLACE] + (value,) + values[PLACE + 1 :]  # noqa: RUF005 (Triton knows no stars)


@jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)  # keeps NaN, as PyTorch does
    return value


@jit(do_not_specialize=["tokens", "groups", "across"])
def product(
    y, before, x, values, bias, counts, places, blocks, tokens, groups, given, taken, across, x_row,
    ACTIVATION: tl.constexpr, GIVEN: tl.constexpr, TAKEN: tl.constexpr, GIVEN_STRIDE: tl.constexpr,
    TAKEN_STRIDE: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activation(x W^T + bias) for a tile of tokens and a group of lines, or a PART of a single line.

    A block is [GIVEN, TAKEN] by its two strides. Floor: 2 * tokens * stored elements FLOPs at the matrix rate, x and
    y once from and to memory.
    """
    slices: tl.constexpr = GIVEN // PART
    steps: tl.constexpr = TAKEN // DEPTH
    part = tl.program_id(0) % (groups * slices)
    group, first = part // slices, part % slices * PART
    row = (tl.program_id(0) // (groups * slices)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < tokens
    lane, depth = tl.arange(0, PART), tl.arange(0, DEPTH)
    begin = group.to(tl.int64) * across
    total = (tl.zeros([BLOCK_N, PART], tl.float32),) * GROUP
    # Named stages: dots under a condition alone would not make Triton pipeline a loop.
    for step in tl.range(0, tl.load(counts + group) * steps, num_stages=STAGES):
        entry, inner = begin + step // steps, step % steps * DEPTH + depth
        feature = tl.load(places + entry) * TAKEN + inner
        exists = feature < taken
        place = x + row[:, None] * x_row + feature[None, :]
        tile = tl.load(place, mask=row_inside[:, None] & exists[None, :], other=0.0)
        for member in tl.static_range(GROUP):
            block = tl.load(blocks + entry * GROUP + member)
            place = inner[:, None] * TAKEN_STRIDE + (first + lane)[None, :] * GIVEN_STRIDE
            place = values + block.to(tl.int64) * (GIVEN * TAKEN) + place
            # Beyond the matrix values may hold anything, NaN too.
            w = tl.load(place, mask=(exists & (block >= 0))[:, None], other=0.0)
            if GROUP == 1:  # noqa: SIM114 (known when compiling, which leaves the dot in the loop itself)
                total = replaced(total, member, dot_in_parts(tile, w, total[member]))
            elif block >= 0:
                total = replaced(total, member, dot_in_parts(tile, w, total[member]))
    for member in tl.static_range(GROUP):
        feature = (group * GROUP + member) * GIVEN + first + lane
        inside = feature < given
        result = total[member]
        if bias is not None:
            result += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
        place, mask = row[:, None] * given + feature[None, :], row_inside[:, None] & inside[None, :]
        if before is not None:
            tl.store(before + place, result.to(y.dtype.element_ty), mask=mask)
        tl.store(y + place, activate(result, ACTIVATION).to(y.dtype.element_ty), mask=mask)
