"""``ops.bipartite_match`` and ``ops.token_merge``, one after the other, against the steps in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.bench.case import Case, Cost, Inputs, Provider, parse_fields
from vitkernels.bench.presets import MERGING_MODELS, MergingModel
from vitkernels.kernels.token_merge import MODES


@dataclass(frozen=True)
class MergeProblem:
    label: str
    tokens: int
    width: int  # of the metric
    channels: int
    r: int
    class_token: bool
    mode: str = "wavg"

    @property
    def evens(self) -> int:
        return (self.tokens + 1) // 2

    def describe(self, batch: int) -> str:
        return f"{batch}x{self.tokens}x{self.channels} by {self.width} -{self.r}"


def problem_of(model: MergingModel) -> MergeProblem:
    """Of a ViT's first block, which measures the mean of its keys; Stable Diffusion's measures the tokens."""
    if model.class_token:
        return MergeProblem(
            "block 1", model.tokens, model.channels // model.heads, model.channels, model.r, True
        )
    return MergeProblem("level 1", model.tokens, model.channels, model.channels, model.r, False, "mean")


SHAPE_DEFAULTS = {"tokens": 197, "width": 64, "c": 768, "r": 16, "cls": 1, "mode": "wavg"}


def parse_shape(text: str) -> MergeProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("r", "cls"))
    if fields["mode"] not in MODES:
        raise ValueError(f"shape: expected mode in {', '.join(MODES)}; got {fields['mode']!r}")
    most = (fields["tokens"] + 1) // 2 - bool(fields["cls"])  # every second token but the class token
    if fields["tokens"] < 2 or fields["r"] > most:
        raise ValueError(f"shape: expected tokens of at least 2 and r of at most {most}; got {text!r}")
    return MergeProblem(
        "shape",
        fields["tokens"],
        fields["width"],
        fields["c"],
        fields["r"],
        bool(fields["cls"]),
        fields["mode"],
    )


# Scores closer than this may rank one way or the other in float32; a benchmark compares merged tokens, not ties.
TIE = 2e-6


def without_ties(metric: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """The metric, in which even tokens whose choice or rank hangs on a rounding are drawn anew."""
    for image in metric:
        for _ in range(100):
            unit = torch.nn.functional.normalize(image.double(), dim=1)
            best = (unit[::2] @ unit[1::2].mT).topk(min(2, len(image) // 2), dim=1).values
            close = (best[:, 0] - best[:, -1] < TIE) & (best.shape[1] > 1)
            order = best[:, 0].sort(descending=True)
            if 0 < r < len(best):
                close[order.indices[r]] |= order.values[r - 1] - order.values[r] < TIE
            if not close.any():
                break
            rows = 2 * close.nonzero()[:, 0]
            image[rows] = torch.randn((len(rows), image.shape[1]), generator=generator).to(image)
    return metric


def make_inputs(
    problem: MergeProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    t = problem.tokens
    metric = without_ties(random(batch, t, problem.width), problem.r, generator)
    size = None
    if problem.mode == "wavg":
        size = torch.randint(1, 4, (batch, t), generator=generator).float().to(device)
    options = {
        "metric": metric.to(device),
        "size": size,
        "r": problem.r,
        "class_token": problem.class_token,
        "mode": problem.mode,
    }
    tensors = {"x": random(batch, t, problem.channels).to(device)}
    return Inputs(tensors, options, random(batch, t - problem.r, problem.channels).to(device))


def call(
    x: Tensor, *, metric: Tensor, size: Tensor | None, r: int, class_token: bool, mode: str, backend: str
) -> Tensor:
    plan = ops.bipartite_match(metric, r, class_token=class_token, backend=backend)
    if size is not None and x.dtype is torch.float64:
        size = size.double()
    return ops.token_merge(x, plan, size=size, mode=mode, backend=backend)[0]


def choose(metric: Tensor, r: int, class_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(kept, merged, targets) among the even, the even and the odd tokens. In float32, as ours: half has ties."""
    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(2)
    order = best.argsort(1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(1).values
    return kept, merged, partner.gather(1, merged)


def gathered(x: Tensor, kept: Tensor, merged: Tensor, targets: Tensor, reduce: str) -> Tensor:
    evens, odds = x[:, ::2], x[:, 1::2]

    def wide(index: Tensor) -> Tensor:
        return index.unsqueeze(2).expand(-1, -1, x.shape[2])

    sources = evens.gather(1, wide(merged))
    merged_odds = odds.scatter_reduce(1, wide(targets), sources, reduce)
    return torch.cat((evens.gather(1, wide(kept)), merged_odds), 1)


def eager(x: Tensor, *, metric: Tensor, size: Tensor | None, r: int, class_token: bool, mode: str) -> Tensor:
    """Scores in memory, an argsort, gathers and a scatter; of the sizes again."""
    plan = choose(metric, r, class_token)
    if mode != "wavg" or size is None:
        return gathered(x, *plan, {"wavg": "mean"}.get(mode, mode))
    weights = size.to(x.dtype).unsqueeze(2)
    return gathered(x * weights, *plan, "sum") / gathered(weights, *plan, "sum")


def peers(device: torch.device) -> Sequence[Provider]:
    return []


def cost(problem: MergeProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    """Of the scores, and of every tensor once; the plan is small."""
    t, size = batch * problem.tokens, dtype.itemsize
    flops = 2.0 * batch * problem.evens * (problem.tokens // 2) * problem.width
    merged = batch * (problem.tokens - problem.r) * problem.channels * size
    moved = t * problem.width * size + t * problem.channels * size + merged
    if problem.mode == "wavg":
        moved += 4 * t + 4 * batch * (problem.tokens - problem.r)
    # Backward reads the gradient of the merged tokens and writes that of all.
    return Cost(flops, moved if mode == "fwd" else moved + merged + t * problem.channels * size)


CASE = Case(
    operator="token_merge",
    presets={name: (problem_of(model),) for name, model in MERGING_MODELS.items()},
    default_preset="vit_b",
    shape_help="tokens=197,width=64,c=768,r=16,cls=1,mode=wavg|sum|mean|amax",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "197": "tokens=197",
        "5": "tokens=5,width=3,c=7,r=2,cls=0",
        "577": "tokens=577,c=1024,r=288",
        "1370": "tokens=1370,width=80,c=96,r=40,mode=sum",
        "odd-mean": "tokens=63,width=5,c=10,r=9,mode=mean",
        "amax": "tokens=100,width=320,c=33,r=20,cls=0,mode=amax",
        "4096": "tokens=4096,width=320,c=320,r=2048,cls=0,mode=mean",
    },
    call=call,
)
