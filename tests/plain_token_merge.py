"""ToMe's steps one after another in loops and lists, for the tests to compare with."""

from __future__ import annotations

import torch


def match(metric: torch.Tensor, r: int, class_token: bool = False, distill_token: bool = False):
    """(kept, merged, targets) of one image [t, c], as lists of tokens; the rule of the definition, token by token."""
    unit = [row / (row.norm() or 1) for row in metric.double()]
    evens, odds = range(0, len(unit), 2), range(1, len(unit), 2)
    r = min(r, (len(unit) - class_token - distill_token) // 2)
    ranking, partner = [], {}
    for a in evens:
        scores = [(-float(unit[a] @ unit[b]), b) for b in odds if not (distill_token and b == 1)]
        score, partner[a] = min(scores) if scores else (float("inf"), None)
        ranking.append((score, a))
    ranking = [a for _, a in sorted(ranking) if not (class_token and a == 0)]
    merged, kept = ranking[:r], ranking[r:]
    if class_token:
        kept = [0, *sorted(kept)]
    return kept, merged, [partner[a] for a in merged]


def merge(x: torch.Tensor, size: torch.Tensor, plan, tokens: int, mode: str, distill_token: bool = False):
    """(y, sizes) of one image, from lists: the tokens kept, then the odd ones with what merges into them."""
    kept, merged, targets = plan
    groups = [[a] for a in kept] + [
        sorted([b, *(a for a, t in zip(merged, targets, strict=True) if t == b)]) for b in range(1, tokens, 2)
    ]
    if distill_token:
        groups.insert(1, groups.pop(len(kept)))
    rows = []
    for group in groups:
        own, weights = x[group], size[group, None]
        rows.append(
            {
                "wavg": lambda own=own, weights=weights: (own * weights).sum(0) / weights.sum(),
                "sum": lambda own=own: own.sum(0),
                "mean": lambda own=own: own.mean(0),
                "amax": lambda own=own: own.amax(0),
            }[mode]()
        )
    return torch.stack(rows), torch.stack([size[group].sum() for group in groups])
