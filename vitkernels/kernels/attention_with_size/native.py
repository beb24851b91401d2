"""Hands proportional attention to csrc/attention_with_size: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch

from vitkernels.core import native


def forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and lse unless it is None. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    run = (
        module.attention_with_size_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.attention_with_size_forward_cpu
    )
    q, k, v = native.dense(q, k, v)
    run(*native.place(q), *native.arguments(module, out, lse, q, k, v, size), scale)


def backward(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_size: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero. Sizes are constants."""
    module = module or native.load()
    if grad_size is not None:
        grad_size.zero_()
    wanted = (grad_q, grad_k, grad_v)
    filled = native.writable(*wanted)  # a gradient lies as its input does
    grad_out, q, k, v = native.dense(grad_out, q, k, v)
    tensors = native.arguments(module, *filled, grad_out, grad_lse, out, lse, q, k, v, size)
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.attention_with_size_backward_cuda
        nbytes = module.attention_with_size_workspace_cuda(*tensors[:3], *tensors[7:], scale)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=q.device)
    else:
        run = module.attention_with_size_backward_cpu
    run(*native.place(q), 0 if workspace is None else workspace.data_ptr(), *tensors, scale)
    native.deliver(wanted, filled)
