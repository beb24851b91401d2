"""Sums of logarithmic decays along the rows and columns of a grid, in plain PyTorch: what the references of the
polyline operators have in common."""

from __future__ import annotations

import torch


def cumulative(log_decay_w: torch.Tensor, log_decay_h: torch.Tensor) -> torch.Tensor:
    """[2, B, heads, H, W]: the sums of log_decay_w along the rows, and of log_decay_h down the columns.

    Without the first of a line, which is in no difference of two sums, but of which -inf would make each NaN.
    """
    accumulate = torch.float64 if log_decay_w.dtype is torch.float64 else torch.float32
    row, column = (torch.arange(size, device=log_decay_w.device) for size in log_decay_w.shape[1:3])
    along = torch.where(column[:, None] > 0, log_decay_w.to(accumulate), 0).cumsum(2)
    down = torch.where(row[:, None, None] > 0, log_decay_h.to(accumulate), 0).cumsum(1)
    return torch.stack((along, down)).permute(0, 1, 4, 2, 3)


def segments(sums: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., n, n]: what the decays between two positions add up to, sums[later] - sums[earlier].

    The order of the indices gives the sign, never that of the difference: rounding and decays of 0 keep their
    gradient. On the diagonal it is 0, or the gradients there, which cancel, would drown those of strong decays.
    """
    position = torch.arange(sums.shape[-1], device=sums.device)
    sign = (position[:, None] - position[None, :]).sign().to(sums.dtype)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)) * sign


def mask(log_decay_w: torch.Tensor, log_decay_h: torch.Tensor) -> torch.Tensor:
    """M [B, heads, H * W, H * W], row-major tokens: the mask's logarithm.

    M[(i, j), (r, l)] is the sum of the decays met on the way from key (r, l) to query (i, j): down the key's column
    from row r to row i, then along the query's row from column l to column j.
    """
    sums = cumulative(log_decay_w, log_decay_h)
    rows, columns = segments(sums[0]), segments(sums[1].transpose(-1, -2))
    down = columns.permute(0, 1, 3, 4, 2).unsqueeze(3)  # [B, heads, i, 1, r, l]
    return (rows.unsqueeze(4) + down).flatten(4).flatten(2, 3)
