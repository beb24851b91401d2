"""Hands token_merge to csrc/token_merge: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from vitkernels.core import native

_MODES = {"wavg": 0, "sum": 1, "mean": 2, "amax": 3}


def forward(
    y: Tensor,
    sizes: Tensor,
    x: Tensor,
    size: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    mode: str,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills y and sizes. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    on_device = x.is_cuda if cuda is None else cuda
    run = module.token_merge_forward_cuda if on_device else module.token_merge_forward_cpu
    (tokens,), plan = native.dense(x), native.indices(rows, starts, members)  # copies must outlive the call
    run(*native.place(x), *native.arguments(module, y, sizes, tokens, size, *plan), _MODES[mode])


def backward(
    grad_x: Tensor | None,
    grad_size: Tensor | None,
    grad_rows: Tensor | None,
    grad_starts: Tensor | None,
    grad_members: Tensor | None,
    grad_y: Tensor | None,
    grad_sizes: Tensor | None,
    y: Tensor,
    sizes: Tensor,
    x: Tensor,
    size: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    mode: str,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills grad_x unless it is None. Sizes are constants."""
    if grad_size is not None:
        grad_size.zero_()
    if grad_x is None:
        return
    if grad_y is None:
        grad_x.zero_()
        return
    module = module or native.load()
    on_device = x.is_cuda if cuda is None else cuda
    run = module.token_merge_backward_cuda if on_device else module.token_merge_backward_cpu
    wanted = (grad_x,)
    filled = native.writable(*wanted)
    upstream, tokens = native.dense(grad_y, x)
    y = y.contiguous()  # which hooks on saved tensors need not keep
    plan = native.indices(rows, starts, members)
    tensors = native.arguments(module, *filled, upstream, y, sizes, tokens, size, *plan)
    run(*native.place(x), *tensors, _MODES[mode])
    native.deliver(wanted, filled)
