"""Window attention in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def relative_index(
    window_h: int, window_w: int, signed: bool, device: torch.device | None = None
) -> torch.Tensor:
    """Bias-table entry of each (query, key) pair: int64 [tokens, tokens]."""
    y = torch.arange(window_h, device=device).repeat_interleave(window_w)
    x = torch.arange(window_w, device=device).repeat(window_h)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    if signed:
        return (dy + window_h - 1) * (2 * window_w - 1) + dx + window_w - 1
    return dy.abs() * window_w + dx.abs()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None,
    window_h: int,
    window_w: int,
    signed_bias: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, heads, tokens, dv] in v's dtype, and lse [batch, heads, tokens] in fp32 (fp64 for fp64)."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if bias_table is not None:
        # A float32 table promotes half-precision logits, as it does under autocast in the original models.
        logits = logits + bias_table[:, relative_index(window_h, window_w, signed_bias, q.device)]
    out = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    accumulate = torch.float64 if q.dtype is torch.float64 else torch.float32
    return out, torch.logsumexp(logits.to(accumulate), dim=-1)
