"""Neighborhood attention in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def axis_neighbors(
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    causal: bool,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of every query along one axis, [size, kernel] each: position, relative position, whether it is seen.

    A dilation splits the axis into that many interleaved groups, each an axis of its own; the last groups may be
    one shorter. A window that would leave its group is shifted inward. The relative position counts in steps of the
    dilation and starts at 0 for a key kernel - 1 steps before its query.
    """
    position = torch.arange(size, device=device)
    group, step = position % dilation, position // dilation
    length = size // dilation + (group < size % dilation)
    if causal:
        leader = torch.minimum(step // stride * stride + stride - 1, length - 1)
        start = (leader - kernel + 1).clamp(min=0)
    else:
        leader = torch.minimum(step // stride * stride + stride // 2, length - 1)
        start = torch.minimum((leader - kernel // 2).clamp(min=0), length - kernel)
    key = start[:, None] + torch.arange(kernel, device=device)
    seen = key <= step[:, None] if causal else torch.ones_like(key, dtype=torch.bool)
    key = torch.where(seen, key, step[:, None])
    return group[:, None] + dilation * key, key - step[:, None] + kernel - 1, seen


def neighbors(
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of every query of a map, [tokens, window] each: flat token, flat rpb entry, whether it is seen."""
    token = entry = torch.zeros(1, 1, dtype=torch.int64, device=device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for size, kernel, step, spread, causal in zip(
        sizes, kernel_size, stride, dilation, is_causal, strict=True
    ):
        position, relative, valid = axis_neighbors(size, kernel, step, spread, causal, device=device)
        token, entry, seen = (
            combine(outer[:, None, :, None], inner[None, :, None, :]).reshape(-1, outer.shape[1] * kernel)
            for combine, outer, inner in (
                (lambda a, b, n=size: a * n + b, token, position),
                (lambda a, b, n=2 * kernel - 1: a * n + b, entry, relative),
                (torch.logical_and, seen, valid),
            )
        )
    return token, entry, seen


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, *X, heads, dv] in v's dtype, and lse [B, *X, heads] in fp32 (fp64 for fp64)."""
    rank = len(kernel_size)
    token, entry, seen = neighbors(q.shape[1 : 1 + rank], kernel_size, stride, dilation, is_causal, q.device)
    queries = q.flatten(1, rank).unsqueeze(-2)  # [B, tokens, heads, 1, d]
    keys = k.flatten(1, rank)[:, token].permute(0, 1, 3, 4, 2)  # [B, tokens, heads, d, window]
    values = v.flatten(1, rank)[:, token].transpose(2, 3)  # [B, tokens, heads, window, dv]
    logits = torch.matmul(queries, keys).squeeze(-2) * scale
    if rpb is not None:
        # A float32 bias promotes half-precision logits.
        logits = logits + rpb.flatten(1)[:, entry].transpose(0, 1)
    if any(is_causal):
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
    weights = torch.softmax(logits, dim=-1).to(v.dtype)
    out = torch.matmul(weights.unsqueeze(-2), values).squeeze(-2)
    accumulate = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse = torch.logsumexp(logits.to(accumulate), dim=-1)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])
