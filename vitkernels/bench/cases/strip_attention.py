"""``ops.strip_attention`` against two matmuls and a softmax, compiled too, and SDPA on padded heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, parse_fields
from vitkernels.models.s2aformer import CONFIGS


@dataclass(frozen=True)
class StripProblem:
    label: str
    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int

    def describe(self, batch: int) -> str:
        return f"{batch}x{self.heads} {self.queries}x{self.keys} {self.key_dim}|{self.value_dim}"


# At 224 these leave 49 keys in every stage.
REDUCTIONS = (8, 4, 2, 1)
# The map that the first stage sees; each later one sees half its sides.
INPUTS = {"": (56, 56), "_512": (128, 128), "_800x1344": (200, 336)}


def model_layers(model: str, first: tuple[int, int]) -> tuple[StripProblem, ...]:
    widths, _, numbers_of_heads = CONFIGS[model]
    layers = []
    for i, (heads, width, reduction) in enumerate(zip(numbers_of_heads, widths, REDUCTIONS, strict=True)):
        height, columns = first[0] >> i, first[1] >> i
        keys = (height // reduction) * (columns // reduction)
        layers.append(StripProblem(f"stage {i + 1}", heads, height * columns, keys, 1, width // heads))
    return tuple(layers)


SHAPE_DEFAULTS = {"heads": 1, "queries": 196, "keys": 49, "r": 1, "dv": 64}


def parse_shape(text: str) -> StripProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS)
    return StripProblem(
        "shape", fields["heads"], fields["queries"], fields["keys"], fields["r"], fields["dv"]
    )


def make_inputs(
    problem: StripProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def heads_of_projection(tokens: int, width: int) -> Tensor:
        whole = torch.randn((batch, tokens, problem.heads, width), generator=generator)
        return whole.to(device, dtype).transpose(1, 2)

    tensors = {
        "q": heads_of_projection(problem.queries, problem.key_dim),
        "k": heads_of_projection(problem.keys, problem.key_dim),
        "v": heads_of_projection(problem.keys, problem.value_dim),
    }
    # The width of the values scales the logits of one channel, as in CMT and MetaSeg.
    width = problem.value_dim if problem.key_dim == 1 else problem.key_dim
    options = {"scale": width**-0.5}
    return Inputs(tensors, options, heads_of_projection(problem.queries, problem.value_dim))


def eager(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Two products and a softmax, the logits in memory; the scale on the smaller tensor."""
    return ((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v


def prepare_sdpa(inputs: Inputs, training: bool) -> Function:
    """On CUDA q and k are padded to 8 channels, which its kernels ask for."""
    scale = inputs.options["scale"]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.shape[-1] % 8:
            q, k = (F.pad(t, (0, 8 - t.shape[-1] % 8)) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return attention


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("sdpa", prepare_sdpa)]


def cost(problem: StripProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    """Of the weights one by one; the CPU's polynomials stay below these FLOPs and take no exponential a pair."""
    rows, size = batch * problem.heads, dtype.itemsize
    r, dv, n, m = problem.key_dim, problem.value_dim, problem.queries, problem.keys
    pairs = float(rows * n * m)
    flops = 2.0 * pairs * (r + dv)
    inputs, outputs = rows * (n * r + m * (r + dv)) * size, rows * n * dv * size
    lse = rows * n * max(4, size // 2)
    if mode == "fwd":
        return Cost(flops, inputs + outputs, pairs)
    # Forward also writes lse. Backward reads inputs, out, grad_out and lse, and writes a gradient per input.
    moved = 3 * inputs + 3 * outputs + 2 * lse
    return Cost(flops + 2.0 * pairs * (2 * r + 2 * dv), moved, 2.0 * pairs)


CASE = Case(
    operator="strip_attention",
    presets={model + name: model_layers(model, first) for model in CONFIGS for name, first in INPUTS.items()},
    default_preset="s2aformer_t",
    shape_help="heads=1,queries=196,keys=49,r=1,dv=64",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "196x49": "heads=4",
        "49x49": "heads=8,queries=49",
        "1x1": "queries=1,keys=1,dv=8",
        "65x50": "heads=2,queries=65,keys=50,dv=66",
        "300x256": "queries=300,keys=256,dv=48",
        "130x1050": "queries=130,keys=1050,dv=75",
        "r3": "heads=2,queries=70,keys=130,r=3,dv=24",
        "r16": "heads=3,queries=50,keys=49,r=16,dv=96",
    },
)
