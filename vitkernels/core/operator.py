"""From the declaration of an operator to its torch ops and its autograd.Function.

Every operator declares once what it takes, what it returns and who can compute it; the traps of custom
operators (double backward, autocast, fake tensors, frozen inputs, empty batches) are solved here for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vitkernels.core import backends as choice
from vitkernels.core import native
from vitkernels.core.autograd import apply_traced, make_functions, plain_eager
from vitkernels.core.backends import Backend
from vitkernels.core.checks import describe, fail
from vitkernels.core.plan import Plan, allocator, fill, fill_gradients

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
        check: turns (*tensors, *options) of the public function into all inputs, or raises. What it does must
            follow from the options and from the shapes, dtypes, devices and layouts of the tensors.
        allocate: for each output, a function of all inputs that allocates it (also the fake implementation), as
            follows from the options, shapes, dtypes and devices alone; or the name of the tensor that it is to lie
            like.
        reference: given all inputs, the outputs, in plain differentiable PyTorch.
        backends: the implementations. Their modules fill: `forward(*outputs, *inputs)` and
            `backward(*grad_inputs, *grad_outputs, *outputs, *inputs)`; an unwanted gradient and an absent
            incoming one are None.
        order: device type -> backend names by measured speed, fastest first.
        flops: (shapes of tensors and params, gradient mask or None) -> FLOPs of the composed operator.
        reads_result: whether any backend's `backward` reads the first output; a string: only in calls with that
            option. Where none does, the result is not kept, may be changed in place, and something else stands in
            its place.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: tuple[str, ...],
        params: str,
        outputs: tuple[str, ...],
        check: Callable[..., tuple[Any, ...]],
        allocate: tuple[Callable[..., torch.Tensor] | str, ...],
        reference: Callable[..., tuple[torch.Tensor, ...]],
        backends: tuple[Backend, ...],
        order: dict[str, tuple[str, ...]],
        flops: Callable[..., int],
        reads_result: bool | str = True,
    ) -> None:
        self.name = name
        self.tensors = tuple(t.removesuffix("?") for t in tensors)
        self.outputs = outputs
        self.check = check
        self.allocate, self.followed = zip(*(allocator(a, self.tensors) for a in allocate), strict=True)
        self.like: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like  # allocates a gradient
        self.reference = reference
        self.backends = {backend.name: backend for backend in backends}
        self.order = order
        self.reads_result = reads_result
        self._define(tensors, params)
        self._register_flops(flops)
        self.traced, eager, result = make_functions(self)
        # Function.apply's own Python is for functorch transforms, which plain eager code has not.
        self._apply_eager = super(torch.autograd.Function, eager).apply  # type: ignore[misc]
        self._apply_result = super(torch.autograd.Function, result).apply  # type: ignore[misc]
        self._no_by_products = (None,) * (len(outputs) - 1)
        self._plans: dict[Any, Plan] = {}
        REGISTRY[name] = self

    def __call__(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        options: tuple[Any, ...],
        backend: str | None,
        by_products: bool = True,
    ) -> tuple[Any, ...]:
        """Checks the arguments of the public function, chooses a backend and runs it.

        Returns:
            all outputs; without `by_products` those after the first may be None.
        """
        key, wants_grad = _signature(tensors, *options, backend, choice.scope())
        plan = self._plans.get(key)  # none of None
        if plan is None:
            inputs = self.check(*tensors, *options)
            name = self.choose(inputs, backend)
            if name == "reference":
                return self.reference(*inputs)
            if key is None:
                return apply_traced(self, (*inputs, name))
            self._check_counts(inputs)
            if len(self._plans) >= 4096:
                self._plans.clear()
            plan = self._plans[key] = Plan(self, self.backends[name], inputs[len(tensors) :])
        if wants_grad and _grad_enabled():
            if by_products:
                return self._apply_eager(plan, *tensors)
            return (self._apply_result(plan, *tensors), *self._no_by_products)
        outputs: Sequence[torch.Tensor | None]
        if by_products or not plan.skips_by_products:
            outputs = plan.outputs(tensors)
        else:
            outputs = (plan.result(tensors), *self._no_by_products)
        fill(plan.module, outputs, (*tensors, *plan.params))
        return tuple(outputs)

    def _check_counts(self, inputs: tuple[Any, ...]) -> None:
        """Not part of `check`, since the reference takes any size and a traced one need not be known."""
        for name, tensor in zip(self.tensors, inputs, strict=False):
            if tensor is not None and max(tensor.shape, default=0) >= 2**31:
                fail(
                    name,
                    "dimensions below 2^31, as the kernels count in 32 bits",
                    tensor,
                    "Split the call, or use backend='reference'.",
                )

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
        # Not torch.compiler.is_exporting(), which Dynamo of torch 2.11 takes for True in every compilation.
        if torch.compiler._is_exporting_flag:
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
        if name in ("cpu", "cuda") and (reason := native.why_left_out(self.name)):
            return [reason]
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
        arguments = f"{declared}, {params}, str backend" if params else f"{declared}, str backend"
        _library.define(f"{self.name}({arguments}) -> ({returns})")
        _library.define(
            f"{self.name}_backward({grads}, {saved}, {arguments}, bool[] output_mask) -> ({gradients})"
        )
        forward, forward_fake = self.run_forward, self._forward_fake
        if len(self.outputs) == 1:  # one output is a bare tensor in a schema
            forward, forward_fake = _only(forward), _only(forward_fake)
        for suffix, run, fake in (
            ("", forward, forward_fake),
            ("_backward", self.run_backward, self._backward_fake),
        ):
            _library.impl(self.name + suffix, run, "CPU")
            _library.impl(self.name + suffix, run, "CUDA")
            torch.library.register_fake(f"vitkernels::{self.name}{suffix}", fake, lib=_library)
        self.forward_op = getattr(torch.ops.vitkernels, self.name).default
        self.backward_op = getattr(torch.ops.vitkernels, f"{self.name}_backward").default

    def run_forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The forward op's implementation: (*inputs, backend) -> outputs."""
        inputs = args[:-1]
        self._check_counts(inputs)
        outputs = self._forward_fake(*args)
        fill(self.backends[args[-1]].load(), outputs, inputs)
        return outputs

    def _forward_fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(allocate(*args[:-1]) for allocate in self.allocate)

    def run_backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The backward op's: (*grad_outputs, *outputs, *inputs, backend, output_mask) -> gradients."""
        count = len(self.outputs)
        grads = self._empty_gradients(args[2 * count :], args[-1])
        by_products = (t.contiguous() for t in args[count + 1 : 2 * count])  # allocated so, and read so
        given = (*args[: count + 1], *by_products, *args[2 * count : -2])
        fill_gradients(self.backends[args[-2]].load(), grads, args[count], given)
        return _fixed_arity(grads, args[2 * count])

    def _backward_fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        inputs = args[2 * len(self.outputs) :]
        return _fixed_arity(self._empty_gradients(inputs, args[-1]), inputs[0])

    def _empty_gradients(self, inputs: Any, mask: list[bool]) -> tuple[torch.Tensor | None, ...]:
        # The inputs go on past the tensors.
        return tuple(self.like(tensor) if want else None for tensor, want in zip(inputs, mask, strict=False))

    def _register_flops(self, flops: Callable[..., int]) -> None:
        count = len(self.outputs)

        @register_flop_formula(getattr(torch.ops.vitkernels, self.name))
        def forward_flops(*args: Any, **_: Any) -> int:
            return flops(*args[:-1], mask=None)

        @register_flop_formula(getattr(torch.ops.vitkernels, f"{self.name}_backward"))
        def backward_flops(*args: Any, **_: Any) -> int:
            return flops(*args[2 * count : -2], mask=args[-1])


def _fixed_arity(grads: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _only(run: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., Any]:
    return lambda *args: run(*args)[0]


_grad_enabled = torch.is_grad_enabled
_native_signature = native.load().signature if native.lends else None


def _signature(tensors: tuple[torch.Tensor | None, ...], *options: Any) -> tuple[Any, bool]:
    """(what checks and choice depend on, whether a tensor requires a gradient).

    (None, False) for a call that is traced, transformed, watched or under autocast, or whose tensors are not plain
    strided ones.
    """
    if not plain_eager():
        return None, False
    if _native_signature is not None:
        return _native_signature(tensors, *options) or (None, False)
    key: list[Any] = [repr(options)]
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif (type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter) and not (
            tensor.is_neg() or tensor._is_zerotensor()
        ):
            key += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        else:
            return None, False
    return tuple(key), any(tensor is not None and tensor.requires_grad for tensor in tensors)
