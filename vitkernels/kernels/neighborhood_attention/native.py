"""Hands neighborhood attention to csrc/neighborhood_attention: the CUDA kernels, or those of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from vitkernels.core import native


def _on_map(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Any, ...]:
    """The parameters of the kernels, which know 2-D maps alone: a sequence is a map of height 1."""
    if len(kernel_size) == 1:
        return 1, kernel_size[0], 1, dilation[0], False, is_causal[0], scale
    return (*kernel_size, *dilation, *is_causal, scale)


def forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and lse unless it is None. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    run = (
        module.neighborhood_attention_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.neighborhood_attention_forward_cpu
    )
    q, k, v = native.dense(q, k, v)
    tensors = native.arguments(module, out, lse, q, k, v, rpb)
    run(*native.place(q), *tensors, *_on_map(*params))


def backward(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_rpb: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    *params: Any,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero."""
    module = module or native.load()
    wanted = (grad_q, grad_k, grad_v)
    filled = native.writable(*wanted)  # a gradient lies as its input does
    grad_out, q, k, v = native.dense(grad_out, q, k, v)
    tensors = native.arguments(module, *filled, grad_rpb, grad_out, grad_lse, out, lse, q, k, v, rpb)
    options = _on_map(*params)
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.neighborhood_attention_backward_cuda
        size = module.neighborhood_attention_workspace_cuda(*tensors[:4], *tensors[8:], *options)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        run = module.neighborhood_attention_backward_cpu
    run(*native.place(q), 0 if workspace is None else workspace.data_ptr(), *tensors, *options)
    native.deliver(wanted, filled)
