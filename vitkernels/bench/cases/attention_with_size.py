"""``ops.attention_with_size`` against explicit logits with a bias, and SDPA with the bias as its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, parse_fields
from vitkernels.bench.presets import MERGING_MODELS, MergingModel
from vitkernels.kernels.attention_with_size import attention_with_size


@dataclass(frozen=True)
class SizedProblem:
    label: str
    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    packed: bool = False  # q, k and v are slices of one projection
    original: int = 0  # tokens that the sizes add up to; 0: three a key

    def describe(self, batch: int) -> str:
        return f"{batch}x{self.heads} {self.queries}x{self.keys} {self.key_dim}|{self.value_dim}"


def blocks_of(model: MergingModel) -> tuple[SizedProblem, ...]:
    """The second block, the first that sees sizes, one in the middle and the last."""
    dim, tokens, left = model.channels // model.heads, model.tokens, [model.tokens]
    for _ in range(1, model.depth):
        left.append(left[-1] - min(model.r, (left[-1] - 1) // 2))
    return tuple(
        SizedProblem(f"block {index + 1}", model.heads, n, n, dim, dim, True, tokens)
        for index in (1, model.depth // 2, model.depth - 1)
        for n in [left[index]]
    )


SHAPE_DEFAULTS = {"heads": 12, "queries": 181, "keys": 181, "d": 64, "dv": 64}


def parse_shape(text: str) -> SizedProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS)
    return SizedProblem(
        "shape", fields["heads"], fields["queries"], fields["keys"], fields["d"], fields["dv"]
    )


def make_inputs(
    problem: SizedProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def heads(tokens: int, *widths: int) -> tuple[Tensor, ...]:
        whole = torch.randn((batch, tokens, problem.heads * sum(widths)), generator=generator)
        parts = whole.to(device, dtype).split([problem.heads * width for width in widths], 2)
        return tuple(part.unflatten(2, (problem.heads, -1)).transpose(1, 2) for part in parts)

    d, dv = problem.key_dim, problem.value_dim
    if problem.packed:
        q, k, v = heads(problem.queries, d, d, dv)
    else:
        (q,), (k,), (v,) = heads(problem.queries, d), heads(problem.keys, d), heads(problem.keys, dv)
    merged = (problem.original or 3 * problem.keys) - problem.keys
    where = torch.randint(problem.keys, (batch, merged), generator=generator)
    size = torch.ones(batch, problem.keys).scatter_add_(1, where, torch.ones(batch, merged)).to(device)
    (grad,) = heads(problem.queries, dv)
    return Inputs({"q": q, "k": k, "v": v}, {"size": size}, grad)


def call(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor, backend: str) -> Tensor:
    size = size.double() if q.dtype is torch.float64 else size
    return attention_with_size(q, k, v, size, backend=backend)


def eager(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor) -> Tensor:
    """ToMe's own steps: the logits in memory, in float32 once the logarithm is added."""
    size = size.double() if q.dtype is torch.float64 else size
    logits = q @ k.mT * q.shape[-1] ** -0.5 + size.log()[:, None, None]
    return logits.softmax(-1).to(v.dtype) @ v


def prepare_sdpa(inputs: Inputs, training: bool) -> Function:
    """The bias as a mask, which most of its fused kernels do not take."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = inputs.options["size"].log().to(q.dtype)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("sdpa-mask", prepare_sdpa)]


def cost(problem: SizedProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    rows, size = batch * problem.heads, dtype.itemsize
    d, dv, n, m = problem.key_dim, problem.value_dim, problem.queries, problem.keys
    pairs = float(rows * n * m)
    flops = 2.0 * pairs * (d + dv)
    inputs, outputs = rows * (n * d + m * (d + dv)) * size, rows * n * dv * size
    sizes, lse = 4 * batch * m, rows * n * max(4, size // 2)
    if mode == "fwd":
        return Cost(flops, inputs + outputs + sizes, pairs)
    # Forward also writes lse. Backward reads inputs, out, grad_out and lse, and writes a gradient per input.
    moved = 3 * inputs + 3 * outputs + 2 * sizes + 2 * lse
    return Cost(flops + 2.0 * pairs * (2 * d + 2 * dv), moved, 2.0 * pairs)


CASE = Case(
    operator="attention_with_size",
    presets={name: blocks_of(model) for name, model in MERGING_MODELS.items() if model.class_token},
    default_preset="vit_b",
    shape_help="heads=12,queries=181,keys=181,d=64,dv=64",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "181": "heads=4",
        "1x1": "queries=1,keys=1,d=8,dv=8",
        "65x300": "heads=2,queries=65,keys=300,dv=40",
        "70x33-d80": "heads=3,queries=70,keys=33,d=80,dv=80",
        "128": "heads=2,queries=90,keys=131,d=128,dv=128",
        "odd": "heads=1,queries=50,keys=49,d=7,dv=11",
    },
    call=call,
)
