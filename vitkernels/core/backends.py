"""Choosing a backend: what each supports, as data, and who decides."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from vitkernels.core import native

NAMES = ("cuda", "triton", "cpu", "reference")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BackendError(ValueError):
    """A forced backend cannot run the call; the message has every reason and what would fit."""


class Probed(Exception):
    """Carries the answer to a call with backend=PROBE, which is answered instead of run."""

    def __init__(self, reasons: dict[str, list[str]]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


PROBE = "probe"


class _Choice(threading.local):
    # threading.local rather than a ContextVar: Dynamo guards it, a ContextVar breaks fullgraph.
    forced: str | None = None


_choice = _Choice()
# The scopes that any thread is in, as text: a plain global is what every Dynamo guards. On `_choice` it misses a
# thread's first scope, whose attribute was the class's until then; that of torch 2.11 sees nothing but the class's.
_scopes: dict[object, str] = {}
_scopes_open = ""
_scopes_lock = threading.Lock()
_BLIND_DYNAMO = torch.__version__ < "2.13"


def _validated(name: str | None, source: str) -> str | None:
    if name is None or (isinstance(name, str) and name in ("", "auto")):
        return None
    if not isinstance(name, str) or name not in NAMES:  # an array would be compared element by element
        raise ValueError(f"{source}: expected one of 'auto', {', '.join(map(repr, NAMES))}; got {name!r}.")
    return name


_environment = _validated(os.environ.get("VITKERNELS_BACKEND"), "environment variable VITKERNELS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for every operator called in this scope, on this thread.

    An explicit `backend=` argument of a call wins over the scope, the scope over `VITKERNELS_BACKEND`.

    Args:
        name: "cuda", "triton", "cpu", "reference" or "auto".

    Raises:
        ValueError: unknown name.
    """
    previous, forced = _choice.forced, _validated(name, "vitkernels.backend(name)") or "auto"
    _choice.forced = forced
    key = object()
    _note_scope(key, forced)
    try:
        yield
    finally:
        _note_scope(key, None)
        _choice.forced = previous


def _note_scope(key: object, name: str | None) -> None:
    global _scopes_open
    with _scopes_lock:
        if name is None:
            del _scopes[key]
        else:
            _scopes[key] = name
        _scopes_open = " ".join(_scopes.values())


def scope() -> str | None:
    """The name given to the enclosing `backend` scope, or None."""
    if _scopes_open == "" and _choice.forced is None:  # no more than a guard: see `_scopes`
        return None
    if _BLIND_DYNAMO and torch.compiler.is_dynamo_compiling():
        return _scopes_open.rpartition(" ")[2]  # another thread's, where two compile in scopes of their own
    return _choice.forced


def requested(argument: str | None) -> str | None:
    """The forced backend of a call, or None when the operator's own order decides."""
    if argument is not None:
        return _validated(argument, "argument `backend`")
    forced = scope()
    if forced is not None:
        return None if forced == "auto" else forced
    return _environment


_loaded: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator, and what it supports.

    Attributes:
        module: import path of a module with `forward` and `backward` that fill outputs; imported at first use.
        dtypes: dtypes of the operator's main tensors.
        skips_by_products: its forward takes None for outputs after the first, which are then not computed.
        limits: given the operator's inputs, the reasons why it cannot run them (beyond device and dtype).
    """

    name: str
    module: str
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    limits: Callable[..., list[str]] | None = None
    skips_by_products: bool = False

    def load(self) -> ModuleType:
        module = _loaded.get(self.module)  # not from sys.modules, which has what another thread still imports
        if module is None:
            module = _loaded[self.module] = importlib.import_module(self.module)
        return module

    def why_not(self, tensor: torch.Tensor, inputs: tuple[Any, ...]) -> list[str]:
        """Every reason why this backend cannot run the call; empty when it can."""
        device = tensor.device
        missing = why_unavailable(self.name, device.type, -1 if device.index is None else device.index)
        reasons = [missing] if missing else []
        if tensor.dtype not in self.dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"dtype {str(tensor.dtype).removeprefix('torch.')} is not among {allowed}")
        if self.limits is not None:
            reasons += self.limits(*inputs)
        return reasons


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_availability: dict[tuple[str, str, int], str] = {}


def why_unavailable(name: str, device_type: str, index: int) -> str:
    """Why a backend cannot run on a device at all, whatever the operator; empty when it can."""
    key = (name, device_type, index)
    if key not in _availability:
        _availability[key] = _why_unavailable(name, device_type, index)
    return _availability[key]


# All that torch.compiler.assume_constant_result does, but for importing Dynamo, which takes as long as torch itself.
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_unavailable(name: str, device_type: str, index: int) -> str:
    if name == "reference":
        return ""
    if name == "cpu":
        return f"needs CPU tensors, got {device_type}" if device_type != "cpu" else native.why_missing()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if name == "triton" and device_type == "cpu" and interpreting():
        return ""
    if device_type != "cuda":
        return f"needs CUDA tensors, got {device_type}"
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs; this PyTorch is built for ROCm"
    if name == "cuda" and (reason := native.cuda_reason()):
        return reason
    major, minor = torch.cuda.get_device_capability(None if index < 0 else index)
    if major < 8:
        return f"needs compute capability 8.0 or higher, got {major}.{minor}"
    if name == "cuda" and not native.covers(archs := native.load().cuda_archs, (major, minor)):
        return (
            f"the extension holds code for {archs} only, not for this device's {major}.{minor}; "
            f"rebuild with VITKERNELS_CUDA_ARCHS={major}{minor}-real"
        )
    return ""


_warned: set[str] = set()


def warn_reference(operator: str, reasons: dict[str, list[str]]) -> None:
    """Says once per process and operator that CUDA tensors fall to the slow reference, and why."""
    if torch.compiler.is_compiling() or operator in _warned:
        return
    _warned.add(operator)
    warnings.warn(
        f"vitkernels: {operator} runs its plain-PyTorch reference on CUDA tensors: {_describe(reasons)}",
        stacklevel=4,
    )


def _describe(reasons: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items() if why)


def refuse(operator: str, name: str, summary: str, reasons: dict[str, list[str]]) -> BackendError:
    """The error for a forced backend that does not fit."""
    fitting = [repr(other) for other, why in reasons.items() if not why]
    lines = [f"{operator}: backend {name!r} was asked for but cannot run this call:"]
    lines += [f"  - {reason}" for reason in reasons[name]]
    others = {other: why for other, why in reasons.items() if other != name and why}
    lines += [f"Inputs: {summary}.", f"Backends that would fit: {', '.join(fitting)}."]
    if others:
        lines.append(f"Others do not fit either: {_describe(others)}.")
    return BackendError("\n".join(lines))
