"""Tensors whose elements lie more than 2^31 elements apart, in memory that nobody else touches."""

from __future__ import annotations

import mmap

import torch

STEP = 2**30 + 8  # the third token lies where 32-bit arithmetic does not reach


def far(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of three or more of something along a dimension, STEP elements apart; the rest side by side.

    The memory is reserved, not taken: pages that nothing is written to cost nothing. Below the copy lies as much as an
    offset of 32 bits that has wrapped around goes back, zeros, so that a wrong result shows instead of a crash.
    """
    rest = [d for d in range(tensor.ndim) if d != dim]
    inner = torch.empty([tensor.shape[d] for d in rest])
    strides = list(inner.stride())
    strides.insert(dim, STEP)
    before = 2**31
    size = before + (tensor.shape[dim] - 1) * STEP + inner.numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    pages = mmap.mmap(-1, size * tensor.element_size(), flags=flags)
    return torch.frombuffer(pages, dtype=tensor.dtype).as_strided(tensor.shape, strides, before).copy_(tensor)
