"""Batch norms folded into their neighbours, and the ReLU behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.nn.conv_norm import fold_conv_norm, fold_norm_linear, folds, has_hooks, is_plain_conv
from vitkernels.nn.kept import Kept, compute_dtype, keep, transformed
from vitkernels.patching import packed
from vitkernels.patching.layers import Keeping, Patched

_NOTHING_IN_EVAL_MODE = (nn.Dropout.forward, nn.Identity.forward)
_MOST_SHAPES = 3  # of inputs for which a weight stays packed


class _Fold(Kept):
    """A folded weight and bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self.packable = False
        self.packed: dict[torch.Size, torch.Tensor] = {}  # by the shape of the input


class _Folded(Keeping):
    """A pair of a batch norm and a convolution or linear layer, as one layer while the norm is in eval mode."""

    def _vitkernels_fold(
        self: Any, layer: nn.Module, norm: Any, fold: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ) -> _Fold:
        first, second = (norm, layer) if fold is fold_norm_linear else (layer, norm)
        sources = sources_of(layer, norm)
        if transformed() or (torch.is_grad_enabled() and requires_grad(sources)):
            return _Fold(*fold(first, second))
        dtype = compute_dtype(sources[0])

        def make() -> _Fold:
            kept = _Fold(*(tensor.to(dtype) for tensor in fold(first, second)))
            kept.packable = isinstance(layer, nn.Conv2d) and packed.can_pack(layer, kept.weight)
            return kept

        return keep(self, sources, (dtype, norm.eps), make)


def sources_of(layer: Any, norm: Any) -> tuple[Any, ...]:
    """Everything that a fold of the two follows from, but for the norm's eps; absent ones are None."""
    tensors, norms, statistics = layer._parameters, norm._parameters, norm._buffers
    return (
        *(tensors["weight"], tensors["bias"], norms["weight"], norms["bias"]),
        *(statistics["running_mean"], statistics["running_var"]),
    )


def requires_grad(sources: tuple[Any, ...]) -> bool:
    return any(source is not None and source.requires_grad for source in sources)


def _takes_part(module: nn.Module) -> bool:
    """Whether a child must be called itself: it is training, or somebody listens."""
    return module.training or has_hooks(module)


def quiet_pair(pair: nn.Module) -> tuple[Any, Any] | None:
    """(convolution, batch norm) of a pair that folds and that nobody listens to, else None."""
    layers = tuple(pair._modules.values())
    if len(layers) != 2:
        return None
    conv, norm = layers
    if _takes_part(conv) or _takes_part(norm) or not (is_plain_conv(conv) and folds(conv, norm)):  # type: ignore[arg-type]
        return None
    return conv, norm


class FoldedConvNorm(_Folded):
    """Conv2d followed by a batch norm.

    For inference on the CPU in fp32 the map becomes channels-last, in which oneDNN is fastest, and the weight
    is packed once.
    """

    def forward(self: Any, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        pair = quiet_pair(self)
        if x.ndim != 4 or pair is None:
            y = super().forward(x)  # type: ignore[misc]
            return torch.relu(y) if relu else y
        conv, norm = pair
        fold = self._vitkernels_fold(conv, norm, fold_conv_norm)
        # A fold that is traced, transformed or watched is never packable: a FLOP counter knows aten's convolution,
        # not oneDNN's.
        if fold.packable and _is_inference(x):
            x = x.contiguous(memory_format=torch.channels_last)
            if packed.pays(conv, x):
                weight = fold.packed.get(x.shape)
                if weight is None:
                    weight = _pack(conv, fold, x)
                return packed.convolve(conv, x, weight, fold.bias, relu)
        y = conv._conv_forward(x, fold.weight, fold.bias)
        return torch.relu(y) if relu else y


def _pack(conv: nn.Conv2d, fold: _Fold, x: torch.Tensor) -> torch.Tensor:
    """Packs for inputs like x: a layout made for a batch of 1 was measured to take 4 times as long at 16."""
    if len(fold.packed) >= _MOST_SHAPES:
        fold.packed.clear()
    with torch.inference_mode(False), torch.no_grad():
        weight = fold.packed[x.shape] = packed.pack(conv, fold.weight, x)
    return weight


def _is_inference(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())


class FoldedNormLinear(_Folded):
    """A batch norm followed by Linear, perhaps with a dropout between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        children = tuple(self._modules.values())
        # Of more dimensions batch norm normalises the second, Linear maps the last. A slice may lack one of the two.
        if x.ndim != 2 or len(children) < 2 or any(_takes_part(child) for child in children):
            return super().forward(x)  # type: ignore[misc]
        norm, *between, linear = children
        if not (
            type(linear).forward is nn.Linear.forward
            and folds(linear, norm)
            and all(type(layer).forward in _NOTHING_IN_EVAL_MODE for layer in between)
        ):
            return super().forward(x)  # type: ignore[misc]
        fold = self._vitkernels_fold(linear, norm, fold_norm_linear)
        return F.linear(x, fold.weight, fold.bias)


def with_relu(conv: Any, act: Any, x: torch.Tensor) -> torch.Tensor:
    """act(conv(x)), in one call where the ReLU can ride on the convolution."""
    fused = type(act) is nn.ReLU and "forward" not in act.__dict__ and isinstance(conv, FoldedConvNorm)
    if fused and not (has_hooks(act) or has_hooks(conv)):
        return conv(x, relu=True)
    return act(conv(x))


class FusedFFN(Patched):
    """Two pointwise convolutions with a ReLU between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(with_relu(self.pw1, self.act, x))


class FusedPatchMerging(Patched):
    """The inverted bottleneck between EfficientViT's stages."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = with_relu(self.conv2, self.act, with_relu(self.conv1, self.act, x))
        return self.conv3(self.se(x))
