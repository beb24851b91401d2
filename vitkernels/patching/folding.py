"""Batch norms folded into their neighbours, and the activation behind them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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


class _Fold:
    """A folded weight and bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self.packable = False
        self.packed: dict[torch.Size, torch.Tensor] = {}  # by the shape of the input


class _Folds(Kept):
    """Those of all pairs of a layer."""

    def __init__(self, folds: list[_Fold]) -> None:
        self.folds = folds


class _Folded(Keeping):
    """Pairs of a batch norm and a convolution or linear layer, as one layer each while their norms are in eval mode."""

    def _vitkernels_folds(
        self: Any,
        pairs: Sequence[tuple[Any, Any]],
        fold: Callable[..., tuple[torch.Tensor, torch.Tensor]] = fold_conv_norm,
    ) -> list[_Fold]:
        """For each pair of a layer and its norm, as `fold` takes them, norm first or last."""
        layers, norms = zip(
            *(pair[::-1] if fold is fold_norm_linear else pair for pair in pairs), strict=True
        )
        sources: tuple[Any, ...] = sum(map(sources_of, layers, norms), ())
        if transformed() or (torch.is_grad_enabled() and requires_grad(sources)):
            return [_Fold(*fold(*pair)) for pair in pairs]
        dtypes = tuple(compute_dtype(layer._parameters["weight"]) for layer in layers)

        def make() -> _Folds:
            made = []
            for pair, layer, dtype in zip(pairs, layers, dtypes, strict=True):
                one = _Fold(*(tensor.to(dtype) for tensor in fold(*pair)))
                one.packable = isinstance(layer, nn.Conv2d) and packed.can_pack(layer, one.weight)
                made.append(one)
            return _Folds(made)

        return keep(self, sources, (dtypes, tuple(norm.eps for norm in norms)), make).folds


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
    return layers if len(layers) == 2 and _are_quiet(*layers) else None


def _are_quiet(conv: Any, norm: Any) -> bool:
    return not (_takes_part(conv) or _takes_part(norm)) and is_plain_conv(conv) and folds(conv, norm)


class FoldedConvNorm(_Folded):
    """Conv2d followed by a batch norm, and by an activation if one is given.

    For inference on the CPU in fp32 the map becomes channels-last, in which oneDNN is fastest, and the weight
    is packed once.
    """

    def forward(self: Any, x: torch.Tensor, act: nn.Module | None = None) -> torch.Tensor:
        pair = quiet_pair(self)
        if x.ndim != 4 or pair is None or _left_to_the_compiler():
            y = super().forward(x)  # type: ignore[misc]
            return y if act is None else act(y)
        (fold,) = self._vitkernels_folds([pair])
        return _convolve(pair[0], fold, x, act)


class FoldedChain(_Folded):
    """Layers one after the other, some of them Conv2d followed by a batch norm, as in FoldedConvNorm."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        layers = chain_of(self)
        if layers is None or not isinstance(x, torch.Tensor):
            return super().forward(x)  # type: ignore[misc]
        if not self.training and _wants_channels_last(layers, x):
            x = x.contiguous(memory_format=torch.channels_last)
        pairs = {place: pair for place, pair in enumerate(itertools.pairwise(layers)) if _are_quiet(*pair)}
        if not pairs or _left_to_the_compiler():
            return super().forward(x)  # type: ignore[misc]
        made = dict(zip(pairs, self._vitkernels_folds([*pairs.values()]), strict=True))
        place = 0
        while place < len(layers):
            if place not in pairs or x.ndim != 4:
                x = layers[place](x)
                place += 1
                continue
            act = layers[place + 2] if place + 2 < len(layers) and rides(layers[place + 2]) else None
            x = _convolve(layers[place], made[place], x, act)
            place += 2 if act is None else 3
        return x


def _wants_channels_last(layers: Sequence[nn.Module], x: torch.Tensor) -> bool:
    """Whether the map should become channels-last although it is on a GPU: for inference in half precision through a
    depthwise convolution. Of NCHW maps PyTorch runs those without cuDNN (7 x 7 on an H200 took 1.3 ms where memory
    would take 0.04), and cuDNN turns the maps of others around and back.
    """
    return (
        x.is_cuda
        and x.ndim == 4
        and compute_dtype(x) in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers)
    )


def _left_to_the_compiler() -> bool:
    """Whether torch.compile traces: it computes norms with what follows them, where it would make a fold in every
    call.
    """
    return torch.compiler.is_compiling()


# Modules other than sequences that run these children in this order, and nothing else: those of MedViTV2, of the
# networks that it took them from, and of LeViT.
_CHAINS = {
    "ConvNorm": ("linear", "bn"),
    "ConvBNReLU": ("conv", "norm", "act"),
    "PatchEmbed": ("avgpool", "conv", "norm"),
    "MHCA": ("group_conv3x3", "norm", "act", "projection"),
}


def chain_of(module: Any) -> tuple[Any, ...] | None:
    """The layers that a module runs one after the other; None where it does something else."""
    cls = module.vitkernels_original if isinstance(module, Patched) else type(module)
    children = module._modules
    if cls.forward is nn.Sequential.forward:
        return tuple(children.values())
    names = _CHAINS.get(cls.__name__, ())
    return tuple(children[name] for name in names) if names and children.keys() == set(names) else None


def _convolve(conv: nn.Conv2d, fold: _Fold, x: torch.Tensor, act: nn.Module | None) -> torch.Tensor:
    # A fold that is traced, transformed or watched is never packable: a FLOP counter knows aten's convolution, not
    # oneDNN's.
    if fold.packable and _is_inference(x):
        x = x.contiguous(memory_format=torch.channels_last)
        if packed.pays(conv, x):
            weight = fold.packed.get(x.shape)
            if weight is None:
                weight = _pack(conv, fold, x)
            return packed.convolve(conv, x, weight, fold.bias, act)
    if _is_product(conv, x):
        y = F.linear(x.permute(0, 2, 3, 1), fold.weight.flatten(1), fold.bias).permute(0, 3, 1, 2)
    else:
        y = conv._conv_forward(x, fold.weight, fold.bias)
    return y if act is None else act(y)


def _is_product(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a convolution on a GPU is to be a matrix product, which adds the bias itself: after cuDNN's convolution
    PyTorch adds it in a pass over the map, and there is a bias now that the norm is folded.
    """
    return x.is_cuda and is_pointwise(conv) and x.is_contiguous(memory_format=torch.channels_last)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution maps each pixel by itself, all channels together."""
    return (
        conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    )


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
        (fold,) = self._vitkernels_folds([(norm, linear)], fold_norm_linear)
        return F.linear(x, fold.weight, fold.bias)


class FoldedLinearNorm(_Folded):
    """Linear followed by a batch norm over all tokens of all sequences, as LeViT has it."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        pair = tuple(self._modules.values())
        quiet = x.ndim == 3 and len(pair) == 2 and not any(map(_takes_part, pair))
        if not quiet or _left_to_the_compiler():
            return super().forward(x)  # type: ignore[misc]
        linear, norm = pair
        if type(linear).forward is not nn.Linear.forward or not folds(linear, norm):
            return super().forward(x)  # type: ignore[misc]
        if x.is_cpu and x.shape[0] * x.shape[1] < linear.in_features:
            return super().forward(x)  # type: ignore[misc]  # to see whether the weight has changed costs more
        (fold,) = self._vitkernels_folds([(linear, norm)])
        return F.linear(x, fold.weight, fold.bias)

    @staticmethod
    def vitkernels_trial_shape(module: Any) -> tuple[int, ...]:
        """An input of the proof."""
        linear, _ = module.children()
        return 2, 5, linear.in_features


def rides(act: Any) -> bool:
    """Whether it is an activation that a convolution can take along, and that nobody listens to."""
    return type(act) in packed.ACTIVATIONS and not has_hooks(act)


def with_act(conv: Any, act: Any, x: torch.Tensor) -> torch.Tensor:
    """act(conv(x)), in one call where the activation can ride on the convolution."""
    if rides(act) and isinstance(conv, FoldedConvNorm) and not has_hooks(conv):  # type: ignore[arg-type]
        return conv(x, act)  # type: ignore[operator]
    return act(conv(x))


class FusedFFN(Patched):
    """Two pointwise convolutions with a ReLU between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(with_act(self.pw1, self.act, x))


class FusedPatchMerging(Patched):
    """The inverted bottleneck between EfficientViT's stages."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = with_act(self.conv2, self.act, with_act(self.conv1, self.act, x))
        return self.conv3(self.se(x))
