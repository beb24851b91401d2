"""Hands the residual FFN to csrc/residual_ffn: the CUDA kernels, or those for CPU tensors.

The backward is composed here, of PyTorch's operators.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

from vitkernels.core import native


def forward(
    out: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    scale1: torch.Tensor | None,
    scale2: torch.Tensor | None,
    dw_weight: torch.Tensor | None,
    dw_bias: torch.Tensor | None,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills out. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    rest = (weight1, bias1, weight2, bias2, scale1, scale2, dw_weight, dw_bias)
    if x.is_cuda if cuda is None else cuda:
        tensors = native.arguments(module, out, x, *rest)
        device, stream = native.place(x)
        size = module.residual_ffn_workspace_cuda(device, *tensors)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        address = 0 if workspace is None else workspace.data_ptr()
        module.residual_ffn_forward_cuda(device, stream, address, *tensors)
        return
    copied = None
    if not _one_step(x):
        x = x.contiguous()
    if not _one_step(out):
        copied, out = out, torch.empty_like(out, memory_format=torch.contiguous_format)
    module.residual_ffn_forward_cpu(torch.get_num_threads(), *native.arguments(module, out, x, *rest))
    if copied is not None:
        copied.copy_(out)


def _one_step(x: torch.Tensor) -> bool:
    """Whether every position of a map lies one and the same step behind the one before it."""
    _, _, height, width = x.shape
    _, _, row, step = x.stride()
    return height == 1 or width == 1 or row == width * step


def backward(
    grad_x: torch.Tensor | None,
    grad_weight1: torch.Tensor | None,
    grad_bias1: torch.Tensor | None,
    grad_weight2: torch.Tensor | None,
    grad_bias2: torch.Tensor | None,
    grad_scale1: torch.Tensor | None,
    grad_scale2: torch.Tensor | None,
    grad_dw_weight: torch.Tensor | None,
    grad_dw_bias: torch.Tensor | None,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    scale1: torch.Tensor | None,
    scale2: torch.Tensor | None,
    dw_weight: torch.Tensor | None,
    dw_bias: torch.Tensor | None,
) -> None:
    """Fills the gradients that are not None. The hidden layer is computed again, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    x, grad = x.to(dtype), grad_out.to(dtype)
    first, second = (weight.flatten(1).to(dtype) for weight in (weight1, weight2))
    taps = None if dw_weight is None else dw_weight[:, None].to(dtype)
    u = x
    if taps is not None and dw_bias is not None:
        u = x + F.conv2d(x, taps, dw_bias.to(dtype), padding=1, groups=channels)

    # Positions as the rows of matrices.
    tokens, grad_y = (t.movedim(1, -1).reshape(-1, channels) for t in (u, grad))
    product1 = tokens @ first.T
    before = (product1 if scale1 is None else product1 * scale1.to(dtype)) + bias1.to(dtype)
    hidden = F.relu(before)
    grad_product2 = grad_y if scale2 is None else grad_y * scale2.to(dtype)
    _fill(grad_bias2, lambda: grad_y.sum(0))
    _fill(grad_scale2, lambda: (grad_y * (hidden @ second.T)).sum(0))
    _fill(grad_weight2, lambda: grad_product2.T @ hidden)
    wanted = (grad_x, grad_weight1, grad_bias1, grad_scale1, grad_dw_weight, grad_dw_bias)
    if all(t is None for t in wanted):
        return
    # Not a product with the ReLU's slope: an infinite gradient times 0 is not a number.
    grad_before = torch.where(before > 0, grad_product2 @ second, 0)
    grad_product1 = grad_before if scale1 is None else grad_before * scale1.to(dtype)
    _fill(grad_bias1, lambda: grad_before.sum(0))
    _fill(grad_scale1, lambda: (grad_before * product1).sum(0))
    _fill(grad_weight1, lambda: grad_product1.T @ tokens)
    if grad_x is None and grad_dw_weight is None and grad_dw_bias is None:
        return
    grad_u = (grad_y + grad_product1 @ first).unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)
    _fill(grad_dw_bias, lambda: grad_u.sum((0, 2, 3)))
    if taps is None:
        _fill(grad_x, lambda: grad_u)
        return
    mask = [grad_x is not None, grad_dw_weight is not None, False]
    through, of_taps, _ = torch.ops.aten.convolution_backward(
        grad_u, x, taps, None, [1, 1], [1, 1], [1, 1], False, [0, 0], channels, mask
    )
    _fill(grad_x, lambda: grad_u + through)
    _fill(grad_dw_weight, lambda: of_taps[:, 0])


def _fill(grad: torch.Tensor | None, value: object) -> None:
    if grad is not None:
        grad.copy_(value().reshape(grad.shape))  # type: ignore[operator]
