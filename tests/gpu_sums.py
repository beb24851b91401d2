"""Triton's float32 products in the interpreter, with the sums of a GPU.

There a dot is one chain of fused multiply-adds that starts at its accumulator. The interpreter has NumPy's product,
whose shorter sums hide what one chain over all steps of a loop loses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

Results = dict[str, torch.Tensor]


def chain(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + left right, term by term."""
    left, right = left.astype(np.float64), right.astype(np.float64)  # in which a product of floats is exact
    for k in range(left.shape[-1]):
        total = (left[..., k, None] * right[..., k, None, :] + total).astype(np.float32)
    return total


def sum_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    create_dot = interpreter.InterpreterBuilder.create_dot

    def chained(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32:
            return create_dot(self, a, b, accumulator, *options)
        return interpreter.TensorHandle(chain(a.data, b.data, accumulator.data), accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", chained)


class ChainedLinear(torch.autograd.Function):
    """F.linear, each sum of a product one chain."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        y = chained_product(x, weight.T)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return chained_product(grad, weight), chained_product(grad.T, x), bias


def chained_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    return torch.from_numpy(chain(left.detach().numpy(), right.detach().numpy(), total))


def assert_shorter_sums(
    name: str, got: Results, layer: Callable[[], Results], truth: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts that a result errs at most 2/3 of what that of the layer does where its F.linear sums in chains."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return ChainedLinear.apply(x, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", linear)
        chained = layer()
    error, most = ((t[name] - truth[name]).square().mean().sqrt() for t in (got, chained))
    assert error < 2 / 3 * most, f"{name}: rms {error:.2e}, in chains {most:.2e}"
