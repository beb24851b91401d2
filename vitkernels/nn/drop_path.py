"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import nn

from vitkernels.core.checks import fail


class DropPath(nn.Module):
    """In train mode zeroes the residual branch of a sample with probability p and scales the rest by 1 / (1 - p).

    Args:
        p: probability in [0, 1).

    Shape: `[batch, ...]` to the same.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            fail("p", "a probability in [0, 1)", p)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"
