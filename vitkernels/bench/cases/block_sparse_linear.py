"""``ops.block_sparse_linear`` against the layer with a dense weight, masked or not, and PyTorch's own BSR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels import ops
from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor

PATTERNS = ("uniform", "lpvit", "banded")
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class SparseLayer:
    label: str
    out_features: int
    in_features: int
    tokens: int  # of an image
    block: tuple[int, int] = (32, 32)
    density: float = 0.5
    pattern: str = "uniform"

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.out_features // self.block[0]), -(-self.in_features // self.block[1])

    @property
    def stored(self) -> int:
        return max(1, math.floor(self.density * math.prod(self.grid)))

    def describe(self, batch: int) -> str:
        block = "x".join(map(str, self.block))
        shape = f"{batch * self.tokens}x{self.in_features}->{self.out_features}"
        return f"{shape} {block} d={self.density:g}{'' if self.pattern == 'uniform' else ' ' + self.pattern}"


def mask_of(problem: SparseLayer, generator: torch.Generator) -> Tensor:
    """Which blocks are kept: `stored` of them, whatever the pattern.

    lpvit: the best by a score whose rows and columns differ as those of trained layers do, one row and one column
    pruned whole. banded: nearest to the diagonal.
    """
    rows, columns = problem.grid
    if problem.pattern == "banded":
        row, column = torch.arange(rows)[:, None] / rows, torch.arange(columns)[None, :] / columns
        score = -(row - column).abs() + 1e-6 * torch.rand(rows, columns, generator=generator)
    else:
        score = torch.randn(rows, columns, generator=generator)
    if problem.pattern == "lpvit":
        score = (
            score + torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator)
        )
        if rows > 1 and columns > 1 and problem.stored <= (rows - 1) * (columns - 1):
            score[rows // 2] = score[:, columns // 3] = -torch.inf
    keep = torch.zeros(rows * columns, dtype=torch.bool)
    keep[score.flatten().topk(problem.stored).indices] = True
    return keep.view(rows, columns)


def make_inputs(
    problem: SparseLayer,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = (problem.density * problem.in_features) ** -0.5
    dense = random(problem.out_features, problem.in_features) * scale
    weight = BlockSparseTensor.from_dense(dense, problem.block, mask_of(problem, generator)).to(device, dtype)
    tensors = {
        "x": random(batch * problem.tokens, problem.in_features).to(device, dtype),
        "values": weight.values,
        "bias": random(problem.out_features).to(device, dtype),
    }
    # The pattern alone: its values are another tensor's.
    pattern = weight.with_values(torch.zeros_like(weight.values))
    return Inputs(
        tensors,
        {"pattern": pattern},
        random(batch * problem.tokens, problem.out_features).to(device, dtype),
    )


def call(x: Tensor, values: Tensor, bias: Tensor, *, pattern: BlockSparseTensor, backend: str) -> Tensor:
    return ops.block_sparse_linear(x, pattern.with_values(values), bias, backend=backend)


def eager(x: Tensor, values: Tensor, bias: Tensor, *, pattern: BlockSparseTensor) -> Tensor:
    """What masks a dense weight at every call, as fine-tuning does."""
    return F.linear(x, pattern.with_values(values).to_dense(), bias)


class DenseLayer(torch.autograd.Function):
    """The layer whose weight is dense: three products, and the stored blocks of its gradient, which the gate reads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor, dense: Tensor, pattern: Any, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, dense, rows)
        ctx.pattern = pattern
        return F.linear(x, dense, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dense, rows = ctx.saved_tensors
        return grad @ dense, stored_blocks(grad.T @ x, ctx.pattern, rows), grad.sum(0), None, None, None


def rows_of_blocks(pattern: BlockSparseTensor) -> Tensor:
    """Where the rows of the stored blocks are in the padded dense weight, in rows of a block."""
    (bh, _), (_, columns) = pattern.block_shape, pattern.grid
    inside = torch.arange(bh, device=pattern.row_indices.device)
    return ((pattern.row_indices[:, None] * bh + inside) * columns + pattern.col_indices[:, None]).flatten()


def stored_blocks(dense: Tensor, pattern: BlockSparseTensor, rows: Tensor) -> Tensor:
    """By whole rows: the dense layer is charged for them, and one element after the other they take a twentieth of
    its time."""
    (bh, bw), grid, (height, width) = pattern.block_shape, pattern.grid, pattern.shape
    if height % bh or width % bw:
        dense = F.pad(dense, (0, grid[1] * bw - width, 0, grid[0] * bh - height))
    return dense.view(-1, bw).index_select(0, rows).view(-1, bh, bw)


def prepare_dense(inputs: Inputs, training: bool) -> Function:
    pattern = inputs.options["pattern"]
    dense = pattern.with_values(inputs.tensors["values"]).to_dense().contiguous()
    if not training:
        return lambda x, values, bias: F.linear(x, dense, bias)
    rows = rows_of_blocks(pattern)
    return lambda x, values, bias: DenseLayer.apply(x, values, bias, dense, pattern, rows)


def prepare_bsr(inputs: Inputs, training: bool) -> Function:
    if training:
        raise Unavailable("PyTorch's BSR has no gradient that stays sparse")
    weight = inputs.options["pattern"].with_values(inputs.tensors["values"])
    try:
        bsr = weight.to_bsr()
        F.linear(inputs.tensors["x"], bsr, inputs.tensors["bias"])
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"PyTorch's BSR: {str(error).splitlines()[0]}") from error
    return lambda x, values, bias: F.linear(x, bsr, bias)


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("dense", prepare_dense), Provider("torch-bsr", prepare_bsr, modes=("fwd",))]


def cost(problem: SparseLayer, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    rows, stored = batch * problem.tokens, problem.stored * math.prod(problem.block)
    flops = 2.0 * rows * stored
    features = problem.in_features + problem.out_features
    moved = (rows * features + stored + problem.out_features) * dtype.itemsize
    if mode == "fwd":
        return Cost(flops, moved)
    # Backward reads grad_y, x and the values, writes the gradients of x, the values and bias.
    backward = (rows * (features + problem.in_features) + 2 * stored + problem.out_features) * dtype.itemsize
    return Cost(3 * flops, moved + backward)


def reduced(problem: SparseLayer, batch: int) -> dict[str, int]:
    return dict.fromkeys(("values", "bias"), batch * problem.tokens)


def vit(width: int, tokens: int, block: tuple[int, int], density: float) -> tuple[SparseLayer, ...]:
    """The four linear layers of a block of a vision transformer."""
    sizes = {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "fc1": (4 * width, width),
        "fc2": (width, 4 * width),
    }
    return tuple(SparseLayer(name, *size, tokens, block, density) for name, size in sizes.items())


FC1 = SparseLayer("fc1", 3072, 768, 197)
PRESETS = {
    "deit_base": vit(768, 197, (32, 32), 0.5) + vit(768, 197, (32, 32), 0.2),
    "deit_base_64": vit(768, 197, (64, 64), 0.5) + vit(768, 197, (64, 64), 0.2),
    "deit_small": vit(384, 197, (16, 16), 0.5) + vit(384, 197, (32, 32), 0.5),
    "deit_base_distilled": tuple(
        layer for block in ((32, 32), (32, 64), (64, 32)) for layer in vit(768, 198, block, 0.5)
    ),
    "deit_small_distilled": vit(384, 198, (16, 16), 0.5),
    "vit_large": vit(1024, 197, (32, 32), 0.5)[2:] + vit(1024, 197, (64, 64), 0.2)[2:],
    "vit_huge": vit(1280, 257, (32, 32), 0.5)[2:] + vit(1280, 257, (128, 128), 0.2)[2:],
    "square": tuple(SparseLayer(f"d={d:g}", 4096, 4096, 256, (64, 64), d) for d in (0.1, 0.5)),
    "densities": tuple(replace(FC1, label=f"d={d:g}", density=d) for d in DENSITIES),
    "patterns": tuple(replace(FC1, label=name, pattern=name) for name in PATTERNS),
    "head": (SparseLayer("head", 1000, 768, 1), SparseLayer("patch-embed", 768, 768, 196)),
}

SHAPE_DEFAULTS = {
    "out": 768,
    "in": 768,
    "tokens": 197,
    "block": (32, 32),
    "density": 0.5,
    "pattern": "uniform",
}


def parse_shape(text: str) -> SparseLayer:
    fields = parse_fields(text, SHAPE_DEFAULTS)
    if fields["pattern"] not in PATTERNS:
        raise ValueError(f"shape: expected pattern in {', '.join(PATTERNS)}; got {fields['pattern']!r}")
    if not 0 < fields["density"] <= 1:
        raise ValueError(f"shape: expected density above 0, at most 1; got {fields['density']}")
    return SparseLayer("shape", *fields.values())


CASE = Case(
    operator="block_sparse_linear",
    presets=PRESETS,
    default_preset="deit_base",
    shape_help="out=768,in=768,tokens=197,block=32x32,density=0.5,pattern=uniform|lpvit|banded",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "whole": "out=128,in=192,tokens=49",
        "edges": "out=70,in=50,tokens=33,block=32x16",
        "wide block": "out=33,in=17,tokens=7,block=16x32,density=1",
        "large block": "out=256,in=384,tokens=70,block=128x128",
        "thin": "out=96,in=192,tokens=61,block=64x32,density=0.2",
        "rows missing": "out=256,in=256,tokens=61,block=16x16,density=0.1,pattern=lpvit",
        "one token": "out=1000,in=768,tokens=1",
        "many tokens": "out=64,in=64,tokens=3000,block=16x16",
        "many blocks": "out=392,in=200,tokens=700",
    },
    reduced=reduced,
    call=call,
)
