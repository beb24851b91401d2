"""Hands learnable token merging to csrc/learnable_token_merge: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch

from vitkernels.core import native


def _some(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """None for the empty tensor that stands for a result which is not there."""
    return None if tensor is None or tensor.numel() == 0 else tensor


def _mask(g: torch.Tensor) -> torch.Tensor:
    """The mask with merged tokens side by side, and a batch stride that is not 0: that is how the kernels know a shared
    one."""
    if g.ndim == 3 and g.stride(0) == 0:
        return g.contiguous()
    return native.dense(g)[0]


def forward(
    y: torch.Tensor,
    y_other: torch.Tensor,
    divisors: torch.Tensor,
    z: torch.Tensor,
    g: torch.Tensor,
    other: torch.Tensor | None,
    normalize: str,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the outputs. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    z, other = native.dense(z, other)
    tensors = native.arguments(module, y, _some(y_other), _some(divisors), z, _mask(g), other)
    workspace = None
    if z.is_cuda if cuda is None else cuda:
        run = module.learnable_token_merge_forward_cuda
        nbytes = module.learnable_token_merge_forward_workspace_cuda(*tensors[3:], normalize)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=z.device) if nbytes else None
    else:
        run = module.learnable_token_merge_forward_cpu
    run(*native.place(z), 0 if workspace is None else workspace.data_ptr(), *tensors, normalize)


def backward(
    grad_z: torch.Tensor | None,
    grad_g: torch.Tensor | None,
    grad_other: torch.Tensor | None,
    grad_y: torch.Tensor | None,
    grad_y_other: torch.Tensor | None,
    grad_divisors: torch.Tensor | None,
    y: torch.Tensor,
    y_other: torch.Tensor,
    divisors: torch.Tensor,
    z: torch.Tensor,
    g: torch.Tensor,
    other: torch.Tensor | None,
    normalize: str,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the gradients that are not None; an incoming gradient that is None is zero. The divisors are no results
    of the public function, so that their gradient never carries anything."""
    module = module or native.load()
    wanted = (grad_z, grad_g, None if other is None else grad_other)
    filled = native.writable(*wanted)  # a gradient lies as its input does
    grad_y, grad_y_other, z, other = native.dense(grad_y, None if other is None else grad_y_other, z, other)
    inputs = (grad_y, grad_y_other, y, _some(y_other), _some(divisors), z, _mask(g), other)
    tensors = native.arguments(module, *filled, *inputs)
    workspace = None
    if z.is_cuda if cuda is None else cuda:
        run = module.learnable_token_merge_backward_cuda
        nbytes = module.learnable_token_merge_workspace_cuda(*tensors[:5], *tensors[8:], normalize)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=z.device)
    else:
        run = module.learnable_token_merge_backward_cpu
    run(*native.place(z), 0 if workspace is None else workspace.data_ptr(), *tensors, normalize)
    native.deliver(wanted, filled)
