"""Hands cascaded group attention to csrc/cascaded_group_attention: the CUDA kernels, or those for CPU tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from vitkernels.core import native


def forward(
    out: torch.Tensor,
    heads: torch.Tensor | None,
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor,
    attn_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and heads unless it is None. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    if module is None:
        module = native.load()
        if native.lends and not x.is_cuda:  # spelled out: of a small window's call, the rest below is a tenth
            module.cascaded_group_attention_forward_cpu(
                *(torch.get_num_threads(), 0, out, heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias),
                *(attn_bias, proj_weight, proj_bias),
                *params,
            )
            return
    tensors = native.arguments(
        module,
        *(out, heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias),
    )
    if not (x.is_cuda if cuda is None else cuda):
        module.cascaded_group_attention_forward_cpu(*native.place(x), *tensors, *params)
        return
    lacking = module.cascaded_group_attention_forward_cuda(*native.place(x), 0, *tensors, *params)
    if lacking:  # a window too large for shared memory, or weights to convert; the first call did nothing
        workspace = torch.empty(lacking, dtype=torch.uint8, device=x.device)
        place = native.place(x)
        module.cascaded_group_attention_forward_cuda(*place, workspace.data_ptr(), *tensors, *params)


def backward(
    grad_x: torch.Tensor | None,
    grad_qkv_weight: torch.Tensor | None,
    grad_qkv_bias: torch.Tensor | None,
    grad_dw_weight: torch.Tensor | None,
    grad_dw_bias: torch.Tensor | None,
    grad_attn_bias: torch.Tensor | None,
    grad_proj_weight: torch.Tensor | None,
    grad_proj_bias: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_heads: torch.Tensor | None,
    out: torch.Tensor,
    heads: torch.Tensor,
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor,
    attn_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero."""
    module = module or native.load()
    inputs = (x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias)
    grads = (
        *(grad_x, grad_qkv_weight, grad_qkv_bias, grad_dw_weight, grad_dw_bias),
        *(grad_attn_bias, grad_proj_weight, grad_proj_bias),
    )
    tensors = native.arguments(module, *grads, grad_out, grad_heads, heads, *inputs)
    workspace = None
    if x.is_cuda if cuda is None else cuda:
        run = module.cascaded_group_attention_backward_cuda
        size = module.cascaded_group_attention_workspace_cuda(*tensors, *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    else:
        run = module.cascaded_group_attention_backward_cpu
    run(*native.place(x), 0 if workspace is None else workspace.data_ptr(), *tensors, *params)
