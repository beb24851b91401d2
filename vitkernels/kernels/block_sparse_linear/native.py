"""Hands block_sparse_linear to csrc/block_sparse_linear: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitkernels.core import native

# The order of csrc/block_sparse_linear/block_sparse_linear.h.
ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2}


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
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills y, and what goes into a GELU unless `before` is None. `module` and `cuda` let the tests run the CUDA
    kernels on the host."""
    module, index = module or native.load(), index.contiguous()  # a copy must outlive the call
    kept = None if before is None or activation != "gelu" else _rows(before)
    tensors = (_rows(y), kept, _rows(x), values.contiguous(), None if bias is None else bias.contiguous())
    params = _params(index, out_features, in_features, activation, transposed)
    _run(module, "forward", x.is_cuda if cuda is None else cuda, x, tensors, params)


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
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None. `before` is no result of the public function, so that its gradient
    never carries anything."""
    module = module or native.load()
    gradients = (grad_x, grad_values, grad_bias)
    if grad_y is None:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    places = [g if g is None or g.is_contiguous() else torch.empty_like(g, memory_format=torch.contiguous_format)
              for g in gradients]  # fmt: skip
    rows = _rows(grad_y)
    on_gpu = x.is_cuda if cuda is None else cuda
    inner = None
    if on_gpu and activation != "none":
        # The gradient of what goes into the activation; both products and the sum for the bias read it.
        inner = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kept = _rows(before) if activation == "gelu" else _rows(y) if activation == "relu" else None
    grad_rows = None if places[0] is None else _rows(places[0])
    tensors = (grad_rows, *places[1:], inner, rows, kept, _rows(x), values.contiguous())
    index = index.contiguous()  # a copy must outlive the call
    params = _params(index, out_features, in_features, activation, transposed)
    _run(module, "backward", on_gpu, x, tensors, params)
    for gradient, place in zip(gradients, places, strict=True):
        if gradient is not None and place is not None and place is not gradient:
            gradient.copy_(place)


def _rows(tensor: Tensor) -> Tensor:
    """[..., features] as a matrix [tokens, features] with dense rows; a copy only where no view is one."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _params(
    index: Tensor, out_features: int, in_features: int, activation: str, transposed: bool
) -> tuple[Any, ...]:
    return index.data_ptr(), out_features, in_features, ACTIVATIONS[activation], transposed


def _run(
    module: ModuleType, direction: str, cuda: bool, x: Tensor, tensors: tuple[Tensor | None, ...], params: Any
) -> None:
    """A CUDA call gets the bytes that its `..._workspace_cuda` asks for; the CPU's scratch belongs to its threads."""
    arguments = native.arguments(module, *tensors)
    name, workspace = f"block_sparse_linear_{direction}", None
    if cuda:
        size = getattr(module, f"{name}_workspace_cuda")(*arguments, *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    run = getattr(module, name + ("_cuda" if cuda else "_cpu"))
    run(*native.place(x), 0 if workspace is None else workspace.data_ptr(), *arguments, *params)
