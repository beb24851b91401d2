"""From best scores and partners to a plan, in Triton: everything by counting.

The rank of an even token is the number of those that beat it, (best, number) being a total order; the place of a token
among the members is the number of tokens before it. So nothing is sorted or scanned, no result depends on another
program, and any number of tokens works the same way. Between the two steps stands one number per even token: of a
merged one its odd token, b, of a kept one -1 - its place in the ranking of the kept.

Floor of an image: 8 t bytes read, 12 t + 4 r written; 3/4 t^2 comparisons, which at t = 16384 take less time than the
scores, and at t = 197 are a few instructions of each thread.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF


@jit
def rank_evens(src, dst, best, partner, first, evens, merged, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """src and dst of those of a tile of even tokens that merge; partner becomes the number that says which do."""
    a = first + tl.arange(0, BLOCK)
    valid = a < evens
    own = tl.load(best + a, mask=valid, other=-INF)
    beaten = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in range(0, evens, CHUNK):
        other = start + tl.arange(0, CHUNK)
        score = tl.load(best + other, mask=other < evens, other=-INF)[None, :]
        before = other[None, :] < a[:, None]
        beaten += ((score > own[:, None]) | ((score == own[:, None]) & before)).to(tl.int32)
    rank = tl.sum(beaten, 1)
    chosen = tl.load(partner + a, mask=valid, other=0)
    merges = valid & (rank < merged)
    tl.store(src + rank, 2 * a, mask=merges)
    tl.store(dst + rank, 2 * chosen + 1, mask=merges)
    tl.store(partner + a, tl.where(merges, chosen, merged - 1 - rank), mask=valid)


@jit
def place_tokens(
    rows, starts, members, target, first, tokens, merged, CLASS_TOKEN: tl.constexpr, DISTILL_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """rows and members of a tile of tokens, and starts of the rows that the tile's kept and odd tokens are in."""
    evens = (tokens + 1) // 2
    kept = evens - merged
    token = first + tl.arange(0, BLOCK)
    valid = token < tokens
    half = token // 2
    odd = token % 2 == 1
    group = tl.where(odd, half, tl.load(target + half, mask=valid & (token % 2 == 0), other=0))
    alone = group < 0
    # Merged tokens in the rows of earlier odd tokens (for a kept token: before it), and before it in its own row.
    lower = tl.zeros([BLOCK, CHUNK], tl.int32)
    fellows = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in range(0, evens, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(target + other, mask=other < evens, other=-1)[None, :]
        before = (2 * other)[None, :] < token[:, None]
        counted = (theirs < group[:, None]) | (alone[:, None] & before)
        lower += ((theirs >= 0) & counted).to(tl.int32)
        fellows += ((theirs == group[:, None]) & before).to(tl.int32)
    lower_count = tl.sum(lower, 1)
    place = half - lower_count if CLASS_TOKEN else -1 - group
    row = tl.where(alone, place, kept + group)
    start = tl.where(alone, place, kept + group + lower_count)
    if DISTILL_TOKEN:  # the first odd token, into which nothing merges, comes second
        second = (group == 0) | (alone & (place > 0))
        row = tl.where(second, tl.where(alone, place + 1, 1), row)
        start = tl.where(second, row, start)
    # A row's odd token, 2 group + 1, is one of its members.
    position = start + tl.sum(fellows, 1) + ((alone == 0) & (token > 2 * group + 1)).to(tl.int32)
    position = tl.where(alone, start, position)
    tl.store(rows + token, row, mask=valid)
    tl.store(members + position, token, mask=valid)
    tl.store(starts + row, start, mask=valid & (alone | odd))
    if first == 0:
        tl.store(starts + tokens - merged, tokens)


@jit(do_not_specialize=["tokens", "merged", "programs"])
def arrange(
    rows, starts, members, src, dst, best, partner, tokens, merged, programs, CLASS_TOKEN: tl.constexpr,
    DISTILL_TOKEN: tl.constexpr, RANK: tl.constexpr, PLACE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Ranks, places, or does both where an image has one program; else every program takes each `programs`-th tile."""
    evens = (tokens + 1) // 2
    image = tl.program_id(0).to(tl.int64) // programs
    tile = (tl.program_id(0) % programs) * BLOCK
    partner += image * evens
    if RANK:
        for first in range(tile, evens, programs * BLOCK):
            rank_evens(
                src + image * merged, dst + image * merged, best + image * evens, partner, first, evens, merged,
                BLOCK, CHUNK,
            )  # fmt: skip
    if RANK and PLACE:
        tl.debug_barrier()  # its threads see what they wrote to `partner`
    if PLACE:
        for first in range(tile, tokens, programs * BLOCK):
            place_tokens(
                rows + image * tokens, starts + image * (tokens - merged + 1), members + image * tokens, partner,
                first, tokens, merged, CLASS_TOKEN, DISTILL_TOKEN, BLOCK, CHUNK,
            )  # fmt: skip
