"""Hands token_unmerge to csrc/token_unmerge: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from vitkernels.core import native


def forward(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills x. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    on_device = y.is_cuda if cuda is None else cuda
    run = module.token_unmerge_forward_cuda if on_device else module.token_unmerge_forward_cpu
    (merged,), plan = native.dense(y), native.indices(rows, starts, members)  # copies must outlive the call
    run(*native.place(y), *native.arguments(module, x, merged, *plan))


def backward(
    grad_y: Tensor | None,
    grad_rows: Tensor | None,
    grad_starts: Tensor | None,
    grad_members: Tensor | None,
    grad_x: Tensor | None,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills grad_y unless it is None."""
    if grad_y is None:
        return
    if grad_x is None:
        grad_y.zero_()
        return
    module = module or native.load()
    on_device = y.is_cuda if cuda is None else cuda
    run = module.token_unmerge_backward_cuda if on_device else module.token_unmerge_backward_cpu
    wanted = (grad_y,)
    filled, (upstream,) = native.writable(*wanted), native.dense(grad_x)
    plan = native.indices(rows, starts, members)
    run(*native.place(y), *native.arguments(module, *filled, upstream, *plan))
    native.deliver(wanted, filled)
