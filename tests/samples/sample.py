"""One call of a public function, for the tests that all operators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch


@dataclass
class Sample:
    """One call of a public function.

    Attributes:
        make: (dtype, device, batch) -> tensor arguments by name; all floating and differentiable.
        kwargs: the other arguments.
        products: whether the composition multiplies matrices, which autocast casts and FLOP counters count.
        arguments: makes the function's arguments from the tensors, where some go into an object.
        share: of the reference's FLOPs, what the operator counts.
        positional: names of arguments that the public function takes by position alone.
        without: backends that cannot run this call, though they have the operator.
        bad: argument name -> bad values for it, each with a part of the message expected.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[..., dict[str, torch.Tensor]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    products: bool = True
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = dict
    share: Fraction = Fraction(1)
    positional: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return self.function.__name__

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch: int = 2,
        requires_grad: bool = False,
    ) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(device, dtype).requires_grad_(requires_grad)
            for name, tensor in self.make(batch).items()
        }

    def __call__(self, tensors: dict[str, torch.Tensor], **kwargs: Any) -> Any:
        return self.function(**self.arguments(tensors), **{**self.kwargs, **kwargs})
