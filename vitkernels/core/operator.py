"""From the declaration of an operator to its torch ops and its autograd.Function.

Every operator declares once what it takes, what it returns and who can compute it; the traps of custom
operators (double backward, autocast, fake tensors, frozen inputs, empty batches) are solved here for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vitkernels.core import backends as choice
from vitkernels.core.backends import Backend
from vitkernels.core.checks import describe

_library = torch.library.Library("vitkernels", "DEF")
REGISTRY: dict[str, Operator] = {}


class Operator:
    """One operator: `torch.ops.vitkernels.<name>`, its backward op, and the choice between backends.

    Args:
        name: the operator's name.
        tensors: names of the tensor inputs, which come first; a trailing "?" marks an optional one. The
            first names the tensor whose device and dtype decide the backend.
        params: schema text of the other inputs, as in "int window_h, float scale".
        outputs: names of the outputs; the first is the result, the rest are by-products such as lse.
        allocate: given all inputs, the empty outputs (also the fake implementation).
        reference: given all inputs, the outputs, in plain differentiable PyTorch.
        backends: the implementations. Their modules fill: `forward(*outputs, *inputs)` and
            `backward(*grad_inputs, *grad_outputs, *outputs, *inputs)`; an unwanted gradient and an absent
            incoming one are None.
        order: device type -> backend names by measured speed, fastest first.
        flops: (shapes of tensors and params, gradient mask or None) -> FLOPs of the composed operator.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: tuple[str, ...],
        params: str,
        outputs: tuple[str, ...],
        allocate: Callable[..., tuple[torch.Tensor, ...]],
        reference: Callable[..., tuple[torch.Tensor, ...]],
        backends: tuple[Backend, ...],
        order: dict[str, tuple[str, ...]],
        flops: Callable[..., int],
    ) -> None:
        self.name = name
        self.tensors = tuple(t.removesuffix("?") for t in tensors)
        self.outputs = outputs
        self.allocate = allocate
        self.reference = reference
        self.backends = {backend.name: backend for backend in backends}
        self.order = order
        self._define(tensors, params)
        self._register_flops(flops)
        self.function = _function(self)
        REGISTRY[name] = self

    def __call__(self, *inputs: Any, backend: str | None = None) -> tuple[torch.Tensor, ...]:
        """Runs the operator on checked inputs. Returns all outputs."""
        name = self.choose(inputs, backend)
        if name == "reference":
            return self.reference(*inputs)
        if torch.is_grad_enabled():
            for tensor in inputs[: len(self.tensors)]:
                if tensor is not None and tensor.requires_grad:
                    return self.function.apply(*inputs, name)
        return self.forward_op(*inputs, name)

    def choose(self, inputs: tuple[Any, ...], argument: str | None) -> str:
        """The backend for these inputs: the forced one, or the first of the order that fits."""
        if argument is choice.PROBE:
            raise choice.Probed(self.supported(inputs))
        forced = choice.requested(argument)
        if forced is not None:
            if forced != "reference" and self._why_not(forced, inputs):
                summary = ", ".join(
                    f"{name} {describe(value)}"
                    for name, value in zip(self.tensors, inputs, strict=False)
                    if value is not None
                )
                raise choice.refuse(self.name, forced, summary, self.supported(inputs))
            return forced
        if torch.compiler.is_exporting():
            return "reference"  # an exported program must not depend on this package
        device = inputs[0].device.type
        for name in self.order.get(device, ()):
            if not self._why_not(name, inputs):
                return name
        if device == "cuda":
            choice.warn_reference(self.name, self.supported(inputs))
        return "reference"

    def _why_not(self, name: str, inputs: tuple[Any, ...]) -> list[str]:
        if name not in self.backends:
            return [f"the operator has no {name} implementation"]
        return self.backends[name].why_not(inputs[0], inputs)

    def supported(self, inputs: tuple[Any, ...]) -> dict[str, list[str]]:
        """For each backend, the reasons why it cannot run the inputs; an empty list means that it can."""
        reasons = {name: self._why_not(name, inputs) for name in choice.NAMES if name != "reference"}
        return {**reasons, "reference": []}

    def _define(self, tensors: tuple[str, ...], params: str) -> None:
        declared = ", ".join(f"Tensor{'?' if t.endswith('?') else ''} {t.removesuffix('?')}" for t in tensors)
        grads = ", ".join(f"Tensor? grad_{name}" for name in self.outputs)
        saved = ", ".join(f"Tensor {name}" for name in self.outputs)
        returns = ", ".join(["Tensor"] * len(self.outputs))
        # Fixed arity: an unwanted gradient comes back as an empty tensor, which the Function turns to None.
        gradients = ", ".join(["Tensor"] * len(tensors))
        _library.define(f"{self.name}({declared}, {params}, str backend) -> ({returns})")
        _library.define(
            f"{self.name}_backward({grads}, {saved}, {declared}, {params}, str backend, bool[] output_mask)"
            f" -> ({gradients})"
        )
        for suffix, run, fake in (
            ("", self._forward, self._forward_fake),
            ("_backward", self._backward, self._backward_fake),
        ):
            _library.impl(self.name + suffix, run, "CPU")
            _library.impl(self.name + suffix, run, "CUDA")
            torch.library.register_fake(f"vitkernels::{self.name}{suffix}", fake, lib=_library)
        self.forward_op = getattr(torch.ops.vitkernels, self.name).default
        self.backward_op = getattr(torch.ops.vitkernels, f"{self.name}_backward").default

    def _forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        *inputs, backend = args
        outputs = self.allocate(*inputs)
        if outputs[0].numel():
            self.backends[backend].load().forward(*outputs, *inputs)
        return outputs

    def _forward_fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return self.allocate(*args[:-1])

    def _backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        *args_, backend, mask = args
        count = len(self.outputs)
        grad_outputs, outputs, inputs = args_[:count], args_[count : 2 * count], args_[2 * count :]
        grads = self._empty_gradients(inputs, mask)
        if outputs[0].numel():
            wanted = [grad if want else None for grad, want in zip(grads, mask, strict=True)]
            self.backends[backend].load().backward(*wanted, *grad_outputs, *outputs, *inputs)
        else:
            for grad in grads:
                grad.zero_()
        return grads

    def _backward_fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return self._empty_gradients(args[2 * len(self.outputs) : -2], args[-1])

    def _empty_gradients(self, inputs: Any, mask: list[bool]) -> tuple[torch.Tensor, ...]:
        tensors = inputs[: len(self.tensors)]
        return tuple(
            torch.empty_like(tensor) if want else inputs[0].new_empty(0)
            for tensor, want in zip(tensors, mask, strict=True)
        )

    def _register_flops(self, flops: Callable[..., int]) -> None:
        count = len(self.outputs)

        @register_flop_formula(getattr(torch.ops.vitkernels, self.name))
        def forward_flops(*args: Any, **_: Any) -> int:
            return flops(*args[:-1], mask=None)

        @register_flop_formula(getattr(torch.ops.vitkernels, f"{self.name}_backward"))
        def backward_flops(*args: Any, **_: Any) -> int:
            return flops(*args[2 * count : -2], mask=args[-1])


def _function(operator: Operator) -> type[torch.autograd.Function]:
    """The autograd.Function of an operator, over its forward and backward ops."""
    # Dynamo rebuilds the closure of a Function, which works for ops, numbers and strings only.
    name, inputs_count = operator.name, len(operator.tensors)
    forward_op, backward_op = operator.forward_op, operator.backward_op

    class Backward(torch.autograd.Function):
        """The backward op as a node of its own, so that a second derivative is an error, not a zero."""

        @staticmethod
        def forward(*args: Any) -> tuple[torch.Tensor, ...]:
            return backward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"vitkernels: the kernels of {name} have no second derivative (asked for by "
                "create_graph=True, as in a gradient penalty). Use backend='reference' for this call or scope: "
                "with vitkernels.backend('reference'): ..."
            )

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[torch.Tensor, ...]:
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output, *inputs[:inputs_count])
            ctx.params = inputs[inputs_count:]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            mask = list(ctx.needs_input_grad[:inputs_count])
            nothing = [None] * len(ctx.params)
            if all(grad is None for grad in grads):
                return (*([None] * inputs_count), *nothing)
            args = (*grads, *ctx.saved_tensors, *ctx.params, mask)
            # Grad mode is on in an eager backward only under create_graph=True. Compiled graphs refuse a second
            # derivative by themselves, and Dynamo cannot trace a Function inside a Function's backward.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                results = Backward.apply(*args)
            else:
                results = backward_op(*args)
            return (*(g if want else None for g, want in zip(results, mask, strict=True)), *nothing)

    Function.__name__ = Function.__qualname__ = name
    Backward.__name__ = Backward.__qualname__ = f"{name}_backward"
    return Function
