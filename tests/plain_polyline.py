"""Polyline path attention from its definition, and layers as users have them: the official code's classes, names and
calls, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn


def steps_between(size: int, like: torch.Tensor) -> torch.Tensor:
    """[size, size, size]: 1 where the step to the third index lies on the way between the first two."""
    p = torch.arange(size)
    low, high = torch.minimum(p[:, None], p), torch.maximum(p[:, None], p)
    return ((low[..., None] < p) & (p <= high[..., None])).to(like)


def tables(log_decay_w: torch.Tensor, log_decay_h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums along the rows [B, heads, i, k, l] and down the columns [B, heads, l, i, j], from [B, H, W, heads]."""
    _, height, width, _ = log_decay_w.shape
    rows = torch.einsum("bitn,klt->bnikl", log_decay_w, steps_between(width, log_decay_w))
    columns = torch.einsum("btln,ijt->bnlij", log_decay_h, steps_between(height, log_decay_h))
    return rows, columns


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    mode: str,
    scale: float,
) -> torch.Tensor:
    """[B, H, W, heads, head_dim]."""
    rows, columns = tables(log_decay_w, log_decay_h)
    if mode == "whole":
        scores = torch.einsum("biknd,bjlnd->bnikjl", q * scale, k)
        mask = rows.unsqueeze(4) + columns.permute(0, 1, 3, 4, 2).unsqueeze(
            3
        )  # vertically in the key's column
        turned = mask.permute(0, 1, 4, 5, 2, 3)
        p = sum((scores + m).flatten(-2).softmax(-1).view(scores.shape) for m in (mask, turned)) / 2
        return torch.einsum("bnikjl,bjlnd->biknd", p.to(v.dtype), v)
    a_w = (torch.einsum("biknd,bilnd->bnikl", q * scale, k) + rows).softmax(-1).to(v.dtype)
    a_h = (torch.einsum("bilnd,bjlnd->bnlij", q * scale, k) + columns).softmax(-1).to(v.dtype)
    along, down = "bnikl,bilnd->biknd", "bnlij,bjlnd->bilnd"
    first = torch.einsum(down, a_h, torch.einsum(along, a_w, v))
    return (first + torch.einsum(along, a_w, torch.einsum(down, a_h, v))) / 2


class RotaryPositionEmbedding2D(nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        angle = 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
        self.register_buffer("angle", torch.stack((angle, angle), 1).view(-1))

    def forward(self, slen):
        height, width = slen
        phase = torch.arange(height * width).to(self.angle).view(height, width, 1) * self.angle
        return phase.sin(), phase.cos()


def turned(x, sin, cos):
    """x [B, H, W, heads, head_dim]; pairs (a, b) become (a cos - b sin, b cos + a sin)."""
    partner = x.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([-1.0, 1.0]).to(x)
    return x * cos[:, :, None] + partner.flatten(-2) * sin[:, :, None]


class DWConv2d(nn.Module):
    def __init__(self, dim, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, 1, kernel_size // 2, groups=dim)

    def forward(self, x):
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class PathEmbeding2D(nn.Module):
    def __init__(self, embed_dim, nheads, chunkwise_recurrent):
        super().__init__()
        self.nheads, self.chunkwise_recurrent = nheads, chunkwise_recurrent
        self.dt_linear = nn.Linear(embed_dim // nheads, 2, bias=False)
        self.dt_bias = nn.Parameter(torch.randn(nheads) - 2)
        self.A_log = nn.Parameter(0.1 * torch.rand(nheads))

    def forward(self, x):
        z = self.dt_linear(x.unflatten(-1, (self.nheads, -1))).movedim(-1, 0)
        a, b = (-self.A_log.exp() * nn.functional.softplus(part + self.dt_bias) for part in z)
        return a, b


class Attention(nn.Module):
    """What the two official classes compute; a copy of another name too."""

    chunks = False

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.embed_dim, self.num_heads, self.key_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scaling = self.key_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim) for _ in range(4)
        )
        self.lepe = DWConv2d(embed_dim, 5)
        self.path_embed = PathEmbeding2D(embed_dim, num_heads, self.chunks)

    def turn(self, x, rel_pos):
        return turned(x, *rel_pos).to(x)

    def mix(self, q, k, v, a, b):
        return attention(q, k, v, a, b, "criss_cross" if self.chunks else "whole", 1.0)

    def forward(self, x, rel_pos):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        lepe = self.lepe(v)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k * self.scaling, v))
        out = self.mix(self.turn(q, rel_pos), self.turn(k, rel_pos), v, *self.path_embed(x))
        return self.out_proj(out.flatten(-2) + lepe)


class MambaAttentionAllDouble(Attention):
    pass


class MambaAttentionChunkDouble(Attention):
    chunks = True
