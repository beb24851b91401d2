"""Cascaded group attention as in a user's copy of the official code: its names, its cache of biases."""

import itertools

import torch
from torch import nn


class Conv2d_BN(nn.Sequential):
    def __init__(self, a, b, ks=1, stride=1, pad=0, groups=1, bn_weight_init=1):
        super().__init__()
        self.add_module("c", nn.Conv2d(a, b, ks, stride, pad, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(b))
        nn.init.constant_(self.bn.weight, bn_weight_init)


class CascadedGroupAttention(nn.Module):
    def __init__(self, dim, key_dim, num_heads, attn_ratio, resolution, kernels):
        super().__init__()
        self.scale, self.key_dim, self.d = key_dim**-0.5, key_dim, int(attn_ratio * key_dim)
        self.qkvs = nn.ModuleList(Conv2d_BN(dim // num_heads, 2 * key_dim + self.d) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            Conv2d_BN(key_dim, key_dim, kernel, 1, kernel // 2, key_dim) for kernel in kernels[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), Conv2d_BN(self.d * num_heads, dim, bn_weight_init=0))
        points = list(itertools.product(range(resolution), repeat=2))
        offsets = {}
        index = [
            offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets))
            for a in points
            for b in points
        ]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, len(offsets)))
        self.register_buffer("attention_bias_idxs", torch.tensor(index).view(len(points), -1))

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[:, self.attention_bias_idxs]

    def logits(self, q, k):
        return (q.transpose(-2, -1) @ k) * self.scale

    def forward(self, x):
        batch, _, height, width = x.shape
        bias = self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        features = []
        for head, feat in enumerate(x.chunk(len(self.qkvs), dim=1)):
            feat = self.qkvs[head](feat if head == 0 else features[-1] + feat)
            q, k, v = feat.split([self.key_dim, self.key_dim, self.d], dim=1)
            q, k, v = self.dws[head](q).flatten(2), k.flatten(2), v.flatten(2)
            attn = (self.logits(q, k) + bias[head]).softmax(dim=-1)
            features.append((v @ attn.transpose(-2, -1)).view(batch, self.d, height, width))
        return self.proj(torch.cat(features, 1))


class LocalWindowAttention(nn.Module):
    def __init__(self, dim, key_dim, num_heads, attn_ratio, resolution, window_resolution, kernels):
        super().__init__()
        self.resolution, self.window_resolution = resolution, window_resolution
        window = min(window_resolution, resolution)
        self.attn = CascadedGroupAttention(dim, key_dim, num_heads, attn_ratio, window, kernels)

    def forward(self, x):
        height, width = x.shape[2:]
        assert height == width == self.resolution
        side = self.window_resolution
        if height <= side:
            return self.attn(x)
        pad = -height % side
        x = nn.functional.pad(x, (0, pad, 0, pad))
        parts = [part for row in x.split(side, 2) for part in row.split(side, 3)]
        mixed = self.attn(torch.cat(parts)).chunk(len(parts))  # in training the statistics are all windows'
        count = x.shape[3] // side
        rows = [torch.cat(mixed[i : i + count], 3) for i in range(0, len(parts), count)]
        return torch.cat(rows, 2)[:, :, :height, :width]
