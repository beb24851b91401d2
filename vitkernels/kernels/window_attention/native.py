"""Hands window attention to csrc/window_attention: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from vitkernels.core import native


def forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and lse unless it is None. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    if module is None:
        module = native.load()
        if native.lends and not q.is_cuda:  # spelled out: of a small window's call, the rest below is a tenth
            threads = torch.get_num_threads()
            module.window_attention_forward_cpu(threads, 0, out, lse, q, k, v, bias_table, *params)
            return
    run = (
        module.window_attention_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.window_attention_forward_cpu
    )
    run(*native.place(q), *native.arguments(module, out, lse, q, k, v, bias_table), *params)


def backward(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_bias_table: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero."""
    if module is None:
        module = native.load()
        if native.lends and not q.is_cuda:
            module.window_attention_backward_cpu(
                torch.get_num_threads(),
                *(
                    0,
                    0,
                    grad_q,
                    grad_k,
                    grad_v,
                    grad_bias_table,
                    grad_out,
                    grad_lse,
                    out,
                    lse,
                    q,
                    k,
                    v,
                    bias_table,
                ),
                *params,
            )
            return
    tensors = native.arguments(
        module,
        *(grad_q, grad_k, grad_v, grad_bias_table, grad_out, grad_lse, out, lse, q, k, v, bias_table),
    )
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.window_attention_backward_cuda
        size = module.window_attention_workspace_cuda(tensors[3], *tensors[8:], *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        run = module.window_attention_backward_cpu
    run(*native.place(q), 0 if workspace is None else workspace.data_ptr(), *tensors, *params)
