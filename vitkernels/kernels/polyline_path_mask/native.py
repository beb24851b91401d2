"""Hands polyline_path_mask to csrc/polyline_path_mask: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkernels.core import native


def forward(
    mask: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    log: bool,
    transpose: bool,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills mask. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    decays = native.arguments(module, log_decay_w, log_decay_h)
    workspace = None
    if log_decay_w.is_cuda if cuda is None else cuda:
        run = module.polyline_path_mask_forward_cuda
        size = module.polyline_path_mask_forward_workspace_cuda(*decays, log, transpose)
        workspace = torch.empty(size, dtype=torch.uint8, device=mask.device)
    else:
        run = module.polyline_path_mask_forward_cpu
    address = 0 if workspace is None else workspace.data_ptr()
    run(*native.place(log_decay_w), address, *native.arguments(module, mask), *decays, log, transpose)


def backward(
    grad_log_decay_w: Tensor | None,
    grad_log_decay_h: Tensor | None,
    grad_mask: Tensor | None,
    mask: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    log: bool,
    transpose: bool,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None."""
    module = module or native.load()
    if grad_mask is None:
        for gradient in (grad_log_decay_w, grad_log_decay_h):
            if gradient is not None:
                gradient.zero_()
        return
    if grad_mask.stride(-1) != 1 and grad_mask.shape[-1] > 1:
        grad_mask = grad_mask.contiguous()
    decays = native.arguments(module, log_decay_w, log_decay_h)
    workspace = None
    if log_decay_w.is_cuda if cuda is None else cuda:
        run = module.polyline_path_mask_backward_cuda
        size = module.polyline_path_mask_backward_workspace_cuda(*decays, log, transpose)
        workspace = torch.empty(size, dtype=torch.uint8, device=mask.device)
    else:
        run = module.polyline_path_mask_backward_cpu
    address = 0 if workspace is None else workspace.data_ptr()
    gradients = native.arguments(module, grad_log_decay_w, grad_log_decay_h, grad_mask)
    run(*native.place(log_decay_w), address, *gradients, *decays, log, transpose)
