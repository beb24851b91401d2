"""Neighborhood attention as a layer: NATTEN's modules on a current torch, on any device, with the bias.

Arguments are those of NATTEN's modules from 0.20 on and of those up to 0.17, parameters and `state_dict` are
those of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import check_positive_ints, describe, fail


class _NeighborhoodAttention(nn.Module):
    """What the layers of one and two dimensions share; `rank` is the number of spatial axes."""

    rank: int
    rpb: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        *positional: Any,
        dim: int | None = None,
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        rel_pos_bias: bool = False,
        bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if positional:
            raise TypeError(
                f"{type(self).__name__}: expected at most three positional arguments (embed_dim, num_heads, "
                f"kernel_size); got {3 + len(positional)}, the fourth being {positional[0]!r}. It is the "
                "dilation up to NATTEN 0.17 and the stride from 0.20 on: pass it by its name."
            )
        if embed_dim is not None and dim is not None:
            fail("dim", f"one of embed_dim and dim, two names of the width; embed_dim = {embed_dim}", dim)
        width = _positive("embed_dim", dim if embed_dim is None else embed_dim)
        num_heads = _positive("num_heads", num_heads)
        if width % num_heads:
            fail("embed_dim", f"a multiple of num_heads = {num_heads}", width)
        if stride is not None and any(s != 1 for s in check_positive_ints("stride", stride, self.rank)):
            fail(
                "stride",
                "1: no kernel strides",
                stride,
                "Strided neighborhood attention is NATTEN's >= 0.20.",
            )
        if not 0 <= attn_drop < 1:
            fail("attn_drop", "a probability in [0, 1)", attn_drop)
        self.embed_dim = width
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.kernel_size = check_positive_ints("kernel_size", kernel_size, self.rank)
        self.dilation = check_positive_ints("dilation", 1 if dilation is None else dilation, self.rank)
        self.is_causal = _flags("is_causal", is_causal, self.rank)
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        if rel_pos_bias if bias is None else bias:
            if any(self.is_causal):
                fail("rel_pos_bias", "False with is_causal: it is not defined for causal windows", True)
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != self.rank + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join("XY"[: self.rank])
            fail("x", f"shape [batch, {axes}, {self.embed_dim}], channels last", x)
        if self.attn_drop and self.training:
            raise NotImplementedError(
                f"{type(self).__name__}: attn_drop = {self.attn_drop} in training: the kernels have no dropout "
                "on the attention weights. Build it with attn_drop=0 (proj_drop and drop-path are supported)."
            )
        return self.proj_drop(
            attend(
                x,
                self.qkv,
                self.proj,
                self.rpb,
                num_heads=self.num_heads,
                kernel_size=self.kernel_size,
                dilation=self.dilation,
                is_causal=self.is_causal,
                scale=self.scale,
            )
        )

    def extra_repr(self) -> str:
        drop = f", attn_drop={self.attn_drop}" if self.attn_drop else ""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, "
            f"rel_pos_bias={self.rpb is not None}{drop}"
        )


def attend(
    x: torch.Tensor,
    qkv: nn.Module,
    proj: nn.Module,
    rpb: torch.Tensor | None,
    *,
    num_heads: int,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
    backend: str | None = None,
) -> torch.Tensor:
    """The layer from its parts: q, k and v are views of what `qkv` returns, read in place by the kernel."""
    packed = qkv(x)
    q, k, v = packed.unflatten(-1, (3, num_heads, packed.shape[-1] // (3 * num_heads))).unbind(-3)
    out = ops.neighborhood_attention(
        q,
        k,
        v,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rpb=rpb,
        backend=backend,
    )
    return proj(out.flatten(-2))


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        fail(name, "a positive int", value, kind=ValueError if type(value) is int else TypeError)
    return value


def _flags(name: str, value: Any, count: int) -> tuple[bool, ...]:
    flags = (bool(value),) * count if value is None or isinstance(value, bool) else value
    if not isinstance(flags, (tuple, list)) or len(flags) != count or any(type(f) is not bool for f in flags):
        raise TypeError(f"argument `{name}`: expected a bool, or {count} of them; got {describe(value)}.")
    return tuple(flags)


_ARGUMENTS = """
    The first three arguments may be positional; the rest is by name only, since the fourth positional of
    NATTEN's own modules changed its meaning between versions.

    Args:
        embed_dim: channels, a multiple of num_heads; `dim` is the old name.
        num_heads: number of heads.
        kernel_size: size of the neighborhood, one int or one a spatial axis, odd or even.
        stride: only 1.
        dilation: spacing of the neighbors, one int or one a spatial axis; None means 1.
        is_causal: whether a token sees only itself and those before it, for all axes or one a spatial axis.
        rel_pos_bias: learn a bias `rpb` [heads, 2 * kernel_size - 1, ...] by the offset between query and key.
            `bias` is the name it had up to NATTEN 0.15, where it was on by default; here it is off.
        qkv_bias: bias of the projection to queries, keys and values.
        qk_scale: factor on the logits; default head_dim ** -0.5.
        attn_drop: dropout on the attention weights. Accepted for inference; in training a rate above 0 raises.
        proj_drop: dropout on the output.

    Raises:
        TypeError: a fourth positional argument, or an argument of the wrong type.
        ValueError: bad or conflicting values; in forward, a map smaller than kernel_size * dilation.
        NotImplementedError: in forward, attn_drop > 0 in train mode.

    Papers: Neighborhood Attention Transformer (Hassani et al., CVPR 2023), Dilated Neighborhood Attention
    Transformer (Hassani and Shi, 2022).
"""


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = "Neighborhood attention on sequences `[batch, X, channels]`, to the same shape.\n" + _ARGUMENTS
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = "Neighborhood attention on maps `[batch, X, Y, channels]`, to the same shape.\n" + _ARGUMENTS
    rank = 2
