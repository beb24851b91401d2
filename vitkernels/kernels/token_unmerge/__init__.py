"""Unmerging: every token of the long sequence gets the row of its group."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import check_device, check_dtype, check_tensor
from vitkernels.core.merge_plan import MergePlan, check_groups, check_plan
from vitkernels.core.operator import Operator
from vitkernels.kernels.token_unmerge import reference


def token_unmerge(y: torch.Tensor, plan: MergePlan, *, backend: str | None = None) -> torch.Tensor:
    """Brings a merged sequence back to its length: x[i] = y[g] for every token i of group g.

    Forward it is a gather; backward it sums the gradients of each group in rising order, in float32 (float64 for
    float64), as `token_merge` does in mode "sum", whose transpose it is. No atomics, deterministic. Autocast changes
    nothing.

    Args:
        y: merged tokens, [batch, plan.merged_tokens, C], any strides; float16, bfloat16, float32 or float64.
        plan: what they were merged by. With plan.r = 0, the result is y itself.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        x, [batch, plan.tokens, C], in y's dtype, contiguous where anything was merged.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; a forced backend that cannot run the call.

    Paper: Token Merging for Fast Stable Diffusion (Bolya and Hoffman, CVPR workshops 2023).

    Example:
        >>> x = torch.randn(2, 4096, 320)
        >>> plan = bipartite_match(x, 1024)
        >>> token_unmerge(token_merge(x, plan, mode="mean")[0], plan).shape
        torch.Size([2, 4096, 320])
    """
    check_plan(plan)
    tensors = (y, plan.rows, plan.starts, plan.members)
    if plan.r == 0:
        operator.choose(_check(*tensors), backend)
        return y
    return operator(tensors, (), backend)[0]


def _check(y: Any, rows: Any, starts: Any, members: Any) -> tuple[Any, ...]:
    check_groups(rows, starts, members)
    wanted = (starts.shape[0], starts.shape[1] - 1, None)
    check_tensor("y", y, wanted, "[batch, merged tokens, channels] of the plan")
    check_dtype("y", y, FLOAT_DTYPES, "Cast it with y.float().")
    for indices in (rows, starts, members):
        check_device("plan", indices, y.device, "y")
    return y, rows, starts, members


def _allocate(y: torch.Tensor, rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return y.new_empty((*rows.shape, y.shape[2]))


def _flops(*_: Any, mask: list[bool] | None) -> int:
    return 0  # no matrix product


_ROOM = "vitkernels.kernels.token_unmerge"

operator = Operator(
    "token_unmerge",
    tensors=("y", "rows", "starts", "members"),
    params="",
    outputs=("x",),
    check=_check,
    allocate=(_allocate,),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native"),
        Backend("triton", f"{_ROOM}.triton", dtypes=(torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", f"{_ROOM}.native"),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
