"""Whole transformers with and without token merging.

A block chooses what to merge by the order of similarities, so two right programs may choose differently where two
similarities are a rounding apart, and give different logits for that image. A variant's logits are therefore held to
the float64 model on the images whose tokens ended in the same groups, which must be most of them.
"""

from __future__ import annotations

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
from vitkernels.patching.merging import merged_source, schedule_of

SAME_CHOICES = 0.5  # of the images, at least
UNMERGED = ("eager", "torch.compile")


class PlainMerging(nn.Module):
    """ToMe's steps in plain PyTorch around a timm ViT's own layers: what is there without this package."""

    def __init__(self, model: Any, schedule: Sequence[int]) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule
        self.trace, self.source = False, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        size = torch.ones_like(x[..., :1])
        which = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for block, r in zip(model.blocks, self.schedule, strict=True):
            x, size, which = self.block(block, x, size, which, min(r, (x.shape[1] - 1) // 2))
        if self.trace:
            self.source = which
        return model.forward_head(model.norm(x))

    def block(
        self, block: Any, x: Tensor, size: Tensor, which: Tensor, r: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = size.log().mT.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
        x = x + block.ls1(attn.proj(out.transpose(1, 2).flatten(2)))
        if r > 0:
            plan = choose(k.mean(1), r, True)
            if self.trace:
                which = rows_of(*plan, x.shape[1]).gather(1, which)
            x = gathered(x * size, *plan, "sum")
            size = gathered(size, *plan, "sum")
            x = x / size
        return x + block.ls2(block.mlp(block.norm2(x))), size, which


def rows_of(kept: Tensor, merged: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """The row that each token goes to."""
    rows = torch.empty(len(kept), tokens, dtype=torch.long, device=kept.device)
    rows.scatter_(1, 2 * kept, torch.arange(kept.shape[1], device=kept.device).expand(len(kept), -1))
    rows[:, 1::2] = torch.arange(kept.shape[1], kept.shape[1] + tokens // 2, device=kept.device)
    return rows.scatter_(1, 2 * merged, kept.shape[1] + targets)


def contest(schedule: Any) -> Contest:
    """A network as it is, merging in plain PyTorch, and merging by this package, which traces its sources."""

    def ours(model: nn.Module, backend: str | None = None) -> nn.Module:
        merging = clone(model)
        vitkernels.apply(merging, token_merging=schedule, trace_source=True, backend=backend, verbose=False)
        return merging

    def theirs(model: Any) -> nn.Module:
        if not hasattr(model, "_pos_embed") or getattr(model, "cls_token", None) is None:
            raise ValueError("token merging in plain PyTorch is written for timm's ViTs with a class token")
        return PlainMerging(clone(model), schedule_of(schedule, len(model.blocks)))

    def judge(model: nn.Module, images: Tensor) -> Callable[[str, Any], gate.Check]:
        unmerged = models.judge(model, images)
        truth, groups = traced(ours(clone(model, torch.float64), "reference"), images.double())
        baseline, baseline_groups = traced(theirs(model), images)

        def check(name: str, variant: Any) -> gate.Check:
            if name in UNMERGED:
                return unmerged(name, variant)
            logits, own_groups = traced(variant, images)
            same = (own_groups == groups).all(1) & (baseline_groups == groups).all(1)
            if same.float().mean() < SAME_CHOICES:
                differ = f"{int((~same).sum())} of {len(same)} images"
                raise RuntimeError(f"merged otherwise than float64 in {differ}: too few to compare")
            return gate.check("logits", logits[same], baseline[same], truth[same], factor=gate.FORWARD_FACTOR)

        return check

    variants: dict[str, models.Variant] = {
        **{name: models.VARIANTS[name] for name in UNMERGED},
        "plain-merging": theirs,
        "plain-merging-compile": lambda model: torch.compile(theirs(model), dynamic=False),
        "vitkernels": ours,
        "vitkernels+compile": lambda model: torch.compile(ours(model), dynamic=False),
    }
    return Contest(variants, ("eager", "torch.compile", "plain-merging", "vitkernels"), judge)


def traced(variant: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, the group of every token)."""
    inner = getattr(variant, "_orig_mod", variant)
    if isinstance(inner, PlainMerging):
        inner.trace = True
    with torch.no_grad():
        logits = variant(images)
    if isinstance(inner, PlainMerging):
        inner.trace = False
    source = inner.source if isinstance(inner, PlainMerging) else merged_source(inner)
    return logits, canonical(source)


def canonical(rows: Tensor) -> Tensor:
    """Groups by their first member, whatever their rows are called."""
    rows = rows.long()
    first = torch.full_like(rows, rows.shape[1])
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return first.scatter_reduce(1, rows, positions, "amin").gather(1, rows)
