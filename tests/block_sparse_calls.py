"""Calls of block_sparse_linear for its tests: patterns, inputs, plain PyTorch's results, and the house rule on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import BlockSparseTensor
from vitkernels.kernels.block_sparse_linear import reference

NAMES = ("x", "values", "bias")
Results = dict[str, torch.Tensor]


@dataclass
class Call:
    """The arguments of one call and the gradient of its result, all in x's dtype."""

    x: torch.Tensor
    weight: BlockSparseTensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    activation: str = "none"
    transposed: bool = False

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.x, self.weight.values, self.bias, self.weight.index

    @property
    def params(self) -> tuple[Any, ...]:
        return *self.weight.shape, self.activation, self.transposed

    def to(self, dtype: torch.dtype) -> Call:
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype)
        return Call(self.x.to(dtype), weight, bias, self.grad_y.to(dtype), self.activation, self.transposed)


def pattern(
    shape: tuple[int, int], block: tuple[int, int], density: float = 0.5, *, whole: bool = False
) -> torch.Tensor:
    """Which blocks are stored: rows of very different population, the last but one row and the first column empty
    where there are more than two, unless `whole`."""
    rows, columns = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
    if whole:
        return torch.ones(rows, columns)
    keep = torch.rand(rows, columns) < density * torch.linspace(0.4, 1.6, rows)[:, None]
    keep[-1, -1] = keep[0, 0] = True
    if rows > 2:
        keep[-2] = False
    if columns > 2:
        keep[:, 0] = False
    return keep


def call(
    tokens: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "none",
    transposed: bool = False,
    bias: bool = True,
    mask: torch.Tensor | None = None,
) -> Call:
    """Values beyond the matrix are NaN: no kernel may use them."""
    mask = pattern(shape, block) if mask is None else mask
    weight = BlockSparseTensor.from_dense(torch.randn(shape) / (shape[1] / 2) ** 0.5, block, mask)
    inside = BlockSparseTensor.from_dense(torch.ones(shape), block, mask).values != 0
    values = weight.values.masked_fill(~inside, float("nan"))
    taken, given = shape if transposed else shape[::-1]
    made = Call(
        torch.randn(tokens, taken),
        weight.with_values(values),
        torch.randn(given) if bias else None,
        torch.randn(tokens, given),
        activation,
        transposed,
    )
    return made.to(dtype)


def plain(c: Call) -> Results:
    """y and the gradients by PyTorch; values beyond the matrix have none, so that theirs is 0."""
    inside = c.weight.with_values(torch.ones_like(c.weight.values)).to_dense()
    inside = BlockSparseTensor.from_dense(inside, c.weight.block_shape, _mask(c.weight)).values != 0
    values = c.weight.values.masked_fill(~inside, 0)
    leaves = {"x": c.x, "values": values} | ({} if c.bias is None else {"bias": c.bias})
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    y, _ = reference.forward(leaves["x"], leaves["values"], leaves.get("bias"), c.weight.index, *c.params)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), c.grad_y, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    filled = (z if g is None else g for g, z in zip(gradients, zeros, strict=True))
    return {"y": y.detach(), **dict(zip(leaves, filled, strict=True))}


def _mask(weight: BlockSparseTensor) -> torch.Tensor:
    mask = torch.zeros(weight.grid)
    mask[weight.row_indices.long(), weight.col_indices.long()] = 1
    return mask


def launch(
    module: Any, c: Call, make: Callable[..., torch.Tensor] | None = None, /, **options: Any
) -> Results:
    """The same from a backend's module, which fills outputs that hold NaN; `make(shape, dtype)` allocates them."""
    make = make or (lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype))
    dtype, shape = c.x.dtype, tuple(c.grad_y.shape)
    y = make(shape, dtype)
    before = make((*shape[:-1], shape[-1] if c.activation == "gelu" else 0), dtype)
    module.forward(y, before, *c.tensors, *c.params, **options)
    gradients = {
        name: make(tuple(tensor.shape), dtype)
        for name, tensor in zip(NAMES, c.tensors, strict=False)
        if tensor is not None
    }
    places = (gradients.get(name) for name in NAMES)
    module.backward(*places, None, c.grad_y, None, y, before, *c.tensors, *c.params, **options)
    return {"y": y, **gradients}


def check(got: Results, c: Call) -> None:
    """Holds y and every gradient to the rule; where the truth is 0 everywhere, so is what came."""
    baseline, truth = plain(c), plain(c.to(torch.float64))
    for name, want in truth.items():
        if not want.any():
            assert (got[name] == 0).all(), name
            continue
        assert_close_to_truth(
            name if name == "y" else f"grad {name}",
            got[name],
            baseline[name],
            want,
            factor=FORWARD if name == "y" else GRADIENT,
            reduced=len(c.x) if name in ("values", "bias") else 1,
        )
        if name == "values":
            assert (got[name][want == 0] == 0).all(), "the gradient beyond the matrix is not exactly 0"
