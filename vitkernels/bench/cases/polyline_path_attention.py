"""``ops.polyline_path_attention`` against the eager official form, compiled too, and FlexAttention run twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.kernels.polyline_path_attention import reference


@dataclass(frozen=True)
class PolylineProblem:
    label: str
    sizes: tuple[int, int]
    heads: int
    head_dim: int
    criss_cross: bool
    value_dim: int = 0  # as head_dim

    @property
    def dv(self) -> int:
        return self.value_dim or self.head_dim

    def describe(self, batch: int) -> str:
        width = "" if self.dv == self.head_dim else f"|{self.dv}"
        shape = "x".join(map(str, (batch, *self.sizes, self.heads, self.head_dim)))
        return f"{shape}{width} {'criss-cross' if self.criss_cross else 'whole'}"


# Heads and head dimensions of the four stages, and how many of them are criss-cross.
MODELS = {
    "ppma_t": ((4, 4, 8, 16), (16, 32, 32, 32), 2),
    "ppma_s": ((4, 4, 8, 16), (16, 32, 32, 32), 3),
    "ppma_b": ((5, 5, 10, 16), (16, 32, 32, 32), 3),
}
# The map that the last stage sees; each earlier one sees twice its sides.
INPUTS = {"": (7, 7), "_512": (16, 16), "_800x1344": (25, 42), "_1024": (32, 32)}


def model_layers(model: str, last: tuple[int, int]) -> tuple[PolylineProblem, ...]:
    heads, dims, crossed = MODELS[model]
    return tuple(
        PolylineProblem(
            f"stage {i + 1}", (last[0] << (3 - i), last[1] << (3 - i)), heads[i], dims[i], i < crossed
        )
        for i in range(4)
    )


SHAPE_DEFAULTS = {"map": (14, 14), "heads": 1, "d": 32, "dv": 0, "cross": 0}


def parse_shape(text: str) -> PolylineProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("dv", "cross"))
    if fields["cross"] not in (0, 1):
        raise ValueError(f"shape: expected cross in 0, 1; got {fields['cross']!r}")
    return PolylineProblem(
        "shape", fields["map"], fields["heads"], fields["d"], bool(fields["cross"]), fields["dv"]
    )


def make_inputs(
    problem: PolylineProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    heads, d, dv = problem.heads, problem.head_dim, problem.dv
    lead = (batch, *problem.sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = {name: random(*lead, heads, c) for name, c in (("q", d), ("k", d), ("v", dv))}
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    for name in ("log_decay_w", "log_decay_h"):
        # As the models begin: -softplus of time steps between 0.001 and 0.1, spread evenly in their logarithm.
        spread = torch.rand((*lead, heads), generator=generator)
        tensors[name] = -(0.001 * 100**spread).to(device, accumulate)
    options = {"mode": "criss_cross" if problem.criss_cross else "whole"}
    return Inputs(tensors, options, random(*lead, heads, dv))


def _segments(sums: Tensor) -> Tensor:
    """[..., n] -> [..., n, n]: the log decay between two places of a line, a triangle at a time."""
    difference = sums[..., :, None] - sums[..., None, :]
    pairs = torch.ones(difference.shape[-2:], dtype=torch.bool, device=sums.device)
    below = difference.masked_fill(~pairs.tril(0), 0.0)
    above = (-difference).masked_fill(~pairs.triu(1), 0.0)
    return below + above


def eager(q: Tensor, k: Tensor, v: Tensor, log_decay_w: Tensor, log_decay_h: Tensor, *, mode: str) -> Tensor:
    """The official form, operation by operation: the masks of rows and columns from triangles, for whole maps each
    repeated to all pairs, added and brought into order; then logits and probabilities of all pairs."""
    q = q * q.shape[-1] ** -0.5
    rows = _segments(log_decay_w.cumsum(2).permute(0, 1, 3, 2).contiguous())  # [B, H, heads, W, W]
    columns = _segments(log_decay_h.cumsum(1).permute(0, 2, 3, 1).contiguous())  # [B, W, heads, H, H]
    if mode == "criss_cross":
        across, down = (t.permute(0, 1, 3, 2, 4) for t in (q, k)), (t.permute(0, 2, 3, 1, 4) for t in (q, k))
        of_rows, of_columns = (
            torch.softmax(torch.matmul(a, b.transpose(-1, -2)) + mask, -1).to(v.dtype)
            for (a, b), mask in ((across, rows), (down, columns))
        )

        def along(values: Tensor) -> Tensor:  # [B, H, W, heads, dv]
            return torch.matmul(of_rows, values.permute(0, 1, 3, 2, 4)).permute(0, 1, 3, 2, 4)

        def over(values: Tensor) -> Tensor:
            return torch.matmul(of_columns, values.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)

        return (0.5 * over(along(v)) + 0.5 * along(over(v))).contiguous()
    batch, height, width, heads, _ = q.shape
    every_row = rows.transpose(1, 2).unsqueeze(3).repeat(1, 1, 1, height, 1, 1)  # [B, heads, i, j, k, l]
    every_column = columns.permute(0, 2, 3, 4, 1).unsqueeze(4).repeat(1, 1, 1, 1, width, 1)
    paths = (every_row + every_column).transpose(3, 4).contiguous().view(batch, heads, height * width, -1)
    q, k, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2))
    first, second = torch.softmax(scores + paths, -1), torch.softmax(scores + paths.transpose(-1, -2), -1)
    out = torch.matmul((0.5 * first + 0.5 * second).to(v.dtype), values)
    return out.transpose(1, 2).reshape(v.shape)


def prepare_flex(inputs: Inputs, training: bool) -> Function:
    """FlexAttention with the two cumulative sums captured, once for each softmax."""
    if inputs.options["mode"] == "criss_cross":
        raise Unavailable("a criss-cross takes two products with v for each matrix of probabilities")
    if training and not inputs.grad_out.is_cuda:
        raise Unavailable("FlexAttention has no backward on the CPU")
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Unavailable(f"flex_attention: {error}") from error
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    width = inputs.grad_out.shape[2]

    def attention(q: Tensor, k: Tensor, v: Tensor, log_decay_w: Tensor, log_decay_h: Tensor) -> Tensor:
        along, down = reference.cumulative(log_decay_w, log_decay_h).flatten(3).unbind(0)

        def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor, corner: Tensor) -> Tensor:
            row = (along[b, h, query] - along[b, h, corner]).abs()
            return -(row + (down[b, h, corner] - down[b, h, key]).abs())

        def first(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + mask(b, h, i, j, i // width * width + j % width)

        def second(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + mask(b, h, j, i, j // width * width + i % width)

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=first) + compiled(q, k, v, score_mod=second)
        return (0.5 * out).transpose(1, 2).reshape(inputs.grad_out.shape)

    return attention


def peers(device: torch.device) -> Sequence[Provider]:
    return [Provider("flex", prepare_flex)]


def cost(problem: PolylineProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    height, width = problem.sizes
    d, dv, size = problem.head_dim, problem.dv, dtype.itemsize
    rows = batch * problem.heads * height * width
    pairs = float(rows * (height + width if problem.criss_cross else height * width))
    products = 2 if problem.criss_cross else 1  # with values, of each matrix of probabilities
    sums = 2 * rows * max(4, size // 2)  # of one pair of planes: decays, their sums, lse
    flops = 2.0 * pairs * (d + products * dv)
    # Without a product of exponentials whole maps would take two of each pair.
    moved = rows * (2 * d + 2 * dv) * size + sums
    if mode == "fwd":
        return Cost(flops, moved, pairs)
    # Forward also writes sums and lse. Backward reads q, k, v, out, grad_out, sums, lse; writes dq, dk, dv, decays'.
    backward = rows * (4 * d + 4 * dv) * size + 3 * sums
    return Cost(3 * flops, moved + backward + 2 * sums, 2.0 * pairs)


CASE = Case(
    operator="polyline_path_attention",
    presets={model + name: model_layers(model, last) for model in MODELS for name, last in INPUTS.items()},
    default_preset="ppma_t",
    shape_help="map=14x14,heads=1,d=32,dv=32,cross=0|1",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "14x14": "map=14x14,heads=2",
        "14x14-cross": "map=14x14,heads=2,cross=1",
        "7x9": "map=7x9,heads=3,d=24,dv=40",
        "25x42": "map=25x42,heads=1",
        "56x56-cross": "map=56x56,heads=1,d=16,cross=1",
        "1x64": "map=1x64,heads=1,d=64",
        "9x70-cross": "map=9x70,heads=2,d=16,dv=32,cross=1",
    },
)
