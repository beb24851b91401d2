"""Merging tokens by a plan in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def forward(
    x: torch.Tensor,
    size: torch.Tensor | None,
    rows: torch.Tensor,
    starts: torch.Tensor,
    members: torch.Tensor,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [batch, t', C] in x's dtype, and the sizes [batch, t'] in float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    index = rows.long()
    counts = (starts[:, 1:] - starts[:, :-1]).to(wide)
    sizes = counts if size is None else torch.zeros_like(counts).scatter_add(1, index, size)
    if mode == "amax":
        return _amax(x, index, counts), sizes

    values = x.to(wide)
    if mode == "wavg" and size is not None:
        values = values * size.unsqueeze(2)
    y = _sum(values, index, counts)
    if mode == "wavg":
        y = y / sizes.unsqueeze(2)
    elif mode == "mean":
        y = y / counts.unsqueeze(2)
    return y.to(x.dtype), sizes


def _sum(x: torch.Tensor, index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    where = index.unsqueeze(2).expand(x.shape)
    return x.new_zeros((*counts.shape, x.shape[2])).scatter_add(1, where, x)


def _amax(x: torch.Tensor, index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The largest; its gradient is shared evenly by the tokens that reach it."""
    where = index.unsqueeze(2).expand(x.shape)
    values = x.detach()
    lowest = values.new_full((*counts.shape, x.shape[2]), -torch.inf)
    largest = lowest.scatter_reduce(1, where, values, "amax")
    reach = (values == largest.gather(1, where)).to(counts.dtype)
    share = reach / _sum(reach, index, counts).gather(1, where)
    mean = _sum(torch.where(reach > 0, x, 0).to(counts.dtype) * share, index, counts)
    # Zero but for its gradient; of an infinite maximum as much again, since infinity less itself is not a number.
    nothing = torch.where(largest.isfinite(), mean - mean.detach(), mean)
    return largest + nothing.to(x.dtype)
