"""The product with a polyline path mask in plain PyTorch, as two products with the masks of rows and columns: the
contract that every kernel is tested against."""

from __future__ import annotations

import torch

from vitkernels.core.polyline import cumulative, segments


def forward(
    x: torch.Tensor, log_decay_w: torch.Tensor, log_decay_h: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor]:
    """y [B, H, W, heads, head_dim] in x's dtype; the masks are made in float32 (float64 for float64)."""
    sums = cumulative(log_decay_w, log_decay_h)
    rows = segments(sums[0]).exp().to(x.dtype)  # [B, heads, H, W, W]
    columns = segments(sums[1].transpose(-1, -2)).exp().to(x.dtype)  # [B, heads, W, H, H]

    def along(values: torch.Tensor) -> torch.Tensor:
        return torch.matmul(rows, values)

    def down(values: torch.Tensor) -> torch.Tensor:
        return torch.matmul(columns, values.transpose(2, 3)).transpose(2, 3)

    x = x.permute(0, 3, 1, 2, 4)
    y = down(along(x)) if transpose else along(down(x))
    return (y.permute(0, 2, 3, 1, 4).contiguous(),)
