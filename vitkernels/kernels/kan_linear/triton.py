"""Launches the Triton kernels of kan_linear: which tiles, how many programs.

The configuration follows from the grid's size and the dtype alone: no autotuning, and a new number of rows never
recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of
from vitkernels.kernels.kan_linear.layout import Results, matrix, vector
from vitkernels.kernels.kan_linear.triton_backward import backward_norm, backward_u, backward_weight
from vitkernels.kernels.kan_linear.triton_basis import forward_product, row_statistics

# Programs that fill a large GPU about twice over, and the most memory that partial weight gradients may take.
WEIGHT_PROGRAMS = 512
PARTIAL_BYTES = 64 << 20
ROWS = {"BLOCK_N": 4, "BLOCK_C": 128, "num_warps": 4}


@cache
def configuration(kernel: str, grids: int, itemsize: int) -> dict[str, int]:
    """Tiles of forward_product, backward_u or backward_weight."""
    padded = triton.next_power_of_2(grids)
    if itemsize == 4:  # on the FMA units, with both operands in registers
        depth, block_n, block_j = 32, 32, 32
        config = {"num_warps": 4, "num_stages": 1}
    else:
        depth, block_n = 64, 64
        block_j = {"forward_product": 128, "backward_u": 64, "backward_weight": 128}[kernel]
        if kernel == "backward_weight":
            block_n = 32
        config = {"num_warps": 4 if kernel == "backward_u" else 8, "num_stages": 2}
    channels = max(1, depth // padded)
    return {
        "GRIDS": grids, "PADDED": padded, "BLOCK_N": block_n, "BLOCK_J": block_j, "BLOCK_C": channels, **config,
    }  # fmt: skip


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    grid: Tensor,
    inv_denominator: float,
    eps: float,
) -> None:
    """Fills y, mean and rstd."""
    rows, w = matrix(x), matrix(weight)
    count, channels = rows.shape
    outputs = w.shape[0]
    ln_weight, ln_bias, grid = (vector(t, x) for t in (ln_weight, ln_bias, grid))
    with device_of(x):
        row_statistics[(triton.cdiv(count, ROWS["BLOCK_N"]),)](
            mean, rstd, rows, count, channels, rows.stride(0), eps, **ROWS
        )
        config = configuration("forward_product", grid.shape[0], w.element_size())
        programs = triton.cdiv(count, config["BLOCK_N"]) * triton.cdiv(outputs, config["BLOCK_J"])
        forward_product[(programs,)](
            y, mean, rstd, rows, w, ln_weight, ln_bias, grid, count, channels, outputs, rows.stride(0), w.stride(0),
            inv_denominator, **config,
        )  # fmt: skip


def backward(
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_ln_weight: Tensor | None,
    grad_ln_bias: Tensor | None,
    grad_grid: Tensor | None,
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    grid: Tensor,
    inv_denominator: float,
    eps: float,
) -> None:
    """Fills the gradients that are not None. mean and rstd are no results of the public function."""
    if grad_y is None:
        for gradient in (grad_x, grad_weight, grad_ln_weight, grad_ln_bias, grad_grid):
            if gradient is not None:
                gradient.zero_()
        return
    rows, w, dy = matrix(x), matrix(weight), matrix(grad_y)
    ln_weight, ln_bias, grid = (vector(t, x) for t in (ln_weight, ln_bias, grid))
    results = Results()
    inputs = (mean, rstd, rows)
    norm = (ln_weight, ln_bias, grid)
    with device_of(x):
        if any(g is not None for g in (grad_x, grad_ln_weight, grad_ln_bias, grad_grid)):
            _backward_u(
                grad_x, grad_ln_weight, grad_ln_bias, grad_grid, dy, inputs, w, norm, inv_denominator, results
            )
        if grad_weight is not None:
            _backward_weight(grad_weight, dy, inputs, norm, inv_denominator, results)
    results.deliver()


def _backward_u(grad_x, grad_ln_weight, grad_ln_bias, grad_grid, dy, inputs, w, norm, inverse, results):
    mean, rstd, rows = inputs
    ln_weight, ln_bias, grid = norm
    count, channels = rows.shape
    config = configuration("backward_u", grid.shape[0], w.element_size())
    tiles, slices = triton.cdiv(count, config["BLOCK_N"]), triton.cdiv(channels, config["BLOCK_C"])
    grad_u = None if grad_x is None else _scratch(rows, count, channels)
    scale, shift = _scratch(rows, tiles, channels), _scratch(rows, tiles, channels)
    centres = None if grad_grid is None else _scratch(rows, tiles * slices, config["PADDED"])
    backward_u[(tiles * slices,)](
        grad_u, scale, shift, centres, dy, mean, rstd, rows, w, ln_weight, ln_bias, grid, count, channels, w.shape[0],
        dy.stride(0), rows.stride(0), w.stride(0), inverse, **config,
    )  # fmt: skip
    for gradient, partials in ((grad_ln_weight, scale), (grad_ln_bias, shift)):
        if gradient is not None:
            gradient.copy_(partials.sum(0))
    if grad_grid is not None and centres is not None:
        grad_grid.copy_(centres.sum(0)[: grid.shape[0]])
    if grad_x is not None:
        backward_norm[(triton.cdiv(count, ROWS["BLOCK_N"]),)](
            results.matrix(grad_x),
            grad_u,
            mean,
            rstd,
            rows,
            ln_weight,
            count,
            channels,
            rows.stride(0),
            **ROWS,
        )


def _backward_weight(grad_weight, dy, inputs, norm, inverse, results):
    rows, grid = inputs[2], norm[2]
    count, channels = rows.shape
    outputs, depth = grad_weight.shape
    config = configuration("backward_weight", grid.shape[0], dy.element_size())
    tiles = triton.cdiv(outputs, config["BLOCK_J"]) * triton.cdiv(channels, config["BLOCK_C"])
    shares = max(1, min(WEIGHT_PROGRAMS // tiles, PARTIAL_BYTES // (4 * grad_weight.numel())))
    share = triton.cdiv(triton.cdiv(count, shares), config["BLOCK_N"]) * config["BLOCK_N"]
    shares = triton.cdiv(count, share)
    target = results.matrix(grad_weight) if shares == 1 else _scratch(rows, shares, outputs, depth)
    backward_weight[(tiles, shares)](
        target,
        dy,
        *inputs,
        *norm,
        count,
        share,
        channels,
        outputs,
        dy.stride(0),
        rows.stride(0),
        inverse,
        **config,
    )
    if shares > 1:
        grad_weight.copy_(target.sum(0))


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    mixed = [(torch.float32, dtype)] if dtype.itemsize == 2 else []
    for x_dtype, grids in ((dtype, 8), (dtype, 5), *((kind, 8) for kind, _ in mixed)):
        x, weight = torch.empty(196, 64, dtype=x_dtype), torch.empty(128, 64 * grids, dtype=dtype)
        y, row = torch.empty(196, 128, dtype=dtype), torch.empty(196)
        small = (torch.empty(64), torch.empty(64), torch.empty(grids))
        inputs: tuple[Any, ...] = (x, weight, *small, 1 / 0.33, 1e-5)

        def call(x=x, weight=weight, y=y, row=row, small=small, inputs=inputs):
            forward(y, row, row, *inputs)
            arguments: list[Any] = [x, weight, *small, y, None, None, y, row, row, *inputs]
            backward(*arguments)

        label = f"I=64 J=128 G={grids}"
        yield label if x_dtype is dtype else f"{label} x float32", call
