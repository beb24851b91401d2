"""Bipartite soft matching: which r of the even tokens merge into which of the odd ones."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import check_dtype, check_tensor, fail
from vitkernels.core.merge_plan import MergePlan
from vitkernels.core.operator import Operator
from vitkernels.kernels.bipartite_match import reference


def bipartite_match(
    metric: torch.Tensor,
    r: int,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    backend: str | None = None,
) -> MergePlan:
    """Pairs the r even tokens that resemble an odd token most with that token: ToMe's matching.

    Every even token's best partner is the odd token of the highest cosine. The r even tokens with the best partners
    merge into them; several may share one. Scores are float32 (float64 for float64) in every dtype, under autocast
    too, and are not kept. Feed the result to `token_merge` and `token_unmerge`.

    The choice is deterministic: of equal scores the lower token wins, as partner and in the ranking. (The official
    code leaves ties open, and ranks scores rounded to half precision under autocast.) A token of zeros has cosine 0
    with every other, so that no score is NaN because of it; a score that is NaN ranks below all numbers.

    The merged sequence lists the even tokens that stay, then all odd tokens, each in the place of its group. With
    class_token those even tokens keep their order; without, they go by falling similarity. With distill_token the
    first odd token comes second.

    Args:
        metric: what resembles what, [batch, t, c], any strides; float16, bfloat16, float32 or float64. Commonly the
            mean of an attention's keys over its heads. No gradient passes through it.
        r: how many tokens to take away; at most (t - protected tokens) // 2 are. r <= 0 merges nothing.
        class_token: token 0 is one, and merges into nothing.
        distill_token: token 1 is one, and nothing merges into it.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        a MergePlan, with the row of every token, the tokens of every row, and the pairs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or backend name; a forced backend that cannot run the call.

    Paper: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023).

    Example:
        >>> plan = bipartite_match(torch.randn(2, 197, 64), 16, class_token=True)
        >>> plan.merged_tokens, plan.src.shape
        (181, torch.Size([2, 16]))
    """
    if isinstance(metric, torch.Tensor) and metric.requires_grad:
        metric = metric.detach()
    told = (class_token, distill_token)
    if _merges_nothing(metric, r, *told):
        operator.choose(_check(metric, r, *told), backend)
        return MergePlan.identity(metric.shape[0], metric.shape[1], metric.device, *told)
    rows, starts, members, src, dst = operator((metric,), (r, *told), backend)
    return MergePlan(rows, starts, members, src, dst, *told)


def _merges_nothing(metric: Any, r: Any, class_token: Any, distill_token: Any) -> bool:
    if not isinstance(metric, torch.Tensor) or metric.ndim != 3 or not isinstance(r, (int, torch.SymInt)):
        return False  # for the checks to say
    return clipped(metric.shape[1], r, class_token is True, distill_token is True) == 0


def clipped(tokens: int, r: Any, class_token: bool, distill_token: bool) -> int:
    """How many of the tokens merge when r are asked for."""
    if distill_token and tokens < 4:
        return 0  # the only odd token is the one that nothing merges into
    kept = int(class_token) + int(distill_token)  # torch.jit.trace has tensors for sizes, which take no bools
    return max(0, min(r, (tokens - kept) // 2))


def _check(metric: Any, r: Any, class_token: Any, distill_token: Any) -> tuple[Any, ...]:
    check_tensor("metric", metric, (None, None, None), "[batch, tokens, channels]")
    check_dtype("metric", metric, FLOAT_DTYPES, "Cast it with metric.float().")
    if metric.shape[1] == 0 or metric.shape[2] == 0:
        fail("metric", "at least one token and one channel", metric)
    if type(r) is not int and not isinstance(r, torch.SymInt):
        fail("r", "an int, the number of tokens to merge", r, kind=TypeError)
    for name, value in (("class_token", class_token), ("distill_token", distill_token)):
        if type(value) is not bool:
            fail(name, "True or False", value, kind=TypeError)
    return metric, clipped(metric.shape[1], r, class_token, distill_token), class_token, distill_token


def _allocate_rows(metric: torch.Tensor, *_: Any) -> torch.Tensor:
    return metric.new_empty(metric.shape[:2], dtype=torch.int32)


def _allocate_starts(metric: torch.Tensor, r: int, *_: Any) -> torch.Tensor:
    return metric.new_empty((metric.shape[0], metric.shape[1] - r + 1), dtype=torch.int32)


def _allocate_pairs(metric: torch.Tensor, r: int, *_: Any) -> torch.Tensor:
    return metric.new_empty((metric.shape[0], r), dtype=torch.int32)


def _flops(metric: Any, r: int, *_: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the scores of the even tokens with the odd ones."""
    batch, tokens, channels = metric
    return 2 * batch * ((tokens + 1) // 2) * (tokens // 2) * channels if mask is None and r > 0 else 0


_ROOM = "vitkernels.kernels.bipartite_match"

operator = Operator(
    "bipartite_match",
    tensors=("metric",),
    params="int r, bool class_token, bool distill_token",
    outputs=("rows", "starts", "members", "src", "dst"),
    check=_check,
    allocate=(_allocate_rows, _allocate_starts, _allocate_rows, _allocate_pairs, _allocate_pairs),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native"),
        Backend("triton", f"{_ROOM}.triton", dtypes=(torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", f"{_ROOM}.native"),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
