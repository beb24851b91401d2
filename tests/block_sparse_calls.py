"""Calls of block_sparse_linear for its tests: patterns, the dense masked layer, and the house rule on all results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from guarded import drawn
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import BlockSparseTensor

NAMES = ("x", "values", "bias")


def pattern(
    shape: tuple[int, int],
    block: tuple[int, int],
    density: float = 0.5,
    *,
    mask: torch.Tensor | None = None,
    holes: bool = True,
) -> BlockSparseTensor:
    """Uniform, with an empty block row and column where `holes` and there are others; float32 values."""
    if mask is None:
        mask = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < density
        if holes:
            mask[-1, -1] = mask[0, 0] = True
            if mask.shape[0] > 2:
                mask[1] = False
            if mask.shape[1] > 2:
                mask[:, 1] = False
    return BlockSparseTensor.from_dense(torch.randn(shape) / (density * shape[1] + 1) ** 0.5, block, mask)


class Call:
    """Tensors and options of one call, and a gradient for its result."""

    def __init__(
        self,
        tokens: int,
        weight: BlockSparseTensor,
        dtype: torch.dtype = torch.float32,
        activation: str = "none",
        transposed: bool = False,
        bias: bool = True,
    ) -> None:
        taken, given = reversed(weight.shape) if not transposed else weight.shape
        self.weight = weight.to(dtype)
        self.values = self.weight.values
        if dtype is torch.float64 and weight.values.dtype is not dtype:
            self.values /= 3  # to digits that float32 does not have
        self.x = drawn(tokens, taken, dtype=dtype)
        self.bias = drawn(given, dtype=dtype) if bias else None
        self.grad = drawn(tokens, given, dtype=dtype)
        self.activation, self.transposed = activation, transposed
        self.params = (weight.index, *weight.shape, activation, transposed)

    def beyond(self) -> torch.Tensor:
        """Which elements of the values lie beyond the matrix."""
        (rows, columns), (bh, bw) = self.weight.shape, self.weight.block_shape
        row = self.weight.row_indices[:, None] * bh + torch.arange(bh)
        column = self.weight.col_indices[:, None] * bw + torch.arange(bw)
        return (row >= rows)[:, :, None] | (column >= columns)[:, None, :]


def plain(call: Call, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """y and all gradients of the layer that multiplies a dense weight with the mask, by plain PyTorch in a dtype."""
    leaves = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    leaves = {name: t.to(dtype).detach().requires_grad_() for name, t in leaves.items()}
    weight = call.weight.with_values(leaves["values"]).to_dense()
    y = F.linear(leaves["x"], weight.T if call.transposed else weight, leaves.get("bias"))
    y = {"none": lambda t: t, "gelu": F.gelu, "relu": F.relu}[call.activation](y)
    gradients = torch.autograd.grad(y, list(leaves.values()), call.grad.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def launch(
    module: Any, call: Call, wanted: tuple[str, ...] = NAMES, /, **options: Any
) -> dict[str, torch.Tensor]:
    """The same from a backend's module, which fills outputs that hold NaN."""
    y = torch.full_like(call.grad, float("nan"))
    before = torch.full_like(y, float("nan")) if call.activation == "gelu" else y.new_empty(len(y), 0)
    inputs = (call.x, call.values, call.bias, *call.params)
    module.forward(y, before, *inputs, **options)
    without = torch.full_like(y, float("nan"))
    module.forward(without, None, *inputs, **options)
    assert (
        torch.equal(
            y,
            without,
        )
        or y.isnan().any()
    ), "keeping what went into the GELU changed the result"
    grads = {
        name: torch.full_like(getattr(call, name), float("nan"))
        for name in NAMES
        if name in wanted and getattr(call, name) is not None
    }
    module.backward(
        *(grads.get(name) for name in NAMES), None, call.grad, None, y, before, *inputs, **options
    )
    return {"y": y, **grads}


def check(got: dict[str, torch.Tensor], call: Call) -> None:
    """Holds y and every gradient to the rule, and the gradient beyond the matrix to exactly 0."""
    baseline, truth = plain(call, call.x.dtype), plain(call, torch.float64)
    reduced = {"values": len(call.x), "bias": len(call.x)}
    for name, want in truth.items():
        assert_close_to_truth(
            name if name == "y" else f"grad {name}",
            got[name],
            baseline[name],
            want,
            factor=FORWARD if name == "y" else GRADIENT,
            reduced=reduced.get(name, 1),
            dtype=call.x.dtype,
        )
    assert (got["values"][call.beyond()] == 0).all(), "the gradient beyond the matrix is not exactly 0"
