"""Cascaded group attention in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def relative_index(window_h: int, window_w: int, device: torch.device | None = None) -> torch.Tensor:
    """Bias-table entry of each (query, key) pair, |dy| * window_w + |dx|: int64 [tokens, tokens]."""
    y = torch.arange(window_h, device=device).repeat_interleave(window_w)
    x = torch.arange(window_w, device=device).repeat(window_h)
    return (y[:, None] - y[None, :]).abs() * window_w + (x[:, None] - x[None, :]).abs()


def partition(x: torch.Tensor, window_h: int, window_w: int) -> torch.Tensor:
    """[B, C, H, W] -> [B * rows * columns, C, window_h, window_w], zero-padded right and bottom."""
    x = F.pad(x, (0, -x.shape[3] % window_w, 0, -x.shape[2] % window_h))
    tiles = x.unflatten(3, (-1, window_w)).unflatten(2, (-1, window_h))  # [B, C, rows, Wh, columns, Ww]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def reverse(windows: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    """The inverse of `partition`, cropped to [batch, C, height, width]."""
    window_h, window_w = windows.shape[2:]
    rows, columns = -(-height // window_h), -(-width // window_w)
    tiles = windows.unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return tiles.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def forward(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor,
    attn_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    window_h: int,
    window_w: int,
    kernel_sizes: Sequence[int],
    scale: float,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, C, H, W], and the heads before ReLU, [windows, tokens, C], both in x's dtype."""
    dtype = x.dtype
    batch, _, height, width = x.shape
    count, key_dim, largest, _ = dw_weight.shape
    index = relative_index(window_h, window_w, x.device)
    chunks = partition(x, window_h, window_w).chunk(count, dim=1)
    features: list[torch.Tensor] = []
    for i, (chunk, size) in enumerate(zip(chunks, kernel_sizes, strict=True)):
        u = features[-1] + chunk if features else chunk
        y = F.conv2d(u, qkv_weight[i, :, :, None, None].to(dtype), qkv_bias[i].to(dtype))
        q, k, v = y.split([key_dim, key_dim, y.shape[1] - 2 * key_dim], dim=1)
        dead = (largest - size) // 2
        taps = dw_weight[i, :, None, dead : dead + size, dead : dead + size]
        q = F.conv2d(q, taps.to(dtype), dw_bias[i].to(dtype), padding=size // 2, groups=key_dim)
        logits = torch.matmul(q.flatten(2).transpose(1, 2), k.flatten(2)) * scale
        # A float32 table promotes half-precision logits, as it does under autocast in the original model.
        weights = torch.softmax(logits + attn_bias[i][index], dim=-1).to(dtype)
        out = torch.matmul(v.flatten(2), weights.transpose(1, 2))
        features.append(out.unflatten(2, (window_h, window_w)))
    z = torch.cat(features, dim=1)
    out = F.conv2d(F.relu(z), proj_weight[:, :, None, None].to(dtype), proj_bias.to(dtype))
    out = reverse(out, batch, height, width)
    return (x + out if residual else out), z.flatten(2).transpose(1, 2)
