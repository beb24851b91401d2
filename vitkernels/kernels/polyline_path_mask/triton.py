"""Triton kernels of the polyline path mask, and their launchers.

Both directions work on tiles of keys [rows, columns] that belong to one owner, the query's row i (transposed: its
column k), and run along the owner's queries:

    M[(i,k),(j,c)]  = (column c from i to j) + (row i from k to c)     a part by i, a value in row i
    Mt[(i,k),(j,c)] = (row j from k to c) + (column k from i to j)     a part by k, a value in column k

Floor: (H W)^2 elements a head over the bandwidth, written forward, read backward. The sums of the decays, and the
sums over partial tables at the end, are smaller by a factor of the grid's side and left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.core.polyline import cumulative
from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import device_of

TILE = 1024  # keys of a program


@jit
def _between(at_p, p, at_q, q):
    """The decays between positions p and q of a line, by the order of the positions."""
    return tl.where(p >= q, at_p - at_q, at_q - at_p)


@jit
def _keys(along, down, owner, j, c, HEIGHT, WIDTH, TRANSPOSE: tl.constexpr):
    """Of a tile of keys: the part of the mask that the owner's queries share, and the value each differs from."""
    inside = (j < HEIGHT) & (c < WIDTH)
    tokens = j * WIDTH + c
    if TRANSPOSE:
        at = tl.load(along + j * WIDTH + owner, mask=j < HEIGHT, other=0.0)
        part = _between(at, owner, tl.load(along + tokens, mask=inside, other=0.0), c)
        value = tl.load(down + j * WIDTH + owner, mask=j < HEIGHT, other=0.0)
    else:
        at = tl.load(down + owner * WIDTH + c, mask=c < WIDTH, other=0.0)
        part = _between(at, owner, tl.load(down + tokens, mask=inside, other=0.0), j)
        value = tl.load(along + owner * WIDTH + c, mask=c < WIDTH, other=0.0)
    return part, value, tokens, inside


@jit
def _query(along, down, owner, step, WIDTH, TRANSPOSE: tl.constexpr):
    """The value and the token number of the owner's query at a step."""
    if TRANSPOSE:
        token = step * WIDTH + owner
        return tl.load(down + token), token
    else:
        token = owner * WIDTH + step
        return tl.load(along + token), token


@jit(do_not_specialize=["planes"])
def forward_mask(
    mask, sums, planes, HEIGHT, WIDTH, row_tiles, column_tiles, LOG: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    tokens_all = HEIGHT * WIDTH
    owners = WIDTH if TRANSPOSE else HEIGHT
    steps = HEIGHT if TRANSPOSE else WIDTH
    program = tl.program_id(0)
    tile = program % (row_tiles * column_tiles)
    item = program // (row_tiles * column_tiles)
    owner = item % owners
    plane = (item // owners).to(tl.int64)
    along = sums + plane * tokens_all
    down = sums + (planes + plane) * tokens_all
    j = (tile // column_tiles * BLOCK_J + tl.arange(0, BLOCK_J))[:, None]
    c = (tile % column_tiles * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    part, value, tokens, inside = _keys(along, down, owner, j, c, HEIGHT, WIDTH, TRANSPOSE)
    position = j if TRANSPOSE else c
    base = mask + plane * tokens_all * tokens_all
    for step in range(0, steps):
        at, token = _query(along, down, owner, step, WIDTH, TRANSPOSE)
        out = part + _between(at, step, value, position)
        if not LOG:
            out = tl.exp(out)
        row = base + tl.cast(token, tl.int64) * tokens_all
        tl.store(row + tokens, out.to(mask.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["planes"])
def backward_mask(
    own, shared, grad, sums, planes, heads, grad_b, grad_head, grad_row, HEIGHT, WIDTH, row_tiles, column_tiles,
    LOG: tl.constexpr, TRANSPOSE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """own [items, tiles, steps, steps]: the gradients of the pairs of a query and a place on the owner's line.
    shared [items, tokens]: those of the owner and a key, over all queries."""
    tokens_all = HEIGHT * WIDTH
    owners = WIDTH if TRANSPOSE else HEIGHT
    steps = HEIGHT if TRANSPOSE else WIDTH
    program = tl.program_id(0)
    tile = program % (row_tiles * column_tiles)
    item = (program // (row_tiles * column_tiles)).to(tl.int64)
    owner = (item % owners).to(tl.int32)
    plane = item // owners
    along = sums + plane * tokens_all
    down = sums + (planes + plane) * tokens_all
    j = (tile // column_tiles * BLOCK_J + tl.arange(0, BLOCK_J))[:, None]
    c = (tile % column_tiles * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    part, value, tokens, inside = _keys(along, down, owner, j, c, HEIGHT, WIDTH, TRANSPOSE)
    position = j if TRANSPOSE else c
    base = grad + plane // heads * grad_b + plane % heads * grad_head
    if TRANSPOSE:
        table = own + (item * column_tiles + tile % column_tiles) * steps * steps
        places = tile // column_tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    else:
        table = own + (item * row_tiles + tile // column_tiles) * steps * steps
        places = tile % column_tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_J, BLOCK_L], tl.float32)
    for step in range(0, steps):
        at, token = _query(along, down, owner, step, WIDTH, TRANSPOSE)
        row = base + tl.cast(token, tl.int64) * grad_row
        g = tl.load(row + tokens, mask=inside, other=0.0).to(tl.float32)
        if not LOG:
            g = tl.where(inside, g * tl.exp(part + _between(at, step, value, position)), 0.0)
        total += g
        tl.store(table + step * steps + places, tl.sum(g, 1 if TRANSPOSE else 0), mask=places < steps)
    tl.store(shared + item * tokens_all + tokens, total, mask=inside)


@jit
def cross_lines(
    out, table, inners, places, outer_size, inner_step, place_step, chunks, chunk_size, out_size, out_inner,
    out_place, terms, term_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[place] of a line = what the decay before it receives from the pairs (end, place) of all `terms` ends: those
    that it lies between. table[end] holds the pairs, as the sum of `chunks`."""
    outer = (tl.program_id(0) // inners).to(tl.int64)
    inner = tl.program_id(0) % inners
    base = table + outer * outer_size + inner * inner_step
    place = tl.arange(0, BLOCK)
    received = tl.zeros([BLOCK], tl.float32)
    for end in range(0, terms):
        before = tl.zeros([BLOCK], tl.float32)  # of the pair (end, place - 1)
        here = tl.zeros([BLOCK], tl.float32)
        for chunk in range(0, chunks):
            pairs = base + tl.cast(end, tl.int64) * term_size + chunk * chunk_size
            before += tl.load(pairs + (place - 1) * place_step, mask=(place > 0) & (place <= end), other=0.0)
            here += tl.load(pairs + place * place_step, mask=(place > end) & (place < places), other=0.0)
        first, last = tl.cumsum(before, 0), tl.cumsum(here, 0, reverse=True)
        received += tl.where(place <= end, first, last)
    tl.store(
        out + outer * out_size + inner * out_inner + place * out_place,
        tl.where(place > 0, received, 0.0),
        mask=place < places,
    )


def tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of keys: whole rows, unless they are very long."""
    columns = min(triton.next_power_of_2(width), TILE)
    return max(1, min(TILE // columns, triton.next_power_of_2(height))), columns


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(mask: Tensor, log_decay_w: Tensor, log_decay_h: Tensor, log: bool, transpose: bool) -> None:
    """Fills mask."""
    batch, height, width, heads = log_decay_w.shape
    sums = cumulative(log_decay_w, log_decay_h).contiguous()
    rows, columns = tiles(height, width)
    grid_j, grid_l = triton.cdiv(height, rows), triton.cdiv(width, columns)
    owners = width if transpose else height
    with device_of(mask):
        forward_mask[(batch * heads * owners * grid_j * grid_l,)](
            mask,
            sums,
            batch * heads,
            height,
            width,
            grid_j,
            grid_l,
            log,
            transpose,
            rows,
            columns,
            num_warps=4,
        )


def backward(
    grad_log_decay_w: Tensor | None,
    grad_log_decay_h: Tensor | None,
    grad_mask: Tensor | None,
    mask: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    log: bool,
    transpose: bool,
) -> None:
    """Fills the gradients that are not None."""
    if grad_mask is None:
        for gradient in (grad_log_decay_w, grad_log_decay_h):
            if gradient is not None:
                gradient.zero_()
        return
    if grad_mask.stride(-1) != 1 and grad_mask.shape[-1] > 1:
        grad_mask = grad_mask.contiguous()
    batch, height, width, heads = log_decay_w.shape
    tokens, planes = height * width, batch * heads
    owners, steps = (width, height) if transpose else (height, width)
    sums = cumulative(log_decay_w, log_decay_h).contiguous()
    rows, columns = tiles(height, width)
    grid_j, grid_l = triton.cdiv(height, rows), triton.cdiv(width, columns)
    chunks = grid_l if transpose else grid_j
    own = _scratch(mask, planes, owners, chunks, steps, steps)
    shared = _scratch(mask, planes, owners, tokens)
    with device_of(mask):
        backward_mask[(planes * owners * grid_j * grid_l,)](
            own, shared, grad_mask, sums, planes, heads, *grad_mask.stride()[:3], height, width, grid_j, grid_l,
            log, transpose, rows, columns, num_warps=4,
        )  # fmt: skip
        grad_own, grad_shared = (
            (grad_log_decay_h, grad_log_decay_w) if transpose else (grad_log_decay_w, grad_log_decay_h)
        )
        if grad_own is not None:
            # Lines are owners, ends are their steps.
            out = _scratch(mask, planes, owners, steps)
            cross_lines[(planes * owners,)](
                out, own, 1, steps, chunks * steps * steps, 0, 1, chunks, steps * steps, steps, 0, 1, steps,
                steps, triton.next_power_of_2(steps), num_warps=1,
            )  # fmt: skip
            place = out.view(batch, heads, owners, steps)
            grad_own.copy_(place.permute(0, 3, 2, 1) if transpose else place.permute(0, 2, 3, 1))
        if grad_shared is not None:
            # Lines are rows (transposed) or columns of keys, ends are owners.
            out = _scratch(mask, planes, tokens)
            lines, line_step, place_step = (height, width, 1) if transpose else (width, 1, width)
            cross_lines[(planes * lines,)](
                out, shared, lines, owners, owners * tokens, line_step, place_step, 1, 0, tokens, line_step,
                place_step, owners, tokens, triton.next_power_of_2(owners), num_warps=1,
            )  # fmt: skip
            grad_shared.copy_(out.view(batch, heads, height, width).permute(0, 2, 3, 1))


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for height, width in ((14, 14), (50, 84)):
        for log, transpose in ((True, False), (False, True)):
            decays = torch.empty(2, 1, height, width, 2, dtype=dtype)
            mask = torch.empty(1, 2, height * width, height * width, dtype=dtype)

            def call(decays: Any = decays, mask: Tensor = mask, options: Any = (log, transpose)) -> None:
                inputs: list[Any] = [*decays, *options]
                forward(mask, *inputs)
                arguments: list[Any] = [*decays.clone(), mask, mask, *inputs]
                backward(*arguments)

            yield f"{height}x{width} {'log ' if log else ''}{'transposed' if transpose else ''}".strip(), call
