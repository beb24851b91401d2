"""Strip self-attention and the hybrid perception block of S2AFormer (arXiv 2505.22195).

The authors published neither code nor a table of the layers. What is here follows the paper where reviews of it agree,
and two public networks that have its parts where they are silent: CMT (the block, the reduction of keys and values by
depthwise convolutions) and MetaSeg (one query and key channel a head). Every choice that is inferred is named so below
and is an argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import check_positive_ints, check_scale, fail
from vitkernels.nn.depthwise_conv import DepthwiseConv
from vitkernels.nn.drop_path import DropPath

_SCALES = ("value_dim", "qk_dim")


class StripSelfAttention(nn.Module):
    """Attention of every token of a map to a reduced map, with few channels for queries and keys.

    With the defaults a head has one query and one key channel, so a token's scores are its query times the strip of
    keys, and dim / num_heads value channels.

    From the paper: keys and values come from a map reduced by a depthwise convolution, queries and keys have fewer
    channels than values. Inferred: everything that an argument chooses, by default as in CMT.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: number of heads.
        sr_ratio: R; keys and values are floor(H / R) x floor(W / R) tokens. The reduction does not pad: of sizes that
            R does not divide, the last rows and columns have no part in keys and values. With 1 there is neither
            reduction nor norm.
        scale: of the scores. "value_dim" is (dim / num_heads) ** -0.5, CMT's and MetaSeg's, although the products run
            over qk_dim_per_head channels; "qk_dim" is qk_dim_per_head ** -0.5, that is 1 by default; or a number. The
            paper does not tell, and results differ widely: there is no default.
        qk_dim_per_head: query and key channels of a head.
        qkv_bias: whether queries, keys and values have a bias: CMT yes, MetaSeg no.
        reduction: "conv", a depthwise R x R convolution with stride R, or "pool", means over R x R and a pointwise
            convolution (MetaSeg).
        norm: after the reduction, "batch" (CMT), "layer" (MetaSeg) or None. A batch norm folds into the
            convolution in eval mode, by `vitkernels.apply`.
        act: after the norm, None (CMT) or "gelu" (MetaSeg).
        proj_drop: dropout on the output.

    Shape: `[B, H, W, dim]`, channels last, H and W at least R, to the same.

    Raises:
        ValueError: bad values; in forward, an input of another shape or smaller than R.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        *,
        scale: str | float,
        qk_dim_per_head: int = 1,
        qkv_bias: bool = True,
        reduction: str = "conv",
        norm: str | None = "batch",
        act: str | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        (num_heads,) = check_positive_ints("num_heads", num_heads, 1)
        (sr_ratio,) = check_positive_ints("sr_ratio", sr_ratio, 1)
        (qk_dim,) = check_positive_ints("qk_dim_per_head", qk_dim_per_head, 1)
        if dim < 1 or dim % num_heads:
            fail("dim", f"a multiple of num_heads = {num_heads}", dim)
        choices = {"reduction": ("conv", "pool"), "norm": ("batch", "layer", None), "act": ("gelu", None)}
        for name, value in {"reduction": reduction, "norm": norm, "act": act}.items():
            if value not in choices[name]:
                fail(name, " or ".join(map(repr, choices[name])), value)
        if scale is None or (isinstance(scale, str) and scale not in _SCALES):
            fail("scale", f"{' or '.join(map(repr, _SCALES))}, or a number", scale)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qk_dim_per_head = qk_dim
        self.sr_ratio = sr_ratio
        if isinstance(scale, str):
            self.scale = (self.head_dim if scale == "value_dim" else qk_dim) ** -0.5
        else:
            self.scale = check_scale(scale, 1.0)
        self.q = nn.Linear(dim, num_heads * qk_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_heads * qk_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr: nn.Module = nn.Identity()
        if sr_ratio > 1:
            self.sr = SpatialReduction(dim, sr_ratio, reduction, norm, act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            fail("x", f"shape [batch, H, W, {self.dim}], channels last", x)
        if min(x.shape[1:3]) < self.sr_ratio:
            fail("x", f"a map of at least {self.sr_ratio} x {self.sr_ratio}, one key, as sr_ratio wants", x)
        # No kernel fuses the reduction, its norm and the projections of keys and values. On two CPU threads, at
        # S2AFormer-T's first stage and batch 16, they take 0.44 ms, beside 3.9 ms of this whole layer and 18 ms of the
        # block's MLP; reading the map takes 0.2 ms of it.
        reduced = self.sr(x)
        q, k, v = (
            linear(tokens).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, tokens in ((self.q, x), (self.k, reduced), (self.v, reduced))
        )
        out = ops.strip_attention(q, k, v, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, qk_dim_per_head={self.qk_dim_per_head}, "
            f"sr_ratio={self.sr_ratio}, scale={self.scale:g}"
        )


class SpatialReduction(nn.Module):
    """The map of keys and values: floor(H / ratio) x floor(W / ratio) tokens of a map `[B, H, W, dim]`.

    Args:
        reduction, norm, act: as in `StripSelfAttention`.
    """

    def __init__(self, dim: int, ratio: int, reduction: str, norm: str | None, act: str | None) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        if reduction == "conv":
            conv = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
        else:
            self.pool, conv = nn.AvgPool2d(ratio), nn.Conv2d(dim, dim, 1)
        # A plain sequence of the two, which folds.
        self.conv = nn.Sequential(conv, nn.BatchNorm2d(dim)) if norm == "batch" else conv
        self.norm: nn.Module = nn.LayerNorm(dim) if norm == "layer" else nn.Identity()
        self.act: nn.Module = nn.GELU() if act == "gelu" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.pool(x.permute(0, 3, 1, 2)))
        return self.act(self.norm(x.permute(0, 2, 3, 1)))


class LIM(nn.Module):
    """The block's local module: two depthwise 3 x 3 convolutions with GELU and batch norm between.

    Inferred: of the paper's LIM only is known that it keeps boundaries and details. This is XCiT's local patch
    interaction.

    Shape: `[B, H, W, dim]` to the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv(dim, 3)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = DepthwiseConv(dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.act(self.conv1(x)).permute(0, 3, 1, 2))
        return self.conv2(x.permute(0, 2, 3, 1))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class HybridPerceptionBlock(nn.Module):
    """A depthwise convolution, strip attention, a local module and an MLP, each added to its input.

    The order, and layer norms in front of the last three alone, are reported from the paper::

        x = x + DWConv(x);  x = x + SSA(LN(x));  x = x + LIM(LN(x));  x = x + MLP(LN(x))

    Inferred: the convolution's 3 x 3 (CMT), the contents of LIM and MLP, drop-path on the last three.

    Args:
        dim, num_heads, sr_ratio: as in `StripSelfAttention`.
        mlp_ratio: hidden channels of the MLP over dim.
        drop_path: probability with which a sample skips a branch in training.
        scale: as in `StripSelfAttention`.
        **attention: its other arguments.

    Shape: `[B, H, W, dim]`, channels last, to the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        *,
        scale: str | float,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.local = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = StripSelfAttention(dim, num_heads, sr_ratio, scale=scale, **attention)
        self.norm2 = nn.LayerNorm(dim)
        self.lim = LIM(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.lim(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm3(x)))
