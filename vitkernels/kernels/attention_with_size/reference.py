"""Proportional attention in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, heads, N, dv] in v's dtype, and lse [batch, heads, N] in fp32 (fp64 for fp64)."""
    logits = torch.matmul(q, k.mT) * scale + size.log()[:, None, None]  # promotes half-precision logits
    out = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # in memory as the kernels' is
    return out, torch.logsumexp(logits, dim=-1)
