"""Batch norms folded into their neighbours, and the ReLU behind them, for `apply(model, fold_bn=True)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from vitkernels.nn.conv_norm import fold_conv_norm, fold_norm_linear
from vitkernels.patching import packed
from vitkernels.patching.layers import KEPT, Patched


class _Fold:
    """A folded weight and bias, and the state of what they were made from."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self.packable = False
        self.packed: torch.Tensor | None = None
        self.state: list[float] = []
        self.aliases: list[torch.Tensor] = []

    def remember(self, sources: list[torch.Tensor], eps: float) -> bool:
        """Notes the state of the sources; False where it cannot be told when they change."""
        try:
            self.state = _state(sources, eps)
        except RuntimeError:  # no version counter or no storage: inference, fake and functorch tensors
            return False
        # While these are held no other tensor can come to lie at an address in `state`.
        self.aliases = [source.detach() for source in sources]
        return True

    def is_current(self, sources: list[torch.Tensor], eps: float) -> bool:
        try:
            return self.state == _state(sources, eps)
        except RuntimeError:
            return False


def _state(sources: list[torch.Tensor], eps: float) -> list[float]:
    return [eps, *(number for source in sources for number in (source.data_ptr(), source._version))]


def _transformed() -> bool:
    """Whether a fold belongs to this call alone: it is traced, batched or carries tangents."""
    return (
        torch.compiler.is_compiling()
        or _tracing_state() is not None
        or _functorch_active()
        or forward_ad._current_level >= 0
    )


_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


class _Folded(Patched):
    """A pair of a batch norm and a convolution or linear layer, as one layer while the norm is in eval mode.

    The folded weight is kept until one of its sources changes. Autograd's version counters tell, except for
    edits through `.data`; leaving train mode, `.to()` and the like drop it in any case.
    """

    def _vitkernels_fold(
        self: Any, layer: nn.Module, norm: Any, fold: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ) -> _Fold:
        first, second = (norm, layer) if fold is fold_norm_linear else (layer, norm)
        if _transformed():
            return _Fold(*fold(first, second))
        tensors, norms, buffers = layer._parameters, norm._parameters, norm._buffers
        sources = [
            tensor
            for tensor in (
                *(tensors["weight"], tensors["bias"], norms["weight"], norms["bias"]),
                *(buffers["running_mean"], buffers["running_var"]),
            )
            if tensor is not None
        ]
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return _Fold(*fold(first, second))
        dtype = _compute_dtype(sources[0])
        kept = self.__dict__.get(KEPT)
        if kept is not None and kept.weight.dtype is dtype and kept.is_current(sources, norm.eps):
            return kept
        with torch.inference_mode(False), torch.no_grad():
            kept = _Fold(*(tensor.to(dtype) for tensor in fold(first, second)))
        # What is made during the capture of a CUDA graph lives in the graph's memory, not beyond it.
        capturing = kept.weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and kept.remember(sources, norm.eps):
            kept.packable = isinstance(layer, nn.Conv2d) and packed.can_pack(layer, kept.weight)
            self.__dict__[KEPT] = kept
        return kept

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__.pop(KEPT, None)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(KEPT, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the layer will run: autocast's where it is on."""
    kind = weight.device.type
    if weight.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _takes_part(module: nn.Module) -> bool:
    """Whether a child must be called itself: it is training, or somebody listens."""
    return module.training or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


class FoldedConvNorm(_Folded):
    """Conv2d followed by a batch norm.

    For inference on the CPU in fp32 the map becomes channels-last, in which oneDNN is fastest, and the weight
    is packed once.
    """

    def forward(self: Any, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        conv, norm = self._modules.values()
        if x.ndim != 4 or _takes_part(conv) or _takes_part(norm):
            y = super().forward(x)  # type: ignore[misc]
            return torch.relu(y) if relu else y
        fold = self._vitkernels_fold(conv, norm, fold_conv_norm)
        # Dispatch modes, as a FLOP counter, know aten's convolution, not oneDNN's. A fold that is traced or
        # transformed is never packable, and a profile must show what runs without it.
        if fold.packable and not _dispatch_modes() and _is_inference(x):
            x = x.contiguous(memory_format=torch.channels_last)
            if packed.pays(conv, x):
                if fold.packed is None:
                    with torch.inference_mode(False), torch.no_grad():
                        fold.packed = packed.pack(conv, fold.weight, x)
                return packed.convolve(conv, x, fold.packed, fold.bias, relu)
        y = conv._conv_forward(x, fold.weight, fold.bias)
        return torch.relu(y) if relu else y


def _is_inference(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())


class FoldedNormLinear(_Folded):
    """A batch norm followed by Linear, perhaps with a dropout between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        norm, *_, linear = children = tuple(self._modules.values())
        # Of more dimensions batch norm normalises the second, Linear maps the last.
        if x.ndim != 2 or any(_takes_part(child) for child in children):
            return super().forward(x)  # type: ignore[misc]
        fold = self._vitkernels_fold(linear, norm, fold_norm_linear)
        return F.linear(x, fold.weight, fold.bias)


def _with_relu(conv: Any, act: Any, x: torch.Tensor) -> torch.Tensor:
    """act(conv(x)), in one call where the ReLU can ride on the convolution."""
    fused = type(act) is nn.ReLU and "forward" not in act.__dict__ and isinstance(conv, FoldedConvNorm)
    if fused and not (_has_hooks(act) or _has_hooks(conv)):
        return conv(x, relu=True)
    return act(conv(x))


class FusedSequence(Patched):
    """A plain sequence in which ReLUs follow folded convolutions, as EfficientViT's stem."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        children = [*self._modules.values(), None]
        position = 0
        while (child := children[position]) is not None:
            after = children[position + 1]
            if isinstance(child, FoldedConvNorm) and type(after) is nn.ReLU:
                x = _with_relu(child, after, x)
                position += 2
            else:
                x = child(x)
                position += 1
        return x


class FusedFFN(Patched):
    """Two pointwise convolutions with a ReLU between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(_with_relu(self.pw1, self.act, x))


class FusedPatchMerging(Patched):
    """The inverted bottleneck between EfficientViT's stages."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = _with_relu(self.conv2, self.act, _with_relu(self.conv1, self.act, x))
        return self.conv3(self.se(x))
