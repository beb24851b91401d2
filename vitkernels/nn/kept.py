"""Tensors derived from a module's parameters, kept until one of those changes.

In the memory of the CPU a change is told by the contents: every use takes a fingerprint of the sources, which costs
less than reading them for the work itself and sees every edit, also one through `.data`, numpy or another process.
Elsewhere, and without the compiled extension, addresses and autograd's version counters have to do; they miss edits
in place through `.data`. Weights on the CPU whose contents cannot be read (views with gaps, tensor subclasses) are
derived from anew in every call.

A CUDA graph reads what was kept when it was captured, which therefore stays as long as its module: a change of the
weights shows in the graph once it is captured again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

from vitkernels.core import native
from vitkernels.core.checks import autocasts

# The one entry that a module may have in its __dict__ for this; copies and pickles do without.
KEPT = "_vitkernels_kept"


class Kept:
    """What is kept; made by a subclass.

    Attributes:
        key: the state of the sources it was made from.
        aliases: of the sources, where the key holds addresses: while these are held, no other tensor can come to
            lie at one of them.
        stream: on a GPU, the one that it was made on, by its address.
        ready: what other streams wait for.
    """

    key: object = None
    aliases: tuple[torch.Tensor, ...] = ()
    stream: int = 0
    ready: torch.cuda.Event | None = None


K = TypeVar("K", bound=Kept)


def keep(
    owner: nn.Module, sources: Sequence[torch.Tensor | None], options: tuple[Any, ...], make: Callable[[], K]
) -> K:
    """What make() returns, kept on `owner` until a source or an option changes. Not for traced calls."""
    contents = _fingerprint(sources)
    kept: K | None = owner.__dict__.get(KEPT)
    key: object = None  # nothing is kept of what cannot be told to have changed
    if contents is not None:
        key = options, contents
    elif _native_fingerprint is None or not _on_cpu(sources):
        # RuntimeError: no version counter or no storage, as inference, fake and functorch tensors.
        with contextlib.suppress(RuntimeError):
            key = options, _state(sources)
    if kept is not None and key is not None and kept.key == key:
        if kept.ready is not None:  # on a GPU
            _before_use(owner, kept, kept.ready, sources)
        return kept
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    # What is made during the capture of a CUDA graph lives in the graph's memory, not beyond it.
    if key is not None and not _capturing(sources):
        made.key = key
        if contents is None:
            made.aliases = tuple(source.detach() for source in sources if source is not None)
        if (first := _first(sources)).is_cuda:
            stream = torch.cuda.current_stream(first.device)
            made.stream, made.ready = stream.cuda_stream, stream.record_event()
        owner.__dict__[KEPT] = made
    return made


def drop(owner: nn.Module) -> None:
    """Forgets what is kept, which also frees its memory."""
    owner.__dict__.pop(KEPT, None)


def transformed() -> bool:
    """Whether a call's derived tensors belong to it alone: it is traced, watched, batched or carries tangents."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _tracing_state() is not None
        or _functorch_active()
        or forward_ad._current_level >= 0
    )


def _fingerprint(sources: Sequence[torch.Tensor | None]) -> bytes | None:
    if _native_fingerprint is None:
        return None
    if native.lends:
        return _native_fingerprint(tuple(sources))
    if not _on_cpu(sources):
        return None
    return _native_fingerprint(native.arguments(native.load(), *sources))


def _on_cpu(sources: Sequence[torch.Tensor | None]) -> bool:
    return all(
        source is None or (source.device.type == "cpu" and source.layout is torch.strided)
        for source in sources
    )


def _state(sources: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    return tuple(
        None if source is None else (source.data_ptr(), source._version, source.dtype, source.stride())
        for source in sources
    )


def _first(sources: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return next(source for source in sources if source is not None)


def _capturing(sources: Sequence[torch.Tensor | None]) -> bool:
    return _first(sources).is_cuda and torch.cuda.is_current_stream_capturing()


# What CUDA graphs read.
_captured: weakref.WeakKeyDictionary[nn.Module, list[Kept]] = weakref.WeakKeyDictionary()


def _before_use(
    owner: nn.Module, kept: Kept, ready: torch.cuda.Event, sources: Sequence[torch.Tensor | None]
) -> None:
    """Holds what a graph reads, and has any other stream than the one that it was made on wait until it is made."""
    if _capturing(sources):
        held = _captured.setdefault(owner, [])
        if all(kept is not other for other in held):
            held.append(kept)
        return
    index = _first(sources).get_device()
    if torch._C._cuda_getCurrentRawStream(index) != kept.stream:
        torch.cuda.current_stream(index).wait_event(ready)


_native_fingerprint: Any = native.load().fingerprint if not native.why_missing() else None
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a layer with such a weight will run: autocast's where it is on."""
    kind = tensor.device.type
    if tensor.dtype is torch.float64 or not autocasts(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)
