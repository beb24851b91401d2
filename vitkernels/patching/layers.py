"""The forwards that `apply` gives to a model's layers.

A layer is patched by changing the class of the instance to a subclass of its own class, made here: parameters,
children, hooks and `state_dict` stay as they are, `isinstance` holds, and, unlike with a forward stored on the
instance, a copy made by deepcopy, pickle or DataParallel runs on its own parameters.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.nn.cascaded_group_attention import bias_side, cascade, in_windows
from vitkernels.nn.conv_norm import fold_conv_norm, fold_norm_linear

_FOLD = "_vitkernels_fold"


class Patched:
    """Mixin of every patched class.

    Attributes:
        vitkernels_original: the class the module had.
        vitkernels_mixin: the mixin that replaced its forward.
        vitkernels_backend: the backend forced for it, or None.
    """

    vitkernels_original: type[nn.Module]
    vitkernels_mixin: type[Patched]
    vitkernels_backend: str | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The patched class cannot be imported by name, so a copy is made from what it was made of.
        make, arguments, state, *rest = super().__reduce_ex__(max(protocol, 2))
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (make, arguments, state, *rest)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != _FOLD}
        made_of = (self.vitkernels_original, self.vitkernels_mixin, self.vitkernels_backend)
        return (_rebuild, (*made_of, *arguments[1:]), state, *rest)


def _rebuild(original: type, mixin: type[Patched], backend: str | None, *arguments: Any) -> Any:
    cls = patched_class(original, mixin, backend)
    return cls.__new__(cls, *arguments)


@functools.cache
def patched_class(original: type[nn.Module], mixin: type[Patched], backend: str | None) -> type:
    """The subclass of `original` whose forward is the mixin's."""

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            vitkernels_original=original,
            vitkernels_mixin=mixin,
            vitkernels_backend=backend,
        )

    return types.new_class(original.__name__, (mixin, original), exec_body=body)


class WindowedCascade(Patched):
    """Cascaded group attention through `ops.window_attention`."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return in_windows(x, bias_side(self.attention_biases), self._vitkernels_mix)

    def _vitkernels_mix(self: Any, x: torch.Tensor) -> torch.Tensor:
        return cascade(
            x,
            self.qkvs,
            self.dws,
            self.proj,
            self.attention_biases,
            key_dim=self.key_dim,
            scale=self.scale,
            backend=self.vitkernels_backend,
        )


class WindowPartition(Patched):
    """Window partition, padding and reverse in the map's own memory format."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return in_windows(x, bias_side(self.attn.attention_biases), self.attn)


class _Folded(Patched):
    """A pair of a batch norm and a convolution or linear layer, as one layer while the norm is in eval mode.

    The folded weight is kept until one of its sources changes. Autograd's version counters tell, except for
    edits through `.data`; leaving train mode, `.to()` and the like drop it in any case.
    """

    def _vitkernels_folded(
        self: Any, layer: nn.Conv2d | nn.Linear, norm: nn.Module, fold: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        if torch.compiler.is_compiling():
            return fold()
        sources = [
            tensor
            for tensor in (*layer._parameters.values(), *norm._parameters.values(), *norm._buffers.values())
            if tensor is not None
        ]
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return fold()
        dtype = _compute_dtype(layer.weight)
        cached = self.__dict__.get(_FOLD)
        if cached is not None and cached.dtype is dtype and cached.is_current(sources):
            return cached.folded
        with torch.inference_mode(False), torch.no_grad():
            folded = tuple(tensor.to(dtype) for tensor in fold())
        try:
            self.__dict__[_FOLD] = _Cached(folded, dtype, sources)
        except RuntimeError:  # no version counter or no storage: inference, fake and functorch tensors
            self.__dict__.pop(_FOLD, None)
        return folded

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__.pop(_FOLD, None)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(_FOLD, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


class _Cached:
    """Folded tensors and the state of the tensors they were made from."""

    def __init__(
        self, folded: tuple[torch.Tensor, ...], dtype: torch.dtype, sources: list[torch.Tensor]
    ) -> None:
        self.folded = folded
        self.dtype = dtype
        self.versions = [(source.data_ptr(), source._version) for source in sources]
        # While these are held no other tensor can come to lie at an address in `versions`.
        self.aliases = [source.detach() for source in sources]

    def is_current(self, sources: list[torch.Tensor]) -> bool:
        try:
            return self.versions == [(source.data_ptr(), source._version) for source in sources]
        except RuntimeError:
            return False


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the layer will run: autocast's where it is on."""
    kind = weight.device.type
    if weight.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _takes_part(module: nn.Module) -> bool:
    """Whether a child must be called itself: it is training, or somebody listens."""
    return bool(module.training or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class FoldedConvNorm(_Folded):
    """Conv2d followed by a batch norm."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        conv, norm = self._modules.values()
        if _takes_part(conv) or _takes_part(norm):
            return super().forward(x)  # type: ignore[misc]
        weight, bias = self._vitkernels_folded(conv, norm, lambda: fold_conv_norm(conv, norm))
        return conv._conv_forward(x, weight, bias)


class FoldedNormLinear(_Folded):
    """A batch norm followed by Linear, perhaps with a dropout between."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        norm, *_, linear = children = tuple(self._modules.values())
        if any(_takes_part(child) for child in children):
            return super().forward(x)  # type: ignore[misc]
        weight, bias = self._vitkernels_folded(linear, norm, lambda: fold_norm_linear(norm, linear))
        return F.linear(x, weight, bias)
