"""Launches the Triton kernels of unmerging, which are in core/triton_token_groups.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitkernels.core.triton_token_groups import reduced, spread


def forward(x: Tensor, y: Tensor, rows: Tensor, starts: Tensor, members: Tensor) -> None:
    """Fills x."""
    spread(x, y, None, None, rows, starts, "sum")


def backward(
    grad_y: Tensor | None,
    grad_rows: None,
    grad_starts: None,
    grad_members: None,
    grad_x: Tensor | None,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
) -> None:
    """Fills grad_y unless it is None; the plan is constant, and its gradients None."""
    if grad_y is None:
        return
    if grad_x is None:
        grad_y.zero_()
    else:
        reduced(grad_y, None, grad_x, None, starts, members, "sum")


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    x, y = torch.empty(2, 4096, 320, dtype=dtype), torch.empty(2, 2048, 320, dtype=dtype)
    rows, starts = torch.empty(2, 4096, dtype=torch.int32), torch.empty(2, 2049, dtype=torch.int32)

    def call():
        forward(x, y, rows, starts, rows)
        backward(y, None, None, None, x, x, y, rows, starts, rows)

    yield "4096 tokens, C=320", call
