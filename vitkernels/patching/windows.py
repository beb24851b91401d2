"""Attention with a table of relative biases: TinyViT's and LeViT's windows and maps, Swin's windows, for `apply`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vitkernels import ops
from vitkernels.nn.conv_norm import has_hooks
from vitkernels.patching.layers import Patched


class AbsoluteBias(Patched):
    """TinyViT's and LeViT's attention through `ops.window_attention`: the bias is looked up in the kernel."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if (norm := self._modules.get("norm")) is not None:
            x = norm(x)
        packed = self.qkv(x)
        # In LeViT of convolutions channels come first.
        map_size = packed.shape[2:] if packed.ndim == 4 else None
        if map_size is not None:
            packed = packed.flatten(2).mT
        out = _attend(self, packed.unflatten(-1, (self.num_heads, -1)))
        out = out.transpose(1, 2).flatten(2)
        return self.proj(out if map_size is None else out.mT.unflatten(2, map_size))

    @staticmethod
    def vitkernels_trial_inputs(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Inputs of the proof: of a module whose convolutions or linear layers tell the channels."""
        first = next(m for m in module.qkv.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        size = window_of(module)
        if isinstance(first, nn.Conv2d):
            return (torch.randn(2, first.in_channels, *size, generator=generator, dtype=torch.float32),)
        shape = (2, math.prod(size), first.in_features)
        return (torch.randn(shape, generator=generator, dtype=torch.float32),)


def _attend(module: Any, packed: torch.Tensor) -> torch.Tensor:
    """Of queries, keys and values side by side, [batch, tokens, heads, channels]."""
    key_dim = module.key_dim
    q, k, v = packed.transpose(1, 2).split([key_dim, key_dim, packed.shape[-1] - 2 * key_dim], dim=-1)
    return ops.window_attention(
        q,
        k,
        v,
        bias_table=module.attention_biases,
        window=window_of(module),
        scale=module.scale,
        backend=module.vitkernels_backend,
    )


def has_absolute_bias(module: nn.Module) -> bool:
    """Whether it has the parameters of an attention of TinyViT or LeViT, one of half the tokens aside."""
    return "attention_biases" in module._parameters and {"qkv", "proj"} <= module._modules.keys()


def why_not_absolute_bias(module: Any) -> str:
    """Why the operator cannot compute this layer, as far as its attributes tell."""
    if missing := [name for name in ("num_heads", "key_dim", "scale") if not hasattr(module, name)]:
        return f"has no attribute {', '.join(missing)}"
    table = module.attention_biases
    if table.ndim != 2 or len(table) != module.num_heads or math.prod(window_of(module)) != table.shape[1]:
        return "attention_biases is not a table [heads, tokens of the window]"
    return ""


def window_of(module: Any) -> tuple[int, int]:
    """The sides of the window, from its own attribute or from the table, then square."""
    size = getattr(module, "resolution", None)
    if size is None:
        size = math.isqrt(module.attention_biases.shape[1])
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class SignedBias(Patched):
    """Swin's window attention through `ops.window_attention`: the bias is looked up in the kernel.

    The layer's own forward runs where the operator has no answer: in shifted windows, which have a mask, in training
    with dropout on the attention weights, and for who listens to those.
    """

    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        inner = (self._modules.get("softmax"), self.attn_drop)
        watched = any(layer is not None and has_hooks(layer) for layer in inner)
        if mask is not None or watched or (self.training and self.attn_drop.p > 0):
            return super().forward(x, mask)  # type: ignore[misc]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Any = ops.window_attention(
            q,
            k,
            v,
            bias_table=self.relative_position_bias_table.t(),
            bias_index="signed",
            window=tuple(self.window_size),
            scale=self.scale,
            backend=self.vitkernels_backend,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    @staticmethod
    def vitkernels_trial_inputs(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Inputs of the proof: windows without a mask."""
        shape = (3, math.prod(module.window_size), module.qkv.in_features)
        return (torch.randn(shape, generator=generator, dtype=torch.float32),)


def has_signed_bias(module: nn.Module) -> bool:
    """Whether it has the parameters of Swin's window attention."""
    return "relative_position_bias_table" in module._parameters and {"qkv", "proj"} <= module._modules.keys()


def why_not_signed_bias(module: Any) -> str:
    """Why the operator cannot compute this layer, as far as its attributes tell."""
    needed = ("window_size", "num_heads", "scale", "attn_drop", "proj_drop")
    if missing := [name for name in needed if not hasattr(module, name)]:
        return f"has no attribute {', '.join(missing)}"
    size = module.window_size
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        return f"its window is not one of two sides: {size}"
    if type(module.attn_drop) is not nn.Dropout:
        return "attn_drop is not a Dropout"
    entries = (2 * size[0] - 1) * (2 * size[1] - 1)
    if tuple(module.relative_position_bias_table.shape) != (entries, module.num_heads):
        return "relative_position_bias_table is not a table [(2 Wh - 1) (2 Ww - 1), heads]"
    return ""
