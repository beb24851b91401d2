"""``ops.polyline_path_scan`` against plain PyTorch's products with the masks of rows and columns, and with the whole
mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.bench.cases import polyline_path_mask
from vitkernels.bench.presets import PPMA_MODELS, PolylineStage

DENSE_TOKENS = 1024  # beyond which nobody would make the whole mask


@dataclass(frozen=True)
class ScanProblem:
    label: str
    stage: PolylineStage
    transpose: bool = False

    @property
    def tokens(self) -> int:
        return self.stage.size[0] * self.stage.size[1]

    def describe(self, batch: int) -> str:
        height, width = self.stage.size
        kind = " L^T" if self.transpose else ""
        return f"{batch}x{height}x{width}x{self.stage.heads}x{self.stage.head_dim}{kind}"


SHAPE_DEFAULTS = {"size": (56, 56), "heads": 4, "d": 16, "transpose": 0}


def parse_shape(text: str) -> ScanProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("transpose",))
    if fields["transpose"] not in (0, 1):
        raise ValueError(f"shape: expected transpose in 0, 1; got {fields['transpose']}")
    stage = PolylineStage(fields["size"], fields["heads"], fields["d"], True)
    return ScanProblem("shape", stage, bool(fields["transpose"]))


def make_inputs(
    problem: ScanProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    shape = (batch, *problem.stage.size, problem.stage.heads)
    decay_dtype = torch.promote_types(dtype, torch.float32)

    def random() -> Tensor:
        return torch.randn((*shape, problem.stage.head_dim), generator=generator).to(device, dtype)

    def decays() -> Tensor:
        return (-0.3 * torch.rand(shape, generator=generator)).to(device, decay_dtype)

    tensors = {"x": random(), "log_decay_w": decays(), "log_decay_h": decays()}
    return Inputs(tensors, {"transpose": problem.transpose}, random())


def eager(x: Tensor, log_decay_w: Tensor, log_decay_h: Tensor, *, transpose: bool) -> Tensor:
    def masks(log_decay: Tensor) -> Tensor:
        sums = log_decay.cumsum(-1)
        differences = sums.unsqueeze(-1) - sums.unsqueeze(-2)
        return (differences.tril(-1) - differences.triu(1)).exp().to(x.dtype)

    rows = masks(log_decay_w.permute(0, 3, 1, 2))  # [B, heads, H, W, W]
    columns = masks(log_decay_h.permute(0, 3, 2, 1))  # [B, heads, W, H, H]
    values = x.permute(0, 3, 1, 2, 4)  # [B, heads, H, W, d]
    if transpose:
        values = rows @ values
    values = (columns @ values.transpose(2, 3)).transpose(2, 3)
    if not transpose:
        values = rows @ values
    return values.permute(0, 2, 3, 1, 4).contiguous()


def prepare_dense(inputs: Inputs, training: bool) -> Function:
    """The whole mask, made and multiplied."""
    batch, height, width, heads, head_dim = inputs.tensors["x"].shape
    if height * width > DENSE_TOKENS:
        raise Unavailable(f"the whole mask of {height * width} tokens")
    transpose = inputs.options["transpose"]

    def dense(x: Tensor, log_decay_w: Tensor, log_decay_h: Tensor) -> Tensor:
        mask = polyline_path_mask.eager(log_decay_w, log_decay_h, log=False, transpose=transpose)
        values = x.permute(0, 3, 1, 2, 4).flatten(2, 3)
        out = (mask.to(x.dtype) @ values).view(batch, heads, height, width, head_dim)
        return out.permute(0, 2, 3, 1, 4).contiguous()

    return dense


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("dense-mask", prepare_dense)]


def cost(problem: ScanProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    stage, size = problem.stage, dtype.itemsize
    tokens = batch * problem.tokens * stage.heads
    flops = 2.0 * tokens * stage.head_dim * sum(stage.size)
    moved, decays = 1.0 * tokens * stage.head_dim * size, 2.0 * tokens * max(4, size)
    exps = 2.0 * tokens
    if mode == "fwd":
        return Cost(flops, 2 * moved + decays, exps)
    # Backward reads x, grad_y and the decays, and writes their gradients.
    return Cost(3 * flops, 5 * moved + 3 * decays, 2 * exps)


def reduced(problem: ScanProblem, batch: int) -> dict[str, int]:
    terms = problem.tokens * problem.stage.head_dim
    return {"log_decay_w": terms, "log_decay_h": terms}


CASE = Case(
    operator="polyline_path_scan",
    presets={
        name: tuple(ScanProblem(label, stage) for label, stage in stages.items())
        for name, stages in PPMA_MODELS.items()
    },
    default_preset="ppma_t",
    shape_help="size=56x56,heads=4,d=16,transpose=0",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "one token": "size=1x1,heads=2,d=3",
        "row": "size=1x37,heads=3,d=8",
        "column": "size=37x1,heads=3,d=8,transpose=1",
        "odd": "size=7x9,heads=4,d=17",
        "transposed": "size=14x14,heads=4,d=32,transpose=1",
        "wide heads": "size=6x10,heads=2,d=100",
        "long rows": "size=3x500,heads=1,d=16",
        "long columns": "size=500x3,heads=1,d=16,transpose=1",
    },
    reduced=reduced,
)
