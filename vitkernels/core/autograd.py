"""The autograd.Functions of an operator: one that is traced and transformed, two for plain eager code.

`setup_context` Functions are what torch.compile and torch.func ask for, but PyTorch binds the signature of their
`forward` at every call, which costs more than a small kernel. Eager code takes the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitkernels.core.plan import Plan, fill, fill_gradients, reads_result

if TYPE_CHECKING:
    from vitkernels.core.operator import Operator


def plain_eager() -> bool:
    """Whether nothing watches, transforms or casts the calls, so that a kernel may run without its torch op."""
    # Tracers other than Dynamo work under a dispatch mode.
    return not (
        _dynamo_compiling()
        or _dispatch_modes()  # FlopCounterMode, FakeTensorMode, make_fx
        or _function_modes()
        or _functorch_active()
        or _autocast_enabled()
        or _profiler_enabled()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def apply_traced(operator: Operator, inputs: tuple[Any, ...]) -> Any:
    """A call that is not plain eager: the Function where a derivative may be asked for, else the bare op."""
    if forward_ad._current_level >= 0:
        # Although nothing may require a gradient: the bare op would silently drop the tangents. A `jvp` method of
        # the Function would be the place for this error, but Dynamo refuses Functions that have one.
        try:
            return operator.traced.apply(*inputs)
        except NotImplementedError as error:
            raise RuntimeError(
                f"vitkernels: the kernels of {operator.name} have no forward-mode derivative (jvp, jacfwd, hessian). "
                "Use backend='reference' for this call or scope: with vitkernels.backend('reference'): ..."
            ) from error
    tensors = inputs[: len(operator.tensors)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return operator.traced.apply(*inputs)
    out = operator.forward_op(*inputs)
    return (out,) if len(operator.outputs) == 1 else out


_dynamo_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_enabled = torch._C._is_any_autocast_enabled
_profiler_enabled = torch.autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state


def second_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"vitkernels: the kernels of {name} have no second derivative (asked for by create_graph=True, as in a "
        "gradient penalty). Use backend='reference' for this call or scope: with vitkernels.backend('reference'): ..."
    )


def make_functions(
    operator: Operator,
) -> tuple[type[torch.autograd.Function], ...]:
    """(the traced Function over the torch ops, the eager Function over the implementations, the eager one whose only
    output is the result)."""
    # Dynamo rebuilds the closure of a Function, which works for ops, numbers and strings only.
    name, count = operator.name, len(operator.tensors)
    forward_op, backward_op = operator.forward_op, operator.backward_op
    single, reads = len(operator.outputs) == 1, operator.reads_result
    all_saved = len(operator.outputs) + count

    class Backward(torch.autograd.Function):
        """The backward as a node of its own, so that a second derivative is an error, not a zero."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[torch.Tensor, ...]:
            return backward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise second_derivative(name)

    class Traced(torch.autograd.Function):
        """Takes (*tensors, *params, backend)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[torch.Tensor, ...]:
            return (forward_op(*args),) if single else forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            kept = output if reads_result(reads, inputs[count:]) else output[1:]
            ctx.save_for_backward(*kept, *inputs[:count])
            ctx.params = inputs[count:]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            mask = list(ctx.needs_input_grad[:count])
            nothing = [None] * len(ctx.params)
            if not any(grad is not None for grad in grads):
                return (*([None] * count), *nothing)
            saved = ctx.saved_tensors
            if len(saved) < all_saved:  # nobody reads what stands in the result's place
                saved = (next(grad for grad in grads if grad is not None), *saved)
            args = (*grads, *saved, *ctx.params, mask)
            # Grad mode is on in an eager backward only under create_graph=True. Compiled graphs refuse a second
            # derivative by themselves, and Dynamo cannot trace a Function inside a Function's backward.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                results = Backward.apply(*args)
            else:
                results = backward_op(*args)
            return (*(g if want else None for g, want in zip(results, mask, strict=True)), *nothing)

    def make_eager(absent: tuple[None, ...], joint: bool) -> type[torch.autograd.Function]:
        class Eager(torch.autograd.Function):
            """Takes (plan, *tensors). Unless `joint`, the result is the graph's only output and the by-products, whose
            gradients are then `absent`, are only saved: each output costs as much as an argument."""

            # Of a small call's time this is most: hence loops (a generator costs as much as an allocation) and few
            # calls of helpers.
            @staticmethod
            def forward(ctx: Any, plan: Plan, *tensors: Any) -> Any:
                outputs = plan.outputs(tensors)
                if plan.ordinary:
                    plan.module.forward(*outputs, *tensors, *plan.params)
                else:
                    fill(plan.module, outputs, (*tensors, *plan.params))
                # What set_materialize_grads and save_for_backward do, without two Python calls.
                ctx.materialize_grads = False
                ctx.to_save = (*outputs, *tensors) if plan.reads_result else (*outputs[1:], *tensors)
                ctx.plan = plan
                return tuple(outputs) if joint else outputs[0]

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                nothing, watched = True, _grad_enabled() or not plain_eager()
                for grad in grads:
                    if grad is not None:
                        nothing = False
                        watched = watched or type(grad) is not Tensor or _is_batched(grad) or grad.is_neg()
                        watched = watched or grad._is_zerotensor()
                wanted = ctx.needs_input_grad
                if nothing:
                    return (None,) * len(wanted)
                plan, saved = ctx.plan, ctx.saved_tensors
                if not plan.reads_result:
                    saved = (next(grad for grad in grads if grad is not None), *saved)
                for by_product in saved[1:first_input]:  # hooks on saved tensors may lay them out anew
                    watched = watched or not by_product.is_contiguous()
                if watched:
                    mask = list(wanted[1:])
                    # Only the op reads what a gradient's memory does not simply hold: is_grads_batched hands in tensors
                    # without storage, code after the operator subclasses, the negative views of a conjugate and zeros
                    # without memory.
                    run: Callable[..., Any] = Backward.apply if _grad_enabled() else backward_op
                    results = run(*grads, *absent, *saved, *plan.params, plan.backend, mask)
                    return (None, *(g if want else None for g, want in zip(results, mask, strict=True)))
                like, results = operator.like, []
                for tensor, want in zip(saved[first_input:], wanted[1:]):  # noqa: B905 (strict costs)
                    results.append(like(tensor) if want else None)
                if plan.ordinary:
                    plan.module.backward(*results, *grads, *absent, *saved, *plan.params)
                else:
                    fill_gradients(plan.module, results, saved[0], (*grads, *absent, *saved, *plan.params))
                return (None, *results)

        return Eager

    first_input = len(operator.outputs)  # of what is saved
    eager, result = make_eager((), joint=True), make_eager((None,) * (first_input - 1), joint=False)
    for function, suffix in ((Traced, ""), (eager, ""), (result, ""), (Backward, "_backward")):
        function.__name__ = function.__qualname__ = name + suffix
        node = function._backward_cls  # named already, and by this name in profiles and in anomaly mode
        node.__name__ = node.__qualname__ = f"{name}{suffix}Backward"
    return Traced, eager, result
