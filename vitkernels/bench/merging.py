"""Whole transformers with and without token merging.

A block chooses what to merge by the order of similarities, so two right programs may choose differently where two
similarities are a rounding apart, and give different logits; in half precision most images do. A variant's logits are
therefore held to the float64 model that is given the same choices, as plain PyTorch's are in the variant's dtype. The
choices are held to the same rule by what they lose: how much less alike, in float64, the merged pairs of tokens are
than those that a block should have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkernels
from vitkernels.bench import gate, models
from vitkernels.bench.cases.token_merge import choose, gathered
from vitkernels.bench.host_model import clone
from vitkernels.bench.models import Contest
from vitkernels.patching.merging import merged_steps, schedule_of

UNMERGED = ("eager", "torch.compile")


class PlainMerging(nn.Module):
    """ToMe's steps in plain PyTorch around a timm ViT's own layers: what is there without this package."""

    def __init__(self, model: Any, schedule: Sequence[int]) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule
        self.trace = False
        self.steps: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        size = torch.ones_like(x[..., :1])
        steps: list[Tensor] = []
        for block, r in zip(model.blocks, self.schedule, strict=True):
            x, size = self.block(block, x, size, min(r, (x.shape[1] - 1) // 2), steps)
        if self.trace:
            self.steps = tuple(steps)
        return model.forward_head(model.norm(x))

    def block(
        self, block: Any, x: Tensor, size: Tensor, r: int, steps: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = size.log().mT.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
        x = x + block.ls1(attn.proj(out.transpose(1, 2).flatten(2)))
        if r > 0:
            x, size = self.merge(x, size, k.mean(1), r, steps)
        return x + block.ls2(block.mlp(block.norm2(x))), size

    def merge(
        self, x: Tensor, size: Tensor, metric: Tensor, r: int, steps: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        plan = choose(metric, r, True)
        if self.trace:
            steps.append(rows_of(*plan, x.shape[1]))
        merged = gathered(size, *plan, "sum")
        return gathered(x * size, *plan, "sum") / merged, merged


class GivenMerging(PlainMerging):
    """The same with the choices of another program, and what they lose, [steps, batch]."""

    def __init__(self, model: Any, schedule: Sequence[int], given: Sequence[Tensor]) -> None:
        super().__init__(model, schedule)
        self.given = given
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.losses.clear()
        return super().forward(x)

    def merge(
        self, x: Tensor, size: Tensor, metric: Tensor, r: int, steps: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        rows = self.given[len(self.losses)].long()
        self.losses.append(lost(metric, rows, r))

        def summed(values: Tensor) -> Tensor:
            to = values.new_zeros(len(values), values.shape[1] - r, values.shape[2])
            return to.scatter_add(1, rows.unsqueeze(2).expand_as(values), values)

        merged = summed(size)
        return summed(x * size) / merged, merged


def lost(metric: Tensor, rows: Tensor, r: int) -> Tensor:
    """[batch]: by how much the mean similarity of r merged pairs, of an even and an odd token, falls short of the best;
    infinite where a choice merges others, or the class token."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    pairs = rows[:, ::2, None] == rows[:, None, 1::2]
    best = scores[:, 1:].amax(2).topk(r, 1).values.mean(1)
    taken = (scores * pairs).sum((1, 2)) / r
    sound = (pairs.sum((1, 2)) == r) & (pairs.sum(2) <= 1).all(1) & ~pairs[:, 0].any(1)
    return torch.where(sound, best - taken, torch.inf)


def rows_of(kept: Tensor, merged: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """The row that each token goes to."""
    rows = torch.empty(len(kept), tokens, dtype=torch.long, device=kept.device)
    rows.scatter_(1, 2 * kept, torch.arange(kept.shape[1], device=kept.device).expand(len(kept), -1))
    rows[:, 1::2] = torch.arange(kept.shape[1], kept.shape[1] + tokens // 2, device=kept.device)
    return rows.scatter_(1, 2 * merged, kept.shape[1] + targets)


def contest(schedule: Any) -> Contest:
    """A network as it is, merging in plain PyTorch, and merging by this package, which traces its sources."""

    def ours(model: nn.Module) -> nn.Module:
        merging = clone(model)
        vitkernels.apply(merging, token_merging=schedule, trace_source=True, verbose=False)
        return merging

    def theirs(model: Any) -> nn.Module:
        if not hasattr(model, "_pos_embed") or getattr(model, "cls_token", None) is None:
            raise ValueError(
                "token-merging: expected one of timm's ViTs with a class token, which plain PyTorch merges; got "
                f"{type(model).__name__}"
            )
        return PlainMerging(clone(model), schedule_of(schedule, len(model.blocks)))

    def judge(model: nn.Module, images: Tensor) -> Callable[[str, Any], gate.Check]:
        unmerged = models.judge(model, images)
        exact, wide = clone(model, torch.float64), images.double()

        def given(model: Any, steps: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
            merging = GivenMerging(clone(model), schedule_of(schedule, len(model.blocks)), steps)
            logits = models.forward(merging, images)
            return logits, torch.stack(merging.losses or [torch.zeros(len(images))])

        _, usual = traced(theirs(model), images)
        _, baseline_losses = given(exact, usual, wide)

        def check(name: str, variant: Any) -> gate.Check:
            if name in UNMERGED:
                return unmerged(name, variant)
            logits, steps = traced(variant, images)
            if lengths(steps) != lengths(usual):
                return gate.Check("lengths of the merged sequences", math.inf, 0.0, math.inf, 0.0)
            truth, losses = given(exact, steps, wide)
            baseline, _ = given(model, steps, images)
            none = torch.zeros_like(losses)
            return gate.worst(
                [
                    gate.check("logits", logits, baseline, truth, factor=gate.FORWARD_FACTOR),
                    gate.check(
                        "similarity lost by the choices",
                        losses,
                        baseline_losses,
                        none,
                        factor=gate.FORWARD_FACTOR,
                        dtype=images.dtype,
                    ),
                ]
            )

        return check

    variants: dict[str, models.Variant] = {
        **{name: models.VARIANTS[name] for name in UNMERGED},
        "plain-merging": theirs,
        "plain-merging-compile": lambda model: torch.compile(theirs(model), dynamic=False),
        "vitkernels": ours,
        "vitkernels+compile": lambda model: torch.compile(ours(model), dynamic=False),
    }
    return Contest(variants, ("eager", "torch.compile", "plain-merging", "vitkernels"), judge)


def lengths(steps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Of the sequence before and after each step."""
    return [(rows.shape[1], int(rows.max()) + 1) for rows in steps]


def traced(variant: Any, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(logits, for each block that merges the rows that its tokens go to)."""
    inner = getattr(variant, "_orig_mod", variant)
    if not isinstance(inner, PlainMerging):
        logits = models.forward(variant, images)
        return logits, merged_steps(inner)
    inner.trace = True
    logits = models.forward(variant, images)
    inner.trace = False
    return logits, inner.steps
