"""Polyline path attention in plain PyTorch, every mask and score in memory: the contract of the kernels."""

from __future__ import annotations

import torch


def cumulative(log_decay_w: torch.Tensor, log_decay_h: torch.Tensor) -> torch.Tensor:
    """[2, B, heads, H, W]: the sums of log_decay_w along the rows, and of log_decay_h down the columns."""
    accumulate = torch.float64 if log_decay_w.dtype is torch.float64 else torch.float32
    along = log_decay_w.to(accumulate).cumsum(2)
    down = log_decay_h.to(accumulate).cumsum(1)
    return torch.stack((along, down)).permute(0, 1, 4, 2, 3)


def segments(sums: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., n, n]: what the decays between two positions add up to, sums[later] - sums[earlier].

    The order of the indices gives the sign, never that of the difference: rounding and decays of 0 keep their
    gradient.
    """
    position = torch.arange(sums.shape[-1], device=sums.device)
    sign = 1 - 2 * (position[None, :] > position[:, None]).to(sums.dtype)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)) * sign


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
    sums = cumulative(log_decay_w, log_decay_h)
    rows = segments(sums[0])
    columns = segments(sums[1].transpose(-1, -2))
    if criss_cross:
        q_columns, k_columns = q.transpose(2, 3), k.transpose(2, 3)
        return (
            torch.matmul(q, k.transpose(-1, -2)) + rows,
            torch.matmul(q_columns, k_columns.transpose(-1, -2)) + columns,
        )
    # mask[(i, j), (r, l)]: down the key's column l from row r to row i, then along the query's row i.
    down = columns.permute(0, 1, 3, 4, 2).unsqueeze(3)  # [B, heads, i, 1, r, l]
    mask = (rows.unsqueeze(4) + down).flatten(4).flatten(2, 3)
    scores = torch.matmul(q.flatten(2, 3), k.flatten(2, 3).transpose(-1, -2))
    return scores + mask, scores + mask.transpose(-1, -2)


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
