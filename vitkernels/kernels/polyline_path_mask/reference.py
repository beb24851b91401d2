"""The polyline path mask in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch

from vitkernels.core import polyline


def forward(
    log_decay_w: torch.Tensor, log_decay_h: torch.Tensor, log: bool, transpose: bool
) -> tuple[torch.Tensor]:
    """mask [B, heads, H * W, H * W] in the decays' dtype, from sums in float32 (float64 for float64)."""
    mask = polyline.mask(log_decay_w, log_decay_h)
    if transpose:
        mask = mask.transpose(-1, -2)
    return ((mask if log else mask.exp()).to(log_decay_w.dtype).contiguous(),)
