"""Neighborhood attention of NATTEN, all versions, and of copies of it, for `apply`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkernels.nn.neighborhood_attention import attend
from vitkernels.patching.layers import Patched

_RANKS = {
    "NeighborhoodAttention1D": 1,
    "NeighborhoodAttention2D": 2,
    "NeighborhoodAttention3D": 3,
    "NeighborhoodAttention": 2,  # before NATTEN was a package
}


class Neighborhood(Patched):
    """Neighborhood attention through `ops.neighborhood_attention`.

    The layer's own forward runs where the operator has no answer: in training with dropout on the attention
    weights, and on maps smaller than kernel_size * dilation, which NATTEN up to 0.14 pads and later ones refuse.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        kernel_size, dilation, is_causal, drop = _options(self)
        small = any(n < k * d for n, k, d in zip(x.shape[1:-1], kernel_size, dilation, strict=False))
        if small or x.ndim != len(kernel_size) + 2 or (drop and self.training):
            return super().forward(x)  # type: ignore[misc]
        out = attend(
            x,
            self.qkv,
            self.proj,
            getattr(self, "rpb", None),
            num_heads=self.num_heads,
            kernel_size=kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            scale=self.scale,
            backend=self.vitkernels_backend,
        )
        return self.proj_drop(out)

    @staticmethod
    def vitkernels_trial_shape(module: Any) -> tuple[int, ...]:
        """An input of the proof: maps that are no multiples of the dilation, with inner and border windows."""
        kernel_size, dilation, _, _ = _options(module)
        sides = ((k + 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
        return 1, *sides, module.qkv.in_features


def rank_of(module: nn.Module) -> int:
    """Number of axes of the map of a neighborhood attention layer; 0 for any other layer."""
    return next((_RANKS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _RANKS), 0)


def why_not_neighborhood(module: Any) -> str:
    """Why the operator cannot compute this layer, as far as its attributes tell."""
    rank = rank_of(module)
    if rank > 2:
        return "three-dimensional neighborhoods have no kernel"
    needed = ("qkv", "proj", "proj_drop", "num_heads", "kernel_size", "scale")
    if missing := [name for name in needed if not hasattr(module, name)]:
        return f"has no attribute {', '.join(missing)}"
    if type(module.qkv) is not nn.Linear or module.qkv.out_features != 3 * module.qkv.in_features:
        return "qkv is not one Linear to queries, keys and values"
    kernel_size, _, is_causal, _ = _options(module)
    if any(step != 1 for step in _per_axis(getattr(module, "stride", 1), rank, 1)):
        return f"stride = {module.stride} has no kernel"
    rpb = getattr(module, "rpb", None)
    if rpb is None:
        return ""
    if tuple(rpb.shape) != (module.num_heads, *(2 * size - 1 for size in kernel_size)):
        return "rpb is not a table [heads, 2 * kernel_size - 1, ...]"
    return "a relative position bias on causal axes is not defined" if any(is_causal) else ""


def _options(module: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...], float]:
    """kernel_size, dilation and is_causal, one value an axis, and the rate of dropout on the attention weights."""
    rank = rank_of(module)
    drop = getattr(module, "attn_drop", 0.0)
    return (
        _per_axis(module.kernel_size, rank, 1),
        _per_axis(getattr(module, "dilation", 1), rank, 1),
        _per_axis(getattr(module, "is_causal", False), rank, False),
        float(drop.p if isinstance(drop, nn.Dropout) else drop),
    )


def _per_axis(value: Any, rank: int, default: Any) -> tuple[Any, ...]:
    value = default if value is None else value
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
