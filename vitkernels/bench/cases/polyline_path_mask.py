"""``ops.polyline_path_mask`` against plain PyTorch's tables, repeated and added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Inputs, Provider, parse_fields
from vitkernels.bench.presets import PPMA_MODELS


@dataclass(frozen=True)
class MaskProblem:
    label: str
    size: tuple[int, int]
    heads: int
    log: bool = True
    transpose: bool = False

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    def describe(self, batch: int) -> str:
        kind = ("M" if self.log else "exp(M)") + ("^T" if self.transpose else "")
        return f"{batch}x{self.heads}x{self.size[0]}x{self.size[1]} {kind}"


SHAPE_DEFAULTS = {"size": (14, 14), "heads": 8, "log": 1, "transpose": 0}


def parse_shape(text: str) -> MaskProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("log", "transpose"))
    for name in ("log", "transpose"):
        if fields[name] not in (0, 1):
            raise ValueError(f"shape: expected {name} in 0, 1; got {fields[name]}")
    return MaskProblem(
        "shape", fields["size"], fields["heads"], bool(fields["log"]), bool(fields["transpose"])
    )


def make_inputs(
    problem: MaskProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def decays() -> Tensor:
        shape = (batch, *problem.size, problem.heads)
        return (-0.3 * torch.rand(shape, generator=generator)).to(device, dtype)

    tensors = {"log_decay_w": decays(), "log_decay_h": decays()}
    shape = (batch, problem.heads, problem.tokens, problem.tokens)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    return Inputs(tensors, {"log": problem.log, "transpose": problem.transpose}, grad)


def _table(sums: Tensor) -> Tensor:
    """[..., n] -> [..., n, n]: differences, negated above the diagonal and 0 on it."""
    place = torch.arange(sums.shape[-1], device=sums.device)
    sign = (place[:, None] - place).sign().to(sums.dtype)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)) * sign


def eager(log_decay_w: Tensor, log_decay_h: Tensor, *, log: bool, transpose: bool) -> Tensor:
    batch, height, width, heads = log_decay_w.shape
    wide = torch.promote_types(log_decay_w.dtype, torch.float32)
    rows = _table(log_decay_w.to(wide).permute(0, 3, 1, 2).cumsum(-1))  # [B, heads, H, W, W]
    columns = _table(log_decay_h.to(wide).permute(0, 3, 2, 1).cumsum(-1))  # [B, heads, W, H, H]
    columns = columns.permute(0, 1, 3, 4, 2).contiguous()  # small, and read for every pair of tokens
    mask = (rows[:, :, :, :, None, :] + columns[:, :, :, None]).reshape(batch, heads, height * width, -1)
    if transpose:
        mask = mask.mT.contiguous()
    return (mask if log else mask.exp()).to(log_decay_w.dtype)


def peers(device: torch.device) -> Sequence[Provider]:
    return []


def cost(problem: MaskProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    decays = 2.0 * batch * problem.heads * problem.tokens * dtype.itemsize
    mask = float(batch) * problem.heads * problem.tokens**2 * dtype.itemsize
    exps = 0.0 if problem.log else mask / dtype.itemsize
    if mode == "fwd":
        return Cost(0.0, mask + decays, exps)
    # Backward reads the mask's gradient and the decays, and writes theirs.
    return Cost(0.0, 2 * mask + 3 * decays, 2 * exps)


def reduced(problem: MaskProblem, batch: int) -> dict[str, int]:
    """Pairs of tokens whose way leads across one decay, at most."""
    terms = problem.tokens * max(problem.size)
    return {"log_decay_w": terms, "log_decay_h": terms}


CASE = Case(
    operator="polyline_path_mask",
    presets={
        name: tuple(MaskProblem(label, s.size, s.heads) for label, s in stages.items() if s.whole)
        for name, stages in PPMA_MODELS.items()
    },
    default_preset="ppma_t",
    shape_help="size=14x14,heads=8,log=1,transpose=0",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "one token": "size=1x1,heads=2",
        "row": "size=1x37,heads=3",
        "column": "size=37x1,heads=3,transpose=1",
        "odd": "size=7x9,heads=4",
        "odd exp": "size=9x7,heads=4,log=0",
        "even exp transposed": "size=8x12,heads=3,log=0,transpose=1",
        "transposed": "size=5x20,heads=4,transpose=1",
        "long rows": "size=2x300,heads=1",
        "long columns": "size=300x2,heads=1,log=0,transpose=1",
    },
    reduced=reduced,
)
