"""Bipartite matching in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import contextlib

import torch

from vitkernels.core.checks import autocasts
from vitkernels.core.merge_plan import groups


def similarities(metric: torch.Tensor) -> torch.Tensor:
    """Cosines [batch, ceil(t / 2), floor(t / 2)] of the even tokens with the odd ones, in float32 (float64).

    A row of zeros has similarity 0 with everything; what is not a number counts as -2, below every cosine. PyTorch's
    product may round equal tokens differently by their place, so that of such it is not the lower one that wins, as in
    the kernels.
    """
    wide = metric.to(torch.float64 if metric.dtype is torch.float64 else torch.float32)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit = wide / torch.where(norm == 0, 1, norm)
    device = metric.device.type
    with torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext():
        scores = torch.matmul(unit[:, ::2], unit[:, 1::2].mT)
    return torch.where(scores.isnan(), -2, scores)


def forward(
    metric: torch.Tensor, r: int, class_token: bool, distill_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, starts, members, src and dst of `MergePlan`, int32; r is at least 1 and at most (t - protected) // 2."""
    scores = similarities(metric)
    batch, evens, odds = scores.shape
    if class_token:
        scores = scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), -torch.inf)
    if distill_token:
        scores = scores.index_fill(2, torch.zeros(1, dtype=torch.long, device=scores.device), -torch.inf)
    best = scores.amax(2)
    # The first of equals, which max() does not promise on every device.
    choice = (scores == best.unsqueeze(2)).int().argmax(2)
    order = torch.sort(best, dim=1, descending=True, stable=True).indices
    merged, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(dim=1).values
    targets = choice.gather(1, merged)

    alone = torch.arange(evens - r, device=metric.device)
    other = torch.arange(odds, device=metric.device)
    if distill_token:  # U0, D0, then the rest of U, then the rest of D
        alone, other = alone + (alone > 0), torch.where(other > 0, other + (evens - r), 1)
    else:
        other = other + (evens - r)
    even_rows = torch.zeros_like(order).scatter(1, kept, alone.expand(batch, -1))
    even_rows = even_rows.scatter(1, merged, other[targets])
    rows = order.new_zeros((batch, evens + odds))
    rows[:, ::2], rows[:, 1::2] = even_rows, other
    return (*groups(rows, evens + odds - r), (2 * merged).int(), (2 * targets + 1).int())
