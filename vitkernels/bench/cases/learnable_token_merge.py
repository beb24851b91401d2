"""``ops.learnable_token_merge`` against a normalised mask in memory and a batched product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels import ops
from vitkernels.bench.case import Case, Cost, Inputs, Provider, parse_fields
from vitkernels.kernels.learnable_token_merge import NORMALIZATIONS

_NAMES = {name or "none": name for name in NORMALIZATIONS}


@dataclass(frozen=True)
class SoftMerge:
    label: str
    tokens: int
    width: int
    merged: int
    other_width: int = 0
    normalize: str = "softmax"
    shared: bool = False
    windows: int = 1  # sequences of an image

    def describe(self, batch: int) -> str:
        widths = f"{self.width}" + (f"+{self.other_width}" if self.other_width else "")
        mask = f"{self.normalize}{' shared' if self.shared else ''}"
        return f"{batch * self.windows}x{self.tokens}x{widths} -> {self.merged} {mask}"


def kinds(tokens: int, width: int, merged: int, windows: int = 1) -> tuple[SoftMerge, ...]:
    return (
        SoftMerge("softmax", tokens, width, merged, windows=windows),
        SoftMerge("sum", tokens, width, merged, normalize="sum", windows=windows),
        SoftMerge("softmax_rows", tokens, width, merged, normalize="softmax_rows", windows=windows),
        SoftMerge("shared", tokens, width, merged, shared=True, windows=windows),
        SoftMerge("two operands", tokens, width, merged, width, windows=windows),
    )


SHAPE_DEFAULTS = {"tokens": 197, "d": 768, "merged": 158, "other": 0, "normalize": "softmax", "shared": 0}


def parse_shape(text: str) -> SoftMerge:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("other", "shared"))
    if fields["normalize"] not in _NAMES:
        raise ValueError(f"shape: expected normalize in {', '.join(_NAMES)}; got {fields['normalize']!r}")
    return SoftMerge(
        "shape",
        fields["tokens"],
        fields["d"],
        fields["merged"],
        fields["other"],
        fields["normalize"],
        bool(fields["shared"]),
    )


def make_inputs(
    problem: SoftMerge,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch *= problem.windows
    mask = random(*([] if problem.shared else [batch]), problem.tokens, problem.merged)
    if problem.normalize == "sum":
        mask = mask.abs() + 0.1
    tensors = {"z": random(batch, problem.tokens, problem.width), "g": mask}
    gradient = random(batch, problem.merged, problem.width).to(device, dtype)
    more = {}
    if problem.other_width:
        tensors["other"] = random(batch, problem.tokens, problem.other_width)
        more["other_out"] = random(batch, problem.merged, problem.other_width).to(device, dtype)
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return Inputs(tensors, {"normalize": _NAMES[problem.normalize]}, gradient, more)


def call(
    z: Tensor, g: Tensor, other: Tensor | None = None, *, normalize: str | None, backend: str
) -> Tensor | tuple[Tensor, ...]:
    others = () if other is None else (other,)
    return ops.learnable_token_merge(z, g, *others, normalize=normalize, backend=backend)


def eager(
    z: Tensor, g: Tensor, other: Tensor | None = None, *, normalize: str | None
) -> Tensor | tuple[Tensor, ...]:
    if normalize == "sum":
        g = g / g.sum(-2, keepdim=True)
    elif normalize is not None:
        g = g.softmax(-2 if normalize == "softmax" else -1)
    return g.mT @ z if other is None else (g.mT @ z, g.mT @ other)


def peers(device: torch.device) -> Sequence[Provider]:
    return []


def cost(problem: SoftMerge, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    batch, size = batch * problem.windows, dtype.itemsize
    n, p, width = problem.tokens, problem.merged, problem.width + problem.other_width
    mask = (1 if problem.shared else batch) * n * p
    flops = 2.0 * batch * n * p * width
    exps = float(mask) if problem.normalize.startswith("softmax") else 0.0
    inputs, outputs = (batch * n * width + mask) * size, batch * p * width * size
    if mode == "fwd":
        return Cost(flops, inputs + outputs, exps)
    return Cost(3 * flops, 3 * inputs + 2 * outputs, 2 * exps)


def reduced(problem: SoftMerge, batch: int) -> dict[str, int]:
    return {"g": batch * problem.windows} if problem.shared else {}


CASE = Case(
    operator="learnable_token_merge",
    presets={
        "ltm_vit_small": kinds(197, 384, 158),
        "ltm_vit_base": kinds(197, 768, 158),
        # Four interleaved sequences an image, as its patches of 2 x 2 make them.
        "mobilevit_s_256": (*kinds(256, 144, 205, 4)[:2], *kinds(64, 192, 52, 4)[:2]),
    },
    default_preset="ltm_vit_small",
    shape_help="tokens=197,d=768,merged=158,other=0,normalize=none|sum|softmax|softmax_rows,shared=0",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    reduced=reduced,
    check_shapes={
        "197": "d=384",
        "1x1": "tokens=1,d=1,merged=1",
        "none": "tokens=65,d=40,merged=33,normalize=none",
        "sum-two": "tokens=49,d=72,merged=20,other=40,normalize=sum",
        "rows-shared": "tokens=130,d=96,merged=70,normalize=softmax_rows,shared=1",
        "shared-two": "tokens=64,d=33,merged=52,other=7,shared=1",
    },
    call=call,
)
