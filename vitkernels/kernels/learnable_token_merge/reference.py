"""Learnable token merging in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def normalized(g: torch.Tensor, normalize: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask as it multiplies, in float32 (float64) unless it is g, and what each row or column was divided by.

    The latter are sums of columns for "sum", else logarithms of sums of exponentials.
    """
    wide = g.to(torch.float64 if g.dtype is torch.float64 else torch.float32)
    if normalize == "sum":
        sums = wide.sum(-2)
        sums = torch.where(sums == 0, 1, sums)
        return wide / sums.unsqueeze(-2), sums
    if normalize == "softmax":
        return wide.softmax(-2), wide.logsumexp(-2)
    if normalize == "softmax_rows":
        return wide.softmax(-1), wide.logsumexp(-1)
    return g, wide.new_empty(0)


def forward(
    z: torch.Tensor, g: torch.Tensor, other: torch.Tensor | None, normalize: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [batch, P, D] and y_other [batch, P, D'] or [0], in z's dtype, and what divided the mask."""
    mask, divisors = normalized(g, normalize)
    transposed = mask.to(z.dtype).mT
    y = torch.matmul(transposed, z)
    y_other = z.new_empty(0) if other is None else torch.matmul(transposed, other)
    return y, y_other, divisors
