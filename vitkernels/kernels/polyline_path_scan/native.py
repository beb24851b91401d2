"""Hands polyline_path_scan to csrc/polyline_path_scan: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkernels.core import native


def gradient_place(grad_x: Tensor | None, x: Tensor) -> Tensor:
    """Where the gradient of x is made, also when nobody asked for it."""
    if grad_x is not None and (grad_x.stride(-1) == 1 or grad_x.shape[-1] == 1):
        return grad_x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def forward(
    y: Tensor,
    x: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    transpose: bool,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills y. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    on_device = x.is_cuda if cuda is None else cuda
    run = module.polyline_path_scan_forward_cuda if on_device else module.polyline_path_scan_forward_cpu
    (tokens,) = native.dense(x)  # named: a copy must outlive the call
    tensors = native.arguments(module, y, tokens, log_decay_w, log_decay_h)
    run(*native.place(x), *tensors, transpose)


def backward(
    grad_x: Tensor | None,
    grad_log_decay_w: Tensor | None,
    grad_log_decay_h: Tensor | None,
    grad_y: Tensor | None,
    y: Tensor,
    x: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    transpose: bool,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None."""
    module = module or native.load()
    if grad_y is None:
        for gradient in (grad_x, grad_log_decay_w, grad_log_decay_h):
            if gradient is not None:
                gradient.zero_()
        return
    on_device = x.is_cuda if cuda is None else cuda
    run = module.polyline_path_scan_backward_cuda if on_device else module.polyline_path_scan_backward_cpu
    place = gradient_place(grad_x, x)
    (buffer,) = native.arguments(module, place)
    upstream, tokens = native.dense(grad_y, x)  # named: copies must outlive the call
    tensors = native.arguments(
        module, grad_log_decay_w, grad_log_decay_h, upstream, tokens, log_decay_w, log_decay_h
    )
    run(*native.place(x), buffer, grad_x is not None, *tensors, transpose)
    if grad_x is not None and place is not grad_x:
        grad_x.copy_(place)
