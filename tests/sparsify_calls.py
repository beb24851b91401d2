"""What the tests of sparsify prune: a small network, and batches for its calibration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Network(nn.Module):
    """Layers of several sizes, partial blocks among them, tokens of two kinds, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 40)
        self.fc1 = nn.Linear(40, 70)
        self.fc2 = nn.Linear(70, 40)
        self.wide = nn.Linear(40, 33)
        self.head = nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(torch.tanh(self.wide(x.mean(1))))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(10, 6, 12, generator=torch.Generator().manual_seed(1)).split([4, 4, 2]))
