"""Merging tokens by a plan: every row of the result is made of one group of tokens."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import check_device, check_dtype, check_tensor, fail
from vitkernels.core.merge_plan import MergePlan, check_groups, check_plan
from vitkernels.core.operator import Operator
from vitkernels.kernels.token_merge import reference

MODES = ("wavg", "sum", "mean", "amax")


def token_merge(
    x: torch.Tensor,
    plan: MergePlan,
    *,
    size: torch.Tensor | None = None,
    mode: str = "wavg",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the groups of a plan into one token each, and adds up how many original tokens each stands for.

    ::

        S[g]      = sum of size[i] over the tokens i of group g
        y[g]      = sum of size[i] x[i] / S[g]              mode "wavg"
                    sum of x[i]                              "sum"
                    sum of x[i] / (number of tokens in g)    "mean"
                    largest x[i], channel by channel         "amax"

    Sums run over the tokens of a group in rising order, in float32 (float64 for float64), and are rounded once: no
    atomics, deterministic. So is the backward pass, where each token reads its group's gradient: dx[i] =
    size[i] / S[g] dy[g], dy[g], or dy[g] / number; with "amax" the tokens that reach the largest value share it
    evenly. Plan and sizes are constants. Autocast changes nothing.

    Args:
        x: tokens, [batch, t, C], any strides; float16, bfloat16, float32 or float64.
        plan: what `bipartite_match` returned for t tokens. With plan.r = 0, y is x itself, in every mode.
        size: how many original tokens each token stands for, positive, [batch, t], float32 (float64 for float64 x),
            without a gradient; None for ones. It weighs the tokens in mode "wavg" alone.
        mode: "wavg", "sum", "mean" or "amax".
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        y, [batch, t - plan.r, C], in x's dtype, contiguous where anything was merged, and the sizes S,
        [batch, t - plan.r], in size's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, mode or backend name; size requires a gradient; a forced backend that
            cannot run the call.

    Paper: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023).

    Example:
        >>> x = torch.randn(2, 197, 384)
        >>> plan = bipartite_match(x, 13, class_token=True)
        >>> y, size = token_merge(x, plan)
        >>> y.shape, size.sum(1)
        (torch.Size([2, 184, 384]), tensor([197., 197.]))
    """
    check_plan(plan)
    if isinstance(size, torch.Tensor) and size.requires_grad:
        fail("size", "a tensor without a gradient", size, "Sizes are constants: call size.detach().")
    tensors = (x, size, plan.rows, plan.starts, plan.members)
    if plan.r == 0:
        operator.choose(_check(*tensors, mode), backend)
        return x, torch.ones_like(_allocate_sizes(*tensors)) if size is None else size
    y, sizes = operator(tensors, (mode,), backend)
    return y, sizes.detach()


def _check(x: Any, size: Any, rows: Any, starts: Any, members: Any, mode: Any) -> tuple[Any, ...]:
    check_groups(rows, starts, members)
    check_tensor("x", x, (*rows.shape, None), "[batch, tokens, channels] of the plan")
    check_dtype("x", x, FLOAT_DTYPES, "Cast it with x.float().")
    if x.shape[2] == 0:
        fail("x", "at least one channel", x)
    for indices in (rows, starts, members):
        check_device("plan", indices, x.device, "x")
    if mode not in MODES:
        fail("mode", "'wavg', 'sum', 'mean' or 'amax'", mode)
    if size is not None:
        check_tensor("size", size, tuple(rows.shape), "[batch, tokens]")
        check_device("size", size, x.device, "x")
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        check_dtype(
            "size", size, (wide,), f"Cast it with size.to({wide}): half precision holds no large counts."
        )
    return x, size, rows, starts, members, mode


def _allocate_y(x: torch.Tensor, size: Any, rows: Any, starts: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], starts.shape[1] - 1, x.shape[2]))


def _allocate_sizes(x: torch.Tensor, size: Any, rows: Any, starts: torch.Tensor, *_: Any) -> torch.Tensor:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty((x.shape[0], starts.shape[1] - 1), dtype=wide)


def _flops(*_: Any, mask: list[bool] | None) -> int:
    return 0  # no matrix product


_ROOM = "vitkernels.kernels.token_merge"

operator = Operator(
    "token_merge",
    tensors=("x", "size?", "rows", "starts", "members"),
    params="str mode",
    outputs=("y", "sizes"),
    check=_check,
    allocate=(_allocate_y, _allocate_sizes),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native"),
        Backend("triton", f"{_ROOM}.triton", dtypes=(torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", f"{_ROOM}.native"),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result="amax",
)
