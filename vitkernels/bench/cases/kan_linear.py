"""``ops.kan_linear`` against plain PyTorch, and against a matrix product of its size alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.bench.presets import KAN_MODELS, KanLayer

GRIDS, INV_DENOMINATOR = 8, 1 / 0.33


@dataclass(frozen=True)
class KanProblem:
    label: str
    layer: KanLayer
    grids: int = GRIDS

    def describe(self, batch: int) -> str:
        return f"{batch * self.layer.rows}x{self.layer.channels}->{self.layer.outputs}"


SHAPE_DEFAULTS = {"rows": 196, "channels": 256, "outputs": 512, "grids": GRIDS}


def parse_shape(text: str) -> KanProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS)
    return KanProblem(
        "shape", KanLayer(fields["rows"], fields["channels"], fields["outputs"]), fields["grids"]
    )


def make_inputs(
    problem: KanProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    layer, depth = problem.layer, problem.layer.channels * problem.grids

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    tensors = {
        "x": random(batch * layer.rows, layer.channels).to(dtype),
        "weight": (random(layer.outputs, depth) / depth**0.5).to(dtype),
        "ln_weight": (1 + 0.2 * random(layer.channels)).to(dtype),
        "ln_bias": (0.2 * random(layer.channels)).to(dtype),
    }
    # An option and no tensor: the grid is frozen, so nobody is timed with its gradient.
    options = {
        "grid": torch.linspace(-2, 2, problem.grids, device=device),
        "inv_denominator": INV_DENOMINATOR,
    }
    return Inputs(tensors, options, random(batch * layer.rows, layer.outputs).to(dtype))


def basis(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, grid: Tensor, inv_denominator: float) -> Tensor:
    u = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias)
    t = torch.tanh((u[..., None] - grid) * inv_denominator)  # float32 for 16-bit x, as under autocast
    return (1 - t * t).flatten(-2).to(x.dtype)


def eager(
    x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, *, grid: Tensor, inv_denominator: float
) -> Tensor:
    return F.linear(basis(x, ln_weight, ln_bias, grid, inv_denominator), weight)


def prepare_gemm(inputs: Inputs, training: bool) -> Function:
    """The matrix product alone, its basis made beforehand: the rate that kernels which make it can hope for."""
    if training:
        raise Unavailable("the basis was made beforehand")
    tensors: dict[str, Any] = {name: t for name, t in inputs.tensors.items() if name != "weight"}
    phi = basis(**tensors, **inputs.options)
    return lambda x, weight, ln_weight, ln_bias: F.linear(phi, weight)


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("gemm-alone", prepare_gemm, modes=("fwd",))]


def cost(problem: KanProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    layer, size = problem.layer, dtype.itemsize
    rows, depth = batch * layer.rows, layer.channels * problem.grids
    flops = 2.0 * rows * depth * layer.outputs
    moved = (rows * (layer.channels + layer.outputs) + depth * layer.outputs) * size
    exps = float(rows * layer.channels)  # the others follow from one by multiplication
    if mode == "fwd":
        return Cost(flops, moved, exps)
    # Forward also writes mean and rstd. Backward reads x, weight, grad_y; writes grad_x, grad_weight.
    backward = (rows * (2 * layer.channels + layer.outputs) + 2 * depth * layer.outputs) * size
    return Cost(3 * flops, moved + backward + 4.0 * rows * max(4, size // 2), 2 * exps)


def reduced(problem: KanProblem, batch: int) -> dict[str, int]:
    rows = batch * problem.layer.rows
    return {"ln_weight": rows, "ln_bias": rows}


CASE = Case(
    operator="kan_linear",
    presets={
        name: tuple(
            KanProblem(f"stage {2 + i // 2} layer {1 + i % 2}", layer) for i, layer in enumerate(layers)
        )
        for name, layers in KAN_MODELS.items()
    },
    default_preset="medvit_small",
    shape_help="rows=196,channels=256,outputs=512,grids=8 (rows of an image)",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "small": "rows=49,channels=24,outputs=48",
        "odd": "rows=131,channels=37,outputs=129",
        "grid-5": "rows=70,channels=19,outputs=33,grids=5",
        "grid-1": "rows=20,channels=7,outputs=9,grids=1",
        "grid-64": "rows=40,channels=5,outputs=20,grids=64",
        "one row": "rows=1,channels=64,outputs=128",
        "many rows": "rows=3000,channels=16,outputs=24",
        "wide": "rows=60,channels=128,outputs=520",
    },
    reduced=reduced,
)
