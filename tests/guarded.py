"""Tensors inside larger buffers of NaN: a read outside shows in a result, a write outside in `check`.

With walls, memory that nobody may touch lies behind them, or in front, so that a read whose value is thrown away ends
the process, as it might a user's. pytest then prints which test it was.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """How a tensor, by default [batch, heads, tokens, channels], lies in memory."""

    order: tuple[int, ...] = (0, 1, 2, 3)  # of the dimensions, outermost first
    padding: int = 0  # elements added to the innermost
    step: int = 1  # the stride of the innermost
    before: int = 64  # elements in front; an odd number takes the 16-byte alignment away


LAYOUTS = {
    "dense": Layout(),
    "offset": Layout(before=65),
    "nchw": Layout((0, 1, 3, 2)),  # tokens dense, as in views of maps
    "nchw_offset": Layout((0, 1, 3, 2), before=65),
    "tokens_first": Layout((0, 2, 1, 3), before=65),
    "packed": Layout((0, 2, 1, 3), padding=16),  # heads interleaved, as in views of a projection
    "every_second": Layout(step=2),  # of the channels; all rows aligned
    "strided": Layout(step=2, before=65),
    "strided_nchw": Layout((1, 0, 3, 2), step=3, before=65),
    # Where batch * heads is a multiple of 8, all tokens of the first entry and head begin at multiples of 16 bytes,
    # those of the others do not.
    "tokens_outermost": Layout((2, 1, 0, 3), padding=1),
    "odd": Layout((3, 0, 2, 1), padding=1, before=37),  # nothing dense
}

# Of [batch, 24 tokens, 16 channels], batches of two: rows that copies of 16 bytes can take, and three kinds that they
# cannot, by the first element, by the distance of the tokens, and (16-bit types) by that of the batch entries alone.
ROWS = {
    "aligned": Layout((0, 1, 2), padding=8),
    "offset": Layout((0, 1, 2), padding=8, before=65),
    "odd_tokens": Layout((0, 1, 2), padding=1),
    "odd_batch": Layout((1, 0, 2), padding=4),
}


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, in as many digits as dtype has: a float64 kernel that rounds an input to float32 does not show with
    numbers that were float32."""
    return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def _at_a_wall(count: int, dtype: torch.dtype, in_front: bool) -> torch.Tensor:
    """From a page's start, or up to its end; none of the bytes of the page before it, or behind it, may be read."""
    if sys.platform == "win32":
        return torch.empty(count, dtype=dtype)
    used = count * dtype.itemsize
    whole = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, whole + mmap.PAGESIZE)
    wall, offset = (0, mmap.PAGESIZE) if in_front else (whole, whole - used)
    no_access = 0
    failed = ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)) + wall),
        ctypes.c_size_t(mmap.PAGESIZE),
        ctypes.c_int(no_access),
    )
    assert not failed
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset)


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


class Guarded:
    """Makes tensors; with walls, behind the last element of each, or where tests say so in front of the first."""

    in_front = False  # of all tensors of a test; fixtures set it

    def __init__(self, walls: bool = False) -> None:
        self._walls = walls
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str | Layout = "dense"
    ) -> torch.Tensor:
        """A tensor of NaN, or of the smallest integer, dense where the layout is for another number of dimensions."""
        chosen = LAYOUTS[layout] if isinstance(layout, str) else layout
        order, padding, step, before = chosen
        if len(shape) != len(order):
            order, padding, step = tuple(range(len(shape))), 0, 1
        stride, strides = step, [0] * len(shape)
        for i in reversed(order):
            strides[i] = stride
            stride *= shape[i] + (padding if i == order[-1] else 0)
        used = 1 + sum((size - 1) * apart for size, apart in zip(shape, strides, strict=True))
        if self._walls and 0 not in shape:
            # With nothing but what misaligns it between a wall in front and the first element.
            before = before % 64 if self.in_front else before
            buffer = _at_a_wall(before + used, dtype, self.in_front)
        else:
            buffer = torch.empty(before + stride + 64, dtype=dtype)
        buffer.fill_(_nothing(dtype))
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside.as_strided(shape, strides, before).fill_(True)
        self._kept.append((buffer, inside))
        return buffer.as_strided(shape, strides, before)

    def random(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str | Layout = "dense"
    ) -> torch.Tensor:
        return self(shape, dtype, layout).copy_(drawn(*shape, dtype=dtype))

    def check(self) -> None:
        for buffer, inside in self._kept:
            outside = buffer[~inside]
            untouched = outside.isnan() if outside.is_floating_point() else outside == _nothing(outside.dtype)
            assert untouched.all(), "a kernel wrote outside a tensor"
