"""Launches the Triton kernels of token merging, which are in core/triton_token_groups.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.core.triton_token_groups import reduced, shared_among_largest, spread


def forward(
    y: Tensor, sizes: Tensor, x: Tensor, size: Tensor | None, rows: Tensor, starts: Tensor, members: Tensor,
    mode: str,
) -> None:  # fmt: skip
    """Fills y and sizes."""
    reduced(y, sizes, x, size, starts, members, mode)


def backward(
    grad_x: Tensor | None,
    grad_size: Tensor | None,
    grad_rows: None,
    grad_starts: None,
    grad_members: None,
    grad_y: Tensor | None,
    grad_sizes: None,
    y: Tensor,
    sizes: Tensor,
    x: Tensor,
    size: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    mode: str,
) -> None:
    """Fills the gradients that are not None; plan and sizes are constants, and their gradients zero or None."""
    if grad_size is not None:
        grad_size.zero_()
    if grad_x is None:
        return
    if grad_y is None:
        grad_x.zero_()
    elif mode == "amax":
        shared_among_largest(grad_x, grad_y, y, x, starts, members)
    else:
        spread(grad_x, grad_y, size, sizes, rows, starts, mode)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    tokens, merged, channels = 197, 181, 768
    x, y = torch.empty(1, tokens, channels, dtype=dtype), torch.empty(1, merged, channels, dtype=dtype)
    size, sizes = torch.empty(1, tokens), torch.empty(1, merged)
    rows, starts = torch.empty(1, tokens, dtype=torch.int32), torch.empty(1, merged + 1, dtype=torch.int32)
    for mode in ("wavg", "mean", "amax"):
        inputs = (x, size, rows, starts, rows, mode)

        def call(inputs=inputs):
            forward(y, sizes, *inputs)
            backward(x, None, None, None, None, y, None, y, sizes, *inputs)

        yield mode, call
