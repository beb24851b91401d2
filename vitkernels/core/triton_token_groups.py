"""Sums over the groups of a merge plan and their transpose, in Triton: what merging and unmerging tokens share.

Both directions gather. Forward a program owns rows of the merged sequence and walks through their members in rising
order, in fp32; backward it owns tokens, each of which reads the row of its group. The largest of a group shares its
gradient among all that reach it, which takes a look at the whole group: there a program owns groups both times. Each
token is in one group, so nothing is written twice and nothing is added atomically.

Groups are mostly of one token. Rows of a program walk together, so that a long group costs its own length, while loads
beyond the end of a shorter one are not issued. Floor: every token and every row once from or to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, device_of, place_of

# Elements of a tile: 16 a thread. Sequence lengths are not specialised, since every layer has another one.
ELEMENTS = 2048


@jit
def group_ends(starts, rows, row_valid):
    first = tl.load(starts + rows, mask=row_valid, other=0)
    return first, tl.load(starts + rows + 1, mask=row_valid, other=0) - first


@jit
def wide_quotient(value, divisor):
    """value / divisor, correctly rounded: the mean of equal numbers is that number."""
    return tl.div_rn(value, tl.broadcast_to(divisor, value.shape))


@jit(do_not_specialize=["size_b", "tokens", "row_count"])
def reduce_groups(
    y, sizes, x, size, starts, members, y_b, y_g, y_c, x_b, x_t, x_c, size_b, size_t, tokens, row_count, channels,
    MODE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y: each row's members by MODE; sizes [batch, rows], or None: the sum of their sizes (ones for None)."""
    slices = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(row_count, BLOCK_G)
    program = tl.program_id(0).to(tl.int64)
    image = program // slices // tiles
    part = (program % slices).to(tl.int32)
    rows = (program // slices % tiles).to(tl.int32) * BLOCK_G + tl.arange(0, BLOCK_G)
    row_valid = rows < row_count
    columns = part * BLOCK_C + tl.arange(0, BLOCK_C)
    column_valid = columns < channels
    first, count = group_ends(starts + image * (row_count + 1), rows, row_valid)
    members += image * tokens
    x += image * x_b
    nothing: tl.constexpr = -INF if MODE == "amax" else 0.0
    result = tl.full([BLOCK_G, BLOCK_C], nothing, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for i in range(0, tl.max(count, 0)):
        inside = i < count
        member = tl.load(members + first + i, mask=inside, other=0)
        mask = inside[:, None] & column_valid[None, :]
        value = tl.load(x + place_of(member, x_t, columns, x_c), mask=mask, other=nothing).to(tl.float32)
        weight = tl.where(inside, 1.0, 0.0)
        if size is not None:
            weight = tl.load(size + image * size_b + member.to(tl.int64) * size_t, mask=inside, other=0.0)
        total += weight
        if MODE == "amax":
            result = tl.maximum(result, value, propagate_nan=tl.PropagateNan.ALL)
        elif MODE == "wavg" and size is not None:
            result += value * weight[:, None]
        else:
            result += value
    if MODE == "wavg":
        result = wide_quotient(result, tl.where(row_valid, total, 1.0)[:, None])
    if MODE == "mean":
        result = wide_quotient(result, tl.where(row_valid, count, 1).to(tl.float32)[:, None])
    place = y + image * y_b + place_of(rows, y_g, columns, y_c)
    tl.store(place, result.to(y.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
    if sizes is not None:
        tl.store(sizes + image * row_count + rows, total, mask=row_valid & (part == 0))


@jit(do_not_specialize=["size_b", "tokens", "row_count"])
def spread_groups(
    x, y, size, sizes, rows, starts, x_b, x_t, x_c, y_b, y_g, y_c, size_b, size_t, tokens, row_count, channels,
    MODE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: for each token its row of y, times what it weighs there: size / sizes ("wavg"), 1 ("sum") or 1 / count."""
    slices = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(tokens, BLOCK_G)
    program = tl.program_id(0).to(tl.int64)
    image = program // slices // tiles
    token = (program // slices % tiles).to(tl.int32) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = token < tokens
    columns = (program % slices).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None] & (columns < channels)[None, :]
    row = tl.load(rows + image * tokens + token, mask=valid, other=0)
    value = tl.load(y + image * y_b + place_of(row, y_g, columns, y_c), mask=mask, other=0.0)
    if MODE == "wavg":
        value = value.to(tl.float32)
        if size is not None:
            place = size + image * size_b + token.to(tl.int64) * size_t
            value *= tl.load(place, mask=valid, other=0.0)[:, None]
        total = tl.load(sizes + image * row_count + row, mask=valid, other=1.0)
        value = wide_quotient(value, total[:, None])
    if MODE == "mean":
        _, count = group_ends(starts + image * (row_count + 1), row, valid)
        count = tl.where(valid, count, 1)
        value = wide_quotient(value.to(tl.float32), count.to(tl.float32)[:, None])
    place = x + image * x_b + place_of(token, x_t, columns, x_c)
    tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["tokens", "row_count"])
def share_among_largest(
    grad_x, grad_y, y, x, starts, members, gx_b, gx_t, gx_c, gy_b, gy_g, gy_c, x_b, x_t, x_c, tokens, row_count,
    channels, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x: grad_y, in equal parts to the members that are y, [batch, rows, channels] contiguous; else zero."""
    slices = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(row_count, BLOCK_G)
    program = tl.program_id(0).to(tl.int64)
    image = program // slices // tiles
    rows = (program // slices % tiles).to(tl.int32) * BLOCK_G + tl.arange(0, BLOCK_G)
    row_valid = rows < row_count
    columns = (program % slices).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_valid = columns < channels
    first, count = group_ends(starts + image * (row_count + 1), rows, row_valid)
    members += image * tokens
    x += image * x_b
    grad_x += image * gx_b
    mask = row_valid[:, None] & column_valid[None, :]
    place = y + (image * row_count + rows)[:, None] * channels + columns[None, :]
    largest = tl.load(place, mask=mask, other=0.0)
    gradient = tl.load(grad_y + image * gy_b + place_of(rows, gy_g, columns, gy_c), mask=mask, other=0.0)
    longest = tl.max(count, 0)
    reached = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for i in range(0, longest):
        inside = i < count
        member = tl.load(members + first + i, mask=inside, other=0)
        mask = inside[:, None] & column_valid[None, :]
        value = tl.load(x + place_of(member, x_t, columns, x_c), mask=mask, other=-INF)
        reached += tl.where(mask & (value == largest), 1.0, 0.0)
    share = wide_quotient(gradient.to(tl.float32), tl.maximum(reached, 1.0))
    for i in range(0, longest):
        inside = i < count
        member = tl.load(members + first + i, mask=inside, other=0)
        mask = inside[:, None] & column_valid[None, :]
        value = tl.load(x + place_of(member, x_t, columns, x_c), mask=mask, other=-INF)
        part = tl.where(value == largest, share, 0.0)
        place = grad_x + place_of(member, gx_t, columns, gx_c)
        tl.store(place, part.to(grad_x.dtype.element_ty), mask=mask)


def _tile(channels: int, rows: int) -> dict[str, int]:
    least_padding = min((256, 128, 64), key=lambda block: triton.cdiv(channels, block) * block)
    block_c = min(least_padding, triton.next_power_of_2(channels))
    block_g = min(64, ELEMENTS // block_c, triton.next_power_of_2(rows))
    return {"BLOCK_G": block_g, "BLOCK_C": block_c, "num_warps": 4}


def _programs(batch: int, channels: int, rows: int, tile: dict[str, int]) -> tuple[int]:
    return (batch * triton.cdiv(rows, tile["BLOCK_G"]) * triton.cdiv(channels, tile["BLOCK_C"]),)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def reduced(
    y: Tensor,
    sizes: Tensor | None,
    x: Tensor,
    size: Tensor | None,
    starts: Tensor,
    members: Tensor,
    mode: str,
) -> None:
    """Fills y [batch, t', C] from x [batch, t, C], any strides, and sizes unless it is None."""
    starts, members = starts.contiguous(), members.contiguous()
    batch, tokens, channels = x.shape
    tile = _tile(channels, y.shape[1])
    with device_of(x):
        reduce_groups[_programs(batch, channels, y.shape[1], tile)](
            y, sizes, x, size, starts, members, *y.stride(), *x.stride(), *_strides(size), tokens, y.shape[1], channels,
            MODE=mode, **tile,
        )  # fmt: skip


def spread(
    x: Tensor, y: Tensor, size: Tensor | None, sizes: Tensor | None, rows: Tensor, starts: Tensor, mode: str
) -> None:
    """Fills x [batch, t, C] from y [batch, t', C], any strides; the transpose of `reduced`, whose sizes it reads."""
    rows, starts = rows.contiguous(), starts.contiguous()
    batch, tokens, channels = x.shape
    tile = _tile(channels, tokens)
    with device_of(x):
        spread_groups[_programs(batch, channels, tokens, tile)](
            x, y, size, sizes, rows, starts, *x.stride(), *y.stride(), *_strides(size), tokens, y.shape[1], channels,
            MODE=mode, **tile,
        )  # fmt: skip


def shared_among_largest(
    grad_x: Tensor, grad_y: Tensor, y: Tensor, x: Tensor, starts: Tensor, members: Tensor
) -> None:
    """Fills grad_x, the gradient of `reduced` in mode "amax", whose result y is."""
    y, starts, members = y.contiguous(), starts.contiguous(), members.contiguous()
    batch, tokens, channels = x.shape
    tile = _tile(channels, y.shape[1])
    with device_of(x):
        share_among_largest[_programs(batch, channels, y.shape[1], tile)](
            grad_x, grad_y, y, x, starts, members, *grad_x.stride(), *grad_y.stride(), *x.stride(), tokens, y.shape[1],
            channels, **tile,
        )  # fmt: skip
