"""Calls of an attention operator's kernels, forward and backward, held to those of its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

Results = dict[str, torch.Tensor]


@dataclass
class Inputs:
    tensors: dict[str, torch.Tensor | None]  # in the order of the operator's arguments
    grad_out: torch.Tensor | None
    grad_lse: torch.Tensor | None


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """What kernels sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(
    launcher: Any,
    inputs: Inputs,
    params: tuple[Any, ...],
    into: tuple[torch.Tensor, torch.Tensor],
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    missing: tuple[str, ...] = (),
    **where: Any,
) -> Results:
    """What `launcher` writes to out and lse, and to `empty` gradients of all tensors but the `missing`."""
    out, lse = into
    arguments = (*inputs.tensors.values(), *params)
    launcher.forward(out, lse, *arguments, **where)
    grads = {
        f"grad_{name}": None
        if tensor is None or name in missing
        else empty(tuple(tensor.shape), tensor.dtype)
        for name, tensor in inputs.tensors.items()
    }
    launcher.backward(*grads.values(), inputs.grad_out, inputs.grad_lse, out, lse, *arguments, **where)
    return {"out": out, "lse": lse, **{name: grad for name, grad in grads.items() if grad is not None}}


def run_reference(
    reference: Any,
    inputs: Inputs,
    params: tuple[Any, ...],
    dtype: torch.dtype | None,
    missing: tuple[str, ...] = (),
    constant: tuple[str, ...] = (),
) -> Results:
    """The same in plain PyTorch, in `dtype` or the tensors' own; `constant` are those that have no gradient."""
    leaves = {}
    for name, tensor in inputs.tensors.items():
        leaf = None if tensor is None else tensor.detach().to(dtype or tensor.dtype).clone()
        leaves[name] = leaf if leaf is None or name in constant else leaf.requires_grad_()
    out, lse = reference.forward(*leaves.values(), *params)
    pairs = [(out, inputs.grad_out), (lse, inputs.grad_lse)]
    incoming = [(result, grad.to(result.dtype)) for result, grad in pairs if grad is not None]
    torch.autograd.backward([result for result, _ in incoming], [grad for _, grad in incoming])
    results = {"out": out.detach(), "lse": lse.detach()}
    for name, leaf in leaves.items():
        if leaf is not None and leaf.requires_grad and name not in missing:
            results[f"grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def compare(
    label: object,
    got: Results,
    baseline: Results,
    truth: Results,
    dtype: torch.dtype,
    reduced: Mapping[str, int] | None = None,
) -> None:
    """Holds results to the truth by the house rule.

    `dtype` is the tensors', whose roundings lse and the gradients of wider tensors inherit; `reduced` has how many
    logits' gradients an element is the sum of, where that is not one.
    """
    for name, tensor in got.items():
        expected = truth[name]
        if not expected.any():
            assert not tensor.any(), f"{label} {name} must be zero"
            continue
        factor = GRADIENT if name.startswith("grad") else FORWARD
        terms = (reduced or {}).get(name, 1)
        assert_close_to_truth(
            f"{label} {name}", tensor, baseline[name], expected, factor=factor, reduced=terms, dtype=dtype
        )
