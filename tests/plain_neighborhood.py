"""Neighborhood attention from its definition, and layers as users have them: NATTEN's classes in plain PyTorch."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn


def neighbors(size: int, kernel: int, dilation: int, causal: bool) -> list[list[int]]:
    """The keys of each query along one axis, by walking its residue group."""
    found = []
    for query in range(size):
        group = list(range(query % dilation, size, dilation))
        place = group.index(query)
        start = max(place - kernel + 1, 0) if causal else place - kernel // 2
        stop = place + 1 if causal else start + kernel
        if not causal:
            shift = max(0, -start) - max(0, stop - len(group))
            start, stop = start + shift, stop + shift
        found.append(group[start:stop])
    return found


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
    rpb: torch.Tensor | None,
) -> torch.Tensor:
    """[B, *X, heads, head_dim], one query at a time."""
    sizes = q.shape[1:-2]
    tables = [neighbors(*axis) for axis in zip(sizes, kernel_size, dilation, is_causal, strict=True)]
    rows = []
    for query in itertools.product(*map(range, sizes)):
        keys = list(itertools.product(*(table[i] for table, i in zip(tables, query, strict=True))))
        index = tuple(torch.tensor(axis) for axis in zip(*keys, strict=True))
        logits = torch.einsum("bhd,bnhd->bhn", q[(slice(None), *query)] * scale, k[(slice(None), *index)])
        if rpb is not None:
            offsets = tuple(
                (axis - i) // step + size - 1
                for axis, i, step, size in zip(index, query, dilation, kernel_size, strict=True)
            )
            logits = logits + rpb[(slice(None), *offsets)]
        rows.append(torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v[(slice(None), *index)]))
    return torch.stack(rows, 1).unflatten(1, sizes)


class _Layer(nn.Module):
    def attend(self, q, k, v, scale):
        axes = q.ndim - 3
        options = [
            value if isinstance(value, tuple) else (value,) * axes
            for value in (self.kernel_size, self.dilation, getattr(self, "is_causal", False))
        ]
        return attention(q, k, v, *options, scale, getattr(self, "rpb", None))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.proj_drop(self.proj(self.attend(q, k, v, self.scale).flatten(-2)))


class NeighborhoodAttention2D(_Layer):
    """NATTEN up to 0.17: its arguments and attributes."""

    def __init__(
        self, dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, attn_drop=0.0
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.kernel_size, self.dilation, self.is_causal = kernel_size, dilation or 1, is_causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if rel_pos_bias:
            self.rpb = nn.Parameter(0.02 * torch.randn(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        else:
            self.register_parameter("rpb", None)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def forward(self, x):
        pad = [max(0, self.kernel_size * self.dilation - size) for size in x.shape[1:3]]
        y = super().forward(nn.functional.pad(x, (0, 0, 0, pad[1], 0, pad[0])))  # as NATTEN 0.14
        return self.attn_drop(y[:, : x.shape[1], : x.shape[2]])


class NeighborhoodAttention1D(_Layer):
    """NATTEN from 0.20 on: its arguments and attributes."""

    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = math.pow(self.head_dim, -0.5)
        self.kernel_size, self.stride = (kernel_size,), (stride,)
        self.dilation, self.is_causal = (dilation,), (is_causal,)
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(0.0)
