"""What an operator declares to be benchmarked. Each ``bench/cases/<op>.py`` defines one ``CASE``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[..., Any]


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """Tensor arguments by name, non-tensor options, and the gradients that reach the outputs.

    The first output is called ``out``; where the options ask for more, ``grad_more`` names them in their order.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    grad_out: Tensor
    grad_more: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("out", *self.grad_more)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        return (self.grad_out, *self.grad_more.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        more = {name: change(tensor) for name, tensor in self.grad_more.items()}
        return Inputs(tensors, self.options, change(self.grad_out), more)


@dataclass(frozen=True)
class Cost:
    """The least work that any implementation must do, and the FLOPs of the composed operator."""

    flops: float
    bytes: float
    exps: float = 0.0


@dataclass(frozen=True)
class Provider:
    """One implementation. ``prepare(inputs, training)`` returns a function of the tensors (by name)."""

    name: str
    prepare: Callable[[Inputs, bool], Function]
    modes: Sequence[str] = ("fwd", "fwd+bwd")
    ours: bool = False


class Problem(Protocol):
    @property
    def label(self) -> str:
        """Short name inside its preset, such as ``stage 1``."""

    def describe(self, batch: int) -> str:
        """The shapes in the field's notation."""


@dataclass(frozen=True)
class Case:
    operator: str
    presets: Mapping[str, Sequence[Problem]]
    default_preset: str
    shape_help: str
    parse_shape: Callable[[str], Problem]
    make_inputs: Callable[..., Inputs]  # (problem, batch, dtype=, device=, generator=)
    eager: Function
    peers: Callable[[torch.device], Sequence[Provider]]
    cost: Callable[..., Cost]  # (problem, batch, dtype, mode)
    # Shapes by name that exercise every path; for checks on a new machine rather than for speed.
    check_shapes: Mapping[str, str] = field(default_factory=dict)
    # Terms summed into one element of a gradient, where that is a long reduction over the batch.
    reduced: Callable[..., Mapping[str, int]] = lambda problem, batch: {}
    # Calls the operator with the inputs' tensors and options and a backend; None: they are its arguments.
    call: Function | None = None

    @property
    def function(self) -> Function:
        from vitkernels import ops

        return self.call or getattr(ops, self.operator)


def operators() -> list[str]:
    from vitkernels.bench import cases

    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def load_case(operator: str) -> Case:
    known = operators()
    if operator not in known:
        raise ValueError(f"op: expected one of {', '.join(known)}; got {operator!r}")
    return importlib.import_module(f"vitkernels.bench.cases.{operator}").CASE


def parse_fields(text: str, defaults: Mapping[str, Any], or_zero: Collection[str] = ()) -> dict[str, Any]:
    """Read ``key=value,key=value`` into the types of ``defaults``; ``7x5`` becomes ``(7, 5)``.

    Integers are sizes, positive ones; those of ``or_zero`` may be 0.
    """
    fields = dict(defaults)
    for item in filter(None, text.split(",")):
        key, separator, value = item.partition("=")
        if not separator or key not in fields:
            raise ValueError(f"shape: expected key=value with key in {', '.join(fields)}; got {item!r}")
        default = defaults[key]
        try:
            if isinstance(default, tuple):
                fields[key] = tuple(int(part) for part in value.split("x"))
                if len(fields[key]) != len(default):
                    raise ValueError
            else:
                fields[key] = type(default)(value)
        except ValueError:
            is_tuple = isinstance(default, tuple)
            expected = "x".join(["int"] * len(default)) if is_tuple else type(default).__name__
            raise ValueError(f"shape: expected {key}={expected}; got {item!r}") from None
        sizes = fields[key] if isinstance(default, tuple) else (fields[key],)
        low = 0 if key in or_zero else 1
        if any(isinstance(size, int) and size < low for size in sizes):
            raise ValueError(f"shape: expected {key} of at least {low}; got {item!r}")
    return fields
