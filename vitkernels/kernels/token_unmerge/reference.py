"""Unmerging tokens in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def forward(
    y: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, members: torch.Tensor
) -> tuple[torch.Tensor]:
    """x [batch, t, C]: every token gets its group's row."""
    return (y.gather(1, rows.long().unsqueeze(2).expand(*rows.shape, y.shape[2])),)
