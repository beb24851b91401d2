"""Hands kan_linear to csrc/kan_linear: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkernels.core import native
from vitkernels.kernels.kan_linear.layout import Results, matrix, vector


def _small(x: Tensor, vectors: tuple[Tensor, ...], cuda: bool) -> tuple[Tensor, ...]:
    """The CUDA kernels read x's dtype too, so that no cast is launched before them."""
    return tuple(t.contiguous() if cuda else vector(t, x) for t in vectors)


def forward(
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    x: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    grid: Tensor,
    inv_denominator: float,
    eps: float,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills y, and mean and rstd unless they are None. `module` and `cuda` let the tests run the CUDA kernels on the
    host."""
    module = module or native.load()
    cuda = x.is_cuda if cuda is None else cuda
    rows, small = matrix(x), _small(x, (ln_weight, ln_bias, grid), cuda)
    means = (None, None) if mean is None or rstd is None else (mean.view(-1), rstd.view(-1))
    tensors = native.arguments(module, y.view(-1, y.shape[-1]), *means, rows, matrix(weight), *small)
    params = (inv_denominator, eps)
    workspace = None
    if cuda:
        run = module.kan_linear_forward_cuda
        size = module.kan_linear_forward_workspace_cuda(*tensors, *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    else:
        run = module.kan_linear_forward_cpu
    run(*native.place(x), 0 if workspace is None else workspace.data_ptr(), *tensors, *params)


def backward(
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_ln_weight: Tensor | None,
    grad_ln_bias: Tensor | None,
    grad_grid: Tensor | None,
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    grid: Tensor,
    inv_denominator: float,
    eps: float,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None. mean and rstd are no results of the public function, so that their
    gradients never carry anything."""
    module = module or native.load()
    gradients = (grad_x, grad_weight, grad_ln_weight, grad_ln_bias, grad_grid)
    if grad_y is None:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    cuda = x.is_cuda if cuda is None else cuda
    results = Results()
    places = (
        results.matrix(grad_x),
        results.matrix(grad_weight),
        *(results.matrix(t) if cuda else results.vector(t, x) for t in gradients[2:]),
    )
    inputs = (
        *(matrix(grad_y), mean.view(-1), rstd.view(-1), matrix(x), matrix(weight)),
        *_small(x, (ln_weight, ln_bias, grid), cuda),
    )
    tensors, params = native.arguments(module, *places, *inputs), (inv_denominator, eps)
    workspace = None
    if cuda:
        run = module.kan_linear_backward_cuda
        size = module.kan_linear_backward_workspace_cuda(*tensors, *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    else:
        run = module.kan_linear_backward_cpu
    run(*native.place(x), 0 if workspace is None else workspace.data_ptr(), *tensors, *params)
    results.deliver()
