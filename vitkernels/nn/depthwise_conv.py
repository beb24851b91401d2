"""Convolutions of one channel each, for blocks whose maps have their channels last."""

from __future__ import annotations

import torch
from torch import nn


class DepthwiseConv(nn.Module):
    """A depthwise convolution of a channels-last map `[B, H, W, C]`, with bias, to the same size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map `[B, C, H, W]`, channels last in memory. Unlike `contiguous(memory_format=...)` it runs under vmap."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
