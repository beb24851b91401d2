"""The residual FFN in plain PyTorch: the contract that the kernel is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    scale1: torch.Tensor | None,
    scale2: torch.Tensor | None,
    dw_weight: torch.Tensor | None,
    dw_bias: torch.Tensor | None,
) -> tuple[torch.Tensor]:
    """out, [B, C, H, W], in x's dtype."""
    height, width = x.shape[2:]
    if height == 0 or width == 0:
        # PyTorch's convolutions refuse such a map: a row and a column are put on, and cut off again.
        padded = F.pad(x, (0, 1, 0, 1))
        (out,) = forward(padded, weight1, bias1, weight2, bias2, scale1, scale2, dw_weight, dw_bias)
        return (out[:, :, :height, :width],)
    u = x
    if dw_weight is not None and dw_bias is not None:
        taps = dw_weight[:, None].to(x.dtype)
        u = x + F.conv2d(x, taps, dw_bias.to(x.dtype), padding=1, groups=x.shape[1])
    hidden = F.relu(_affine(u, weight1, scale1, bias1))
    return (u + _affine(hidden, weight2, scale2, bias2),)


def _affine(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor
) -> torch.Tensor:
    weight = weight.flatten(1)[:, :, None, None]
    if scale is None:
        return F.conv2d(x, weight, bias.to(x.dtype))
    return F.conv2d(x, weight) * scale.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]
