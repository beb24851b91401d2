"""``ops.residual_ffn`` against the layers it stands for, norms live or folded, and oneDNN's packed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.patching import packed

WIDTHS = {
    "efficientvit_m0": (64, 128, 192),
    "efficientvit_m1": (128, 144, 192),
    "efficientvit_m2": (128, 192, 224),
    "efficientvit_m3": (128, 240, 320),
    "efficientvit_m4": (128, 256, 384),
    "efficientvit_m5": (192, 288, 384),
}


@dataclass(frozen=True)
class UnitProblem:
    """The depthwise convolution and FFN of one stage, the FFN twice as wide as the map."""

    label: str
    channels: int
    side: int
    layout: str = "nchw"  # or "nhwc"

    def describe(self, batch: int) -> str:
        return f"{batch}x{self.channels}x{self.side}x{self.side} {self.layout}"


def parse_shape(text: str) -> UnitProblem:
    fields = parse_fields(text, {"c": 64, "side": 14, "layout": "nchw"})
    if fields["layout"] not in ("nchw", "nhwc"):
        raise ValueError(f"shape: expected layout in nchw, nhwc; got {fields['layout']!r}")
    return UnitProblem("shape", fields["c"], fields["side"], fields["layout"])


def make_inputs(
    problem: UnitProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    c = problem.channels
    form = torch.channels_last if problem.layout == "nhwc" else torch.contiguous_format

    def random(*shape: int, terms: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) * terms**-0.5).to(device, dtype)

    tensors = {
        "x": random(batch, c, problem.side, problem.side).contiguous(memory_format=form),
        "weight1": random(2 * c, c, terms=c),
        "bias1": random(2 * c),
        "weight2": random(c, 2 * c, terms=2 * c),
        "bias2": random(c),
        "scale1": random(2 * c),
        "scale2": random(c),
        "dw_weight": random(c, 3, 3, terms=9),
        "dw_bias": random(c),
    }
    grad_out = random(batch, c, problem.side, problem.side).contiguous(memory_format=form)
    return Inputs(tensors, {}, grad_out)


def eager(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale1: Tensor,
    scale2: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
) -> Tensor:
    u = x + F.conv2d(x, dw_weight[:, None], dw_bias, padding=1, groups=x.shape[1])
    hidden = F.conv2d(u, weight1[..., None, None]) * scale1[:, None, None] + bias1[:, None, None]
    return u + (
        F.conv2d(hidden.relu(), weight2[..., None, None]) * scale2[:, None, None] + bias2[:, None, None]
    )


def prepare_folded(inputs: Inputs, training: bool) -> Function:
    """The norms folded into the weights beforehand, as a network that only infers has them."""
    t = inputs.tensors
    weight1, weight2 = (t[f"weight{i}"] * t[f"scale{i}"][:, None] for i in (1, 2))

    def run(
        x: Tensor, bias1: Tensor, bias2: Tensor, dw_weight: Tensor, dw_bias: Tensor, **_: Tensor
    ) -> Tensor:
        u = x + F.conv2d(x, dw_weight[:, None], dw_bias, padding=1, groups=x.shape[1])
        hidden = F.conv2d(u, weight1[..., None, None], bias1)
        return u + F.conv2d(hidden.relu_(), weight2[..., None, None], bias2)

    return run


def prepare_packed(inputs: Inputs, training: bool) -> Function:
    """Norms folded beforehand, weights packed beforehand, maps channels-last: three calls of oneDNN, two sums."""
    t = inputs.tensors
    c = t["x"].shape[1]
    layers = (
        (nn.Conv2d(c, c, 3, padding=1, groups=c), t["dw_weight"][:, None], t["dw_bias"]),
        (nn.Conv2d(c, 2 * c, 1), (t["weight1"] * t["scale1"][:, None])[..., None, None], t["bias1"]),
        (nn.Conv2d(2 * c, c, 1), (t["weight2"] * t["scale2"][:, None])[..., None, None], t["bias2"]),
    )
    if not all(packed.can_pack(conv, weight) for conv, weight, _ in layers):
        raise Unavailable("oneDNN packs float32 weights on the CPU only")
    x = t["x"].contiguous(memory_format=torch.channels_last)
    wide = x.repeat(1, 2, 1, 1)
    dw, first, second = (
        (conv, packed.pack(conv, weight, wide if conv.in_channels == 2 * c else x), bias)
        for conv, weight, bias in layers
    )
    relu = nn.ReLU()

    def run(x: Tensor, **_: Tensor) -> Tensor:
        u = x + packed.convolve(dw[0], x.contiguous(memory_format=torch.channels_last), *dw[1:])
        return u + packed.convolve(second[0], packed.convolve(first[0], u, *first[1:], relu), *second[1:])

    return run


def peers(device: torch.device) -> Sequence[Provider]:
    return [
        Provider("eager-folded", prepare_folded, modes=("fwd",)),
        Provider("onednn-packed", prepare_packed, modes=("fwd",)),
    ]


def cost(problem: UnitProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    c, positions = problem.channels, batch * problem.side**2
    product, depthwise = 4.0 * positions * c * c, 18.0 * positions * c
    weights = 4 * c * c + 9 * c + 7 * c
    maps = positions * c
    if mode == "fwd":
        return Cost(2 * product + depthwise, (2 * maps + weights) * dtype.itemsize)
    # The backward computes two products for each of the forward's. PyTorch's counter has the taps' gradient c times,
    # as of a convolution that is not depthwise.
    return Cost(3 * (2 * product + depthwise), (2 * maps + 3 * maps + 3 * weights) * dtype.itemsize)


def reduced(problem: UnitProblem, batch: int) -> dict[str, int]:
    positions = batch * problem.side**2
    names = ("weight1", "bias1", "weight2", "bias2", "scale1", "scale2", "dw_weight", "dw_bias")
    return dict.fromkeys(names, positions)


CASE = Case(
    operator="residual_ffn",
    presets={
        name: tuple(
            UnitProblem(f"stage {i}", c, side)
            for i, (c, side) in enumerate(zip(widths, (14, 7, 4), strict=True), 1)
        )
        for name, widths in WIDTHS.items()
    },
    default_preset="efficientvit_m5",
    shape_help="c=64,side=14,layout=nchw|nhwc",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "14x14": "c=64,side=14",
        "14x14-nhwc": "c=192,side=14,layout=nhwc",
        "7x7": "c=288,side=7",
        "7x7-nhwc": "c=240,side=7,layout=nhwc",
        "4x4": "c=384,side=4",
        "4x4-nhwc": "c=224,side=4,layout=nhwc",
        "60x60": "c=128,side=60",
        "28x28-narrow": "c=48,side=28",
        "9x9-odd": "c=70,side=9,layout=nhwc",
        "1x1": "c=64,side=1",
    },
    reduced=reduced,
)
