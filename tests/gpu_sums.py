"""Triton's float32 products in the interpreter, with the sums of a GPU.

There a dot is one chain of fused multiply-adds that starts at its accumulator, and a sum that a dot is added to is its
accumulator too. The interpreter has NumPy's product, whose shorter sums hide what one chain over all steps of a loop
loses.
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
    create_dot, create_fadd = (
        interpreter.InterpreterBuilder.create_dot,
        interpreter.InterpreterBuilder.create_fadd,
    )

    def chained(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32:
            return create_dot(self, a, b, accumulator, *options)
        product = interpreter.TensorHandle(chain(a.data, b.data, accumulator.data), accumulator.dtype.scalar)
        if not accumulator.data.any():
            product.factors = a, b
        return product

    def continued(self: Any, left: Any, right: Any) -> Any:
        for product, total in ((left, right), (right, left)):
            if hasattr(product, "factors"):
                return chained(self, *product.factors, total)
        return create_fadd(self, left, right)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", chained)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fadd", continued)


class ChainedProduct(torch.autograd.Function):
    """torch.matmul, each sum of a product one chain."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return chained_product(left, right)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = ctx.saved_tensors
        return chained_product(grad, right.mT), chained_product(left.mT, grad)


def chained_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    total = np.zeros((*left.shape[:-1], right.shape[-1]), np.float32)
    return torch.from_numpy(chain(left.detach().numpy(), right.detach().numpy(), total))


def assert_shorter_sums(
    name: str, got: Results, layer: Callable[[], Results], truth: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts that a result errs at most 2/3 of what that of the layer does where its products sum in chains."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        y = ChainedProduct.apply(x, weight.T)
        return y if bias is None else y + bias

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", linear)
        patched.setattr(torch, "matmul", ChainedProduct.apply)
        chained = layer()
    error, most = ((t[name] - truth[name]).square().mean().sqrt() for t in (got, chained))
    assert error < 2 / 3 * most, f"{name}: rms {error:.2e}, in chains {most:.2e}"
