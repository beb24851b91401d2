"""Hands window attention to csrc/window_attention: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from vitkernels.core import native
from vitkernels.core.native import DTYPES, view


def _problem(q: torch.Tensor, v: torch.Tensor, bias_table: torch.Tensor | None, *params: Any) -> tuple[Any, ...]:
    window_h, window_w, signed_bias, scale = params
    batch, heads, _, head_dim = q.shape
    bias_dtype = q.dtype if bias_table is None else bias_table.dtype
    return (
        *(DTYPES[q.dtype], DTYPES[bias_dtype]),
        *(batch, heads, window_h, window_w, head_dim, v.shape[3], signed_bias, scale),
    )


def forward(
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
    """Fills out and lse. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    run = (
        module.window_attention_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.window_attention_forward_cpu
    )
    problem = _problem(q, v, bias_table, *params)
    run(*native.place(q), problem, view(q), view(k), view(v), view(bias_table), view(out), view(lse))


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
    module = module or native.load()
    problem = _problem(q, v, bias_table, *params)
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.window_attention_backward_cuda
        size = module.window_attention_workspace_cuda(problem, grad_bias_table is not None)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        run = module.window_attention_backward_cpu
    run(
        *native.place(q),
        problem,
        *(view(t) for t in (q, k, v, bias_table, out, lse, grad_out, grad_lse)),
        *(view(t) for t in (grad_q, grad_k, grad_v, grad_bias_table)),
        0 if workspace is None else workspace.data_ptr(),
    )
