"""Strip attention in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, heads, N, dv] in v's dtype, and lse [batch, heads, N] in fp32 (fp64 for fp64)."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if attn_bias is not None:
        logits = logits + attn_bias  # a float32 bias promotes half-precision logits
    out = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # in memory as the kernels' is
    accumulate = torch.float64 if q.dtype is torch.float64 else torch.float32
    return out, torch.logsumexp(logits.to(accumulate), dim=-1)
