"""Launches the Triton kernels of block_sparse_linear: which tiles, how many programs.

The configuration follows from the block shape, the dtype and whether there are tokens enough for large tiles: no
autotuning, and no pattern and no number of tokens compiles more than these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of
from vitkernels.kernels.block_sparse_linear.native import _rows
from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor
from vitkernels.kernels.block_sparse_linear.triton_backward import activation_gradient, values_gradient
from vitkernels.kernels.block_sparse_linear.triton_product import group_places, product

# Programs that fill a large GPU about once and twice over, and the most memory that partial gradients may take.
PROGRAMS = 132
GRADIENT_PROGRAMS = 512
PARTIAL_BYTES = 64 << 20
ACTIVATION = {"BLOCK_N": 16, "BLOCK_C": 128, "num_warps": 4}
CHUNK = 128


class Direction(NamedTuple):
    """Which way a product goes through the matrix; a line is a block row, or a block column of the transpose."""

    features: tuple[int, int]  # given, taken
    block: tuple[int, int]  # given, taken
    strides: tuple[int, int]  # of the same, inside a block
    pattern: tuple[Tensor, Tensor, Tensor | None]  # pointers, places, blocks

    @property
    def lines(self) -> int:
        return triton.cdiv(self.features[0], self.block[0])

    @property
    def across(self) -> int:
        return triton.cdiv(self.features[1], self.block[1])


def _direction(weight: BlockSparseTensor, transposed: bool) -> Direction:
    (height, width), (bh, bw) = weight.shape, weight.block_shape
    if transposed:
        index = (weight.crow_t, weight.row_t, weight.perm_t)
        return Direction((width, height), (bw, bh), (1, bw), index)
    return Direction((height, width), (bh, bw), (bw, 1), (weight.crow_indices, weight.col_indices, None))


@cache
def product_configuration(given: int, taken: int, itemsize: int, few: bool) -> dict[str, int]:
    """Tiles for blocks of [given, taken]; `few` tokens take small ones, for the sake of more programs."""
    if itemsize == 4:  # on the FMA units
        part = min(given, 32)
        config = {"GROUP": 32 // part, "PART": part, "DEPTH": min(taken, 32), "BLOCK_N": 1024 // part}
        return {**config, "STAGES": 1, "num_warps": 4, "num_stages": 1}
    features = 64 if few else 128
    part, depth = min(given, features), min(taken, 64)
    group = features // part
    # A block of 16 x 16 has elements for the asynchronous copies of 4 warps only.
    small = few or part * depth < 512
    # Of a group's loop Triton buffers so many steps, of a single line's, whose indices it loads ahead, half as many.
    stages = 5 if group == 1 else 4 if depth < 64 else 3
    config = {"GROUP": group, "PART": part, "DEPTH": depth, "BLOCK_N": 64 if small else 128}
    return {**config, "STAGES": stages, "num_warps": 4 if small else 8, "num_stages": stages}


@cache
def values_configuration(bh: int, bw: int, itemsize: int) -> dict[str, int]:
    if itemsize == 4:
        height, width, config = 32, 32, {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    else:
        height = max(64, bh)
        width, config = 16384 // height, {"BLOCK_N": 32, "num_warps": 8, "num_stages": 4}
    return {"GROUP": max(1, height // bh), "HEIGHT": height, "WIDTH": width, **config}


def _scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _groups(direction: Direction, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lists that `group_places` makes, for groups of so many lines."""
    groups, across = triton.cdiv(direction.lines, group), direction.across
    counts, places, blocks = (
        _scratch(direction.pattern[0], *shape, dtype=torch.int32)
        for shape in ((groups,), (groups, across), (groups, across, group))
    )
    group_places[(groups,)](
        counts, places, blocks, *direction.pattern, direction.lines, across, across.bit_length(), GROUP=group,
        CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return counts, places, blocks


def _product(
    y: Tensor, before: Tensor | None, x: Tensor, values: Tensor, bias: Tensor | None, direction: Direction,
    activation: str,
) -> None:  # fmt: skip
    (given, taken), block = direction.features, direction.block
    config = product_configuration(*block, x.element_size(), False)
    if _programs(x, direction, config) < PROGRAMS:
        config = product_configuration(*block, x.element_size(), True)
    lists = _groups(direction, config["GROUP"])
    product[(_programs(x, direction, config),)](
        y, before, x, values, bias, *lists, x.shape[0], len(lists[0]), given, taken, direction.across, x.stride(0),
        activation, *block, *direction.strides, **config,
    )  # fmt: skip


def _programs(x: Tensor, direction: Direction, config: dict[str, int]) -> int:
    parts = triton.cdiv(direction.lines, config["GROUP"]) * (direction.block[0] // config["PART"])
    return triton.cdiv(x.shape[0], config["BLOCK_N"]) * parts


def forward(
    y: Tensor,
    before: Tensor | None,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_features: int,
    in_features: int,
    activation: str,
    transposed: bool,
) -> None:
    """Fills y, and what goes into a GELU unless `before` is None."""
    kept = None if before is None or activation != "gelu" else _rows(before)
    weight = BlockSparseTensor.wrap(values.contiguous(), index.contiguous(), (out_features, in_features))
    bias = None if bias is None else bias.contiguous()
    with device_of(x):
        direction = _direction(weight, transposed)
        _product(_rows(y), kept, _rows(x), weight.values, bias, direction, activation)


def backward(
    grad_x: Tensor | None,
    grad_values: Tensor | None,
    grad_bias: Tensor | None,
    grad_index: None,
    grad_y: Tensor | None,
    grad_before: None,
    y: Tensor,
    before: Tensor,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_features: int,
    in_features: int,
    activation: str,
    transposed: bool,
) -> None:
    """Fills the gradients that are not None. `before` is no result of the public function."""
    if grad_y is None:
        for gradient in (grad_x, grad_values, grad_bias):
            if gradient is not None:
                gradient.zero_()
        return
    weight = BlockSparseTensor.wrap(values.contiguous(), index.contiguous(), (out_features, in_features))
    kept = None if activation == "none" else _rows(before if activation == "gelu" else y)
    inner = _rows(grad_y)
    with device_of(x):
        if kept is not None or grad_bias is not None:
            inner = _activation_gradient(grad_bias, inner, kept, activation)
        if grad_x is not None:
            place = (
                grad_x
                if grad_x.is_contiguous()
                else torch.empty(grad_x.shape, dtype=x.dtype, device=x.device)
            )
            direction = _direction(weight, not transposed)
            _product(_rows(place), None, inner, weight.values, None, direction, "none")
            if place is not grad_x:
                grad_x.copy_(place)
        if grad_values is not None and weight.nnz:
            rows = _rows(x)
            _values_gradient(grad_values, *((rows, inner) if transposed else (inner, rows)), weight)


def _activation_gradient(
    grad_bias: Tensor | None, grad: Tensor, kept: Tensor | None, activation: str
) -> Tensor:
    """The gradient of what goes into the activation; fills that of the bias."""
    tokens, features = grad.shape
    inner = grad if kept is None else torch.empty_like(grad, memory_format=torch.contiguous_format)
    share = max(256, triton.next_power_of_2(triton.cdiv(tokens, GRADIENT_PROGRAMS)))
    shares = triton.cdiv(tokens, share)
    sums = None if grad_bias is None else _scratch(grad, shares, features)
    activation_gradient[(triton.cdiv(features, ACTIVATION["BLOCK_C"]), shares)](
        None if kept is None else inner, sums, grad, kept, tokens, share, features, grad.stride(0),
        0 if kept is None else kept.stride(0), activation, **ACTIVATION,
    )  # fmt: skip
    if grad_bias is not None and sums is not None:
        grad_bias.copy_(sums.sum(0))
    return inner


def _values_gradient(grad_values: Tensor, left: Tensor, right: Tensor, weight: BlockSparseTensor) -> None:
    (height, width), (bh, bw), tokens = weight.shape, weight.block_shape, len(left)
    config = values_configuration(bh, bw, left.element_size())
    direction = _direction(weight, False)
    lists = _groups(direction, config["GROUP"])
    parts = len(lists[0]) * max(1, bh // config["HEIGHT"])
    chunks = triton.cdiv(direction.across, max(1, config["WIDTH"] // bw)) * max(1, bw // config["WIDTH"])
    elements = grad_values.numel()
    shares = max(1, min(GRADIENT_PROGRAMS // (parts * chunks), PARTIAL_BYTES // (4 * elements)))
    share = triton.cdiv(triton.cdiv(tokens, shares), config["BLOCK_N"]) * config["BLOCK_N"]
    shares = triton.cdiv(tokens, share)
    direct = shares == 1 and grad_values.is_contiguous()
    target = grad_values if direct else _scratch(left, shares, *grad_values.shape)
    values_gradient[(parts * chunks, shares)](
        target, left, right, *lists, tokens, share, elements, height, width, direction.across, left.stride(0),
        right.stride(0), bh, bw, **config,
    )  # fmt: skip
    if not direct:
        grad_values.copy_(target.sum(0))


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    cases = (
        ((32, 32), 50432, (768, 768), "gelu"),
        ((16, 16), 50432, (384, 384), "relu"),
        ((64, 64), 197, (768, 768), "none"),
        ((128, 128), 50432, (768, 768), "none"),
    )
    for block, tokens, (inside, out), activation in cases:
        rows, columns = triton.cdiv(out, block[0]), triton.cdiv(inside, block[1])
        index = torch.empty(2 + rows + columns + 4 * rows * columns, dtype=torch.int32)
        values = torch.empty(rows * columns, *block, dtype=dtype)
        x, y, bias = (torch.empty(shape, dtype=dtype) for shape in ((tokens, inside), (tokens, out), (out,)))
        inputs: tuple[Any, ...] = (x, values, bias, index, out, inside, activation, False)

        def call(inputs=inputs, y=y):
            x, values, bias = inputs[:3]
            forward(y, y, *inputs)
            backward(x, values, bias, None, y, None, y, y, *inputs)

        yield f"{block[0]}x{block[1]} N={tokens}", call
