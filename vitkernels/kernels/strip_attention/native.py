"""Hands strip attention to csrc/strip_attention: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch

from vitkernels.core import native


def spread(attn_bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The bias as a view [batch, heads, N, M], with strides of 0 along the dimensions that it lacks."""
    if attn_bias is None:
        return None
    return attn_bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def logit_gradient(
    grad_attn_bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """Where the kernels write the gradient of every logit, [batch, heads, N, M]; None where nobody asked for it.

    It is the bias's own gradient where the bias has that shape. A smaller bias costs a tensor of all logits, in the
    dtype of the accumulation, which `fold` then sums up.
    """
    if grad_attn_bias is None:
        return None
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if grad_attn_bias.shape == shape:
        return grad_attn_bias
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(shape, dtype=dtype)


def fold(grad_attn_bias: torch.Tensor | None, grad_logits: torch.Tensor | None) -> None:
    """Sums the gradients of the logits over the dimensions that the bias lacks."""
    if grad_attn_bias is not None and grad_logits is not None and grad_logits is not grad_attn_bias:
        grad_attn_bias.copy_(grad_logits.sum_to_size(grad_attn_bias.shape))


def forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out, and lse unless it is None. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    run = (
        module.strip_attention_forward_cuda
        if (q.is_cuda if cuda is None else cuda)
        else module.strip_attention_forward_cpu
    )
    q, k, v = native.dense(q, k, v)
    tensors = native.arguments(module, out, lse, q, k, v, spread(attn_bias, q, k))
    run(*native.place(q), *tensors, scale)


def backward(
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_attn_bias: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    scale: float,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero."""
    module = module or native.load()
    wanted = (grad_q, grad_k, grad_v)
    filled = native.writable(*wanted)  # a gradient lies as its input does
    grad_logits = logit_gradient(grad_attn_bias, q, k)
    grad_out, q, k, v = native.dense(grad_out, q, k, v)
    inputs = (grad_out, grad_lse, out, lse, q, k, v, spread(attn_bias, q, k))
    tensors = native.arguments(module, *filled, grad_logits, *inputs)
    workspace = None
    if q.is_cuda if cuda is None else cuda:
        run = module.strip_attention_backward_cuda
        size = module.strip_attention_workspace_cuda(*tensors[:4], *tensors[8:], scale)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        run = module.strip_attention_backward_cpu
    run(*native.place(q), 0 if workspace is None else workspace.data_ptr(), *tensors, scale)
    native.deliver(wanted, filled)
    fold(grad_attn_bias, grad_logits)
