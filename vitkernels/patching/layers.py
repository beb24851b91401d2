"""The forwards that `apply` gives to a model's layers.

A layer is patched by changing the class of the instance to a subclass of its own class, made here:
parameters, children, hooks and `state_dict` stay as they are, `isinstance` holds, and, unlike with a forward
stored on the instance, a copy made by deepcopy, pickle or DataParallel runs on its own parameters.
"""

from __future__ import annotations

import copy
import copyreg
import types
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from vitkernels.nn.cascaded_group_attention import bias_side, in_windows, mix
from vitkernels.nn.conv_norm import has_hooks
from vitkernels.nn.kept import KEPT, drop


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
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, state, *rest = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (make, arguments, state, *rest)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != KEPT}
        made_of = (self.vitkernels_original, self.vitkernels_mixin, self.vitkernels_backend)
        return (_rebuild, (*made_of, *arguments[1:]), state, *rest)


def _rebuild(original: type, mixin: type[Patched], backend: str | None, *arguments: Any) -> Any:
    cls = patched_class(original, mixin, backend)
    return cls.__new__(cls, *arguments)


_classes: dict[tuple[type, type, str | None], type] = {}


def patched_class(original: type[nn.Module], mixin: type[Patched], backend: str | None) -> type:
    """The subclass of `original` whose forward is the mixin's; the same one every time."""
    made_of = (original, mixin, backend)
    if made_of in _classes:
        return _classes[made_of]

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            vitkernels_original=original,
            vitkernels_mixin=mixin,
            vitkernels_backend=backend,
        )

    return _classes.setdefault(made_of, types.new_class(original.__name__, (mixin, original), exec_body=body))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module a class; below the one that a parametrization has made of its patched class since."""
    made = type(module)
    if isinstance(module, Patched) and "vitkernels_mixin" not in vars(made):
        bases = tuple(cls if issubclass(base, Patched) else base for base in made.__bases__)
        own = {name: value for name, value in vars(made).items() if name not in ("__dict__", "__weakref__")}
        cls = type(made.__name__, bases, own)
    module.__class__ = cls


def why_no_values(module: nn.Module) -> str:
    """Why there are no values to try a layer on; empty where there are."""
    tensors = (*module.parameters(), *module.buffers())
    # A deep copy of fake tensors may crash the process (torch 2.13).
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        return "its parameters are on the meta device or fake; apply after loading them"
    return ""


def trial_copy(module: nn.Module) -> Any:
    """A deep copy to try a layer on: without hooks, which are not for its caller's eyes, and without the graphs of what
    the layer kept of an earlier call, which refuse to be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    trial = copy.deepcopy(module, memo)
    for part in trial.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return trial


_OF_ANY_MODULE = vars(nn.Module()).keys()


def signature_of(module: nn.Module) -> tuple[Any, ...]:
    """What a layer computes, as far as types, shapes and settings tell: of layers that agree in it one is tried."""

    def told(value: Any) -> Any:
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else repr(value)

    entries: list[Any] = []
    for name, part in module.named_modules():
        entries += (name, type(part))
        for values in (part._parameters, part._buffers, vars(part)):
            entries += ((key, told(value)) for key, value in values.items() if key not in _OF_ANY_MODULE)
    return tuple(entries)


class Keeping(Patched):
    """A layer that keeps tensors derived from its parameters; `train()`, `.to()` and the like drop them."""

    def train(self: Any, mode: bool = True) -> Any:
        drop(self)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        drop(self)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


class WindowedCascade(Keeping):
    """Cascaded group attention through `ops.cascaded_group_attention`, with live batch norms head by head."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return mix(self, x, backend=self.vitkernels_backend)


def runs_as(module: Any, mixin: type[Patched]) -> bool:
    """Whether a module's forward is the mixin's."""
    return isinstance(module, mixin)


class WindowPartition(Patched):
    """Window partition, padding and reverse, which the mixer in it does itself."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        if runs_as(attn, WindowedCascade) and not has_hooks(attn):
            return attn(x)
        return in_windows(x, bias_side(attn.attention_biases), attn)
