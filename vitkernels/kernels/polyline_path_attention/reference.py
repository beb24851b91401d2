"""Polyline path attention in plain PyTorch, every mask and score in memory: the contract of the kernels."""

from __future__ import annotations

import torch

from vitkernels.core.polyline import cumulative, mask, segments


def logits(
    q: torch.Tensor,
    k: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    criss_cross: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two softmaxes are taken of, along the last axis.

    Whole: scores plus the mask, and plus the transposed mask, both [B, heads, H * W, H * W]. Criss-cross: those of
    the rows, [B, heads, H, W, W], and of the columns, [B, heads, W, H, H]. In float32 at least, since the sums of
    the decays are.
    """
    q, k = ((t.permute(0, 3, 1, 2, 4)) for t in (q * scale, k))
    if criss_cross:
        sums = cumulative(log_decay_w, log_decay_h)
        rows, columns = segments(sums[0]), segments(sums[1].transpose(-1, -2))
        q_columns, k_columns = q.transpose(2, 3), k.transpose(2, 3)
        return (
            torch.matmul(q, k.transpose(-1, -2)) + rows,
            torch.matmul(q_columns, k_columns.transpose(-1, -2)) + columns,
        )
    paths = mask(log_decay_w, log_decay_h)
    scores = torch.matmul(q.flatten(2, 3), k.flatten(2, 3).transpose(-1, -2))
    return scores + paths, scores + paths.transpose(-1, -2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    criss_cross: bool,
    scale: float,
) -> tuple[torch.Tensor]:
    """out [B, H, W, heads, dv] in v's dtype; what the kernels save for the backward pass is their own affair."""
    first, second = (
        torch.softmax(x, dim=-1) for x in logits(q, k, log_decay_w, log_decay_h, criss_cross, scale)
    )
    v = v.permute(0, 3, 1, 2, 4)
    if criss_cross:
        rows, columns = first.to(v.dtype), second.to(v.dtype)

        def down(values: torch.Tensor) -> torch.Tensor:
            return torch.matmul(columns, values.transpose(2, 3)).transpose(2, 3)

        out = 0.5 * down(torch.matmul(rows, v)) + 0.5 * torch.matmul(rows, down(v))
    else:
        out = torch.matmul((0.5 * first + 0.5 * second).to(v.dtype), v.flatten(2, 3)).reshape(v.shape)
    return (out.permute(0, 2, 3, 1, 4).contiguous(),)
