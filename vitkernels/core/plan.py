"""What like calls of an operator share: decided by the first of them, so that no other pays for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from vitkernels.core import native
from vitkernels.core.backends import Backend

if TYPE_CHECKING:
    from vitkernels.core.operator import Operator


class Plan:
    """How plain eager calls of one signature (shapes, dtypes, devices and options) run.

    Attributes:
        backend: its name.
        module: its implementation.
        params: the operator's inputs after the tensors.
        skips_by_products: as the backend's.
        reads_result: whether the backward does, as the operator says.
        ordinary: `fill` and `fill_gradients` have no more to do than to call the kernels: nothing is empty, and no
            result large. Only meaningful after `outputs`.
    """

    __slots__ = (
        "_models",
        "_operator",
        "_result",
        "backend",
        "module",
        "ordinary",
        "params",
        "reads_result",
        "skips_by_products",
    )

    def __init__(self, operator: Operator, backend: Backend, params: tuple[Any, ...]) -> None:
        self.backend = backend.name
        self.module = backend.load()
        self.params = params
        self.reads_result = reads_result(operator.reads_result, params)
        self.skips_by_products = backend.skips_by_products
        self.ordinary = False
        self._operator = operator
        # What outputs are allocated like: a tensor without memory, or the place of an input. To compute a shape and
        # to allocate by it takes several times as long.
        self._result: torch.Tensor | int | None = None
        self._models: list[torch.Tensor | int] | None = None

    def result(self, tensors: Sequence[Any]) -> torch.Tensor:
        """The first output, not filled in."""
        model = self._result
        if model is None:
            model = self._result = self._model_of(0, tensors)
        return self._operator.like(tensors[model] if isinstance(model, int) else model)

    def outputs(self, tensors: Sequence[Any]) -> list[torch.Tensor]:
        """All outputs, not filled in."""
        models = self._models
        if models is None:
            models = [self._model_of(place, tensors) for place in range(len(self._operator.allocate))]
        outputs, like = [], self._operator.like
        for model in models:
            outputs.append(like(tensors[model] if isinstance(model, int) else model))
        if self._models is None:
            sizes = [t.numel() for t in (*outputs, *tensors) if t is not None]
            self.ordinary = sizes[0] > 0 and max(sizes) < native.LARGE
            self._models = models
        return outputs

    def _model_of(self, place: int, tensors: Sequence[Any]) -> torch.Tensor | int:
        if (followed := self._operator.followed[place]) is not None:
            return followed
        model = self._operator.allocate[place](*tensors, *self.params)
        model.untyped_storage().resize_(0)  # before an output is allocated, which would not fit beside it
        return model


def reads_result(reads: bool | str, params: tuple[Any, ...]) -> bool:
    """Whether the backward of a call reads the result, from what its operator says and the inputs after the tensors."""
    # Not `reads in params`, which asks symbolic sizes.
    return reads if isinstance(reads, bool) else any(isinstance(p, str) and p == reads for p in params)


def fill(module: ModuleType, outputs: Sequence[torch.Tensor | None], inputs: Sequence[Any]) -> None:
    """Computes the outputs, in place; by-products that are None are not wanted."""
    result = outputs[0]
    assert result is not None
    if size := result.numel():
        if size >= native.LARGE:
            for output in outputs:
                if output is not None:
                    native.expect_large(output)
        module.forward(*outputs, *inputs)


def fill_gradients(
    module: ModuleType, grads: Sequence[torch.Tensor | None], result: torch.Tensor, inputs: Sequence[Any]
) -> None:
    """Computes the gradients that are not None, in place, from (*grad_outputs, *outputs, *inputs)."""
    if not result.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    for grad in grads:
        if grad is not None and grad.numel() >= native.LARGE:
            native.expect_large(grad)
    module.backward(*grads, *inputs)


def allocator(
    source: str | Callable[..., torch.Tensor], tensors: tuple[str, ...]
) -> tuple[Callable[..., torch.Tensor], int | None]:
    """(the function that allocates an output, the place of the input that it follows or None)."""
    if callable(source):
        return source, None
    place = tensors.index(source)
    return (lambda *inputs: torch.empty_like(inputs[place])), place
