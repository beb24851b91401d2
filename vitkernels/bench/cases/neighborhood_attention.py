"""``ops.neighborhood_attention`` against eager PyTorch that gathers, FlexAttention with a block mask, and natten."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.bench.presets import NEIGHBORHOOD_MODELS, NeighborhoodLayer
from vitkernels.kernels.neighborhood_attention import count_pairs
from vitkernels.kernels.neighborhood_attention.reference import neighbors


@dataclass(frozen=True)
class NeighborhoodProblem:
    label: str
    layer: NeighborhoodLayer
    with_lse: bool = False  # lse is returned too, and a gradient reaches it

    def describe(self, batch: int) -> str:
        layer = self.layer
        shape = "x".join(map(str, (batch, *layer.sizes, layer.heads, layer.head_dim)))
        width = "" if layer.value_dim == layer.head_dim else f"|{layer.value_dim}"
        step = "" if set(layer.dilation) == {1} else f" d{layer.dilation[0]}"
        return f"{shape}{width} k{layer.kernel_size[0]}{step}"

    def pairs(self, batch: int) -> int:
        """(query, key) pairs of all heads."""
        layer = self.layer
        axes = (layer.sizes, layer.kernel_size, layer.dilation, (layer.is_causal,) * len(layer.sizes))
        return batch * layer.heads * count_pairs(*axes)

    @property
    def entries(self) -> int:
        return torch.Size(2 * k - 1 for k in self.layer.kernel_size).numel() if self.layer.rpb else 0


SHAPE_DEFAULTS = {
    "map": (14, 14),
    "heads": 1,
    "d": 32,
    "dv": 0,  # as d
    "kernel": (7, 7),
    "dilation": (1, 1),
    "causal": 0,
    "rpb": 1,
    "lse": 0,
}


def parse_shape(text: str) -> NeighborhoodProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("dv", "causal", "rpb", "lse"))
    for key in ("causal", "rpb", "lse"):
        if fields[key] not in (0, 1):
            raise ValueError(f"shape: expected {key} in 0, 1; got {fields[key]!r}")
    if fields["causal"] and fields["rpb"]:
        raise ValueError("shape: expected rpb=0 with causal=1; got rpb=1")
    layer = NeighborhoodLayer(
        fields["map"],
        fields["heads"],
        fields["d"],
        fields["dv"] or fields["d"],
        fields["kernel"],
        fields["dilation"],
        rpb=bool(fields["rpb"]),
        is_causal=bool(fields["causal"]),
    )
    return NeighborhoodProblem("shape", layer, with_lse=bool(fields["lse"]))


def make_inputs(
    problem: NeighborhoodProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    layer = problem.layer
    heads, d, dv = layer.heads, layer.head_dim, layer.value_dim
    lead = (batch, *layer.sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # One projection's output: [..., 3, heads, d] where the widths agree, as the models have it.
    packed = random(*lead, heads * (2 * d + dv)).split([heads * d, heads * d, heads * dv], dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in packed)
    tensors = {"q": q, "k": k, "v": v}
    options: dict[str, Any] = {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
    if layer.rpb:
        tensors["rpb"] = random(heads, *(2 * k - 1 for k in layer.kernel_size))
    if layer.is_causal:
        options["is_causal"] = True
    grad_out = random(*lead, heads, dv)
    if not problem.with_lse:
        return Inputs(tensors, options, grad_out)
    options["return_lse"] = True
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    grad_lse = torch.randn((*lead, heads), generator=generator).to(device, accumulate)
    return Inputs(tensors, options, grad_out, {"lse": grad_lse})


def make_indices(
    sizes: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """As a layer would keep them in buffers: they are not part of the time of a call."""
    rank = len(sizes)
    return neighbors(sizes, kernel_size, (1,) * rank, dilation, (is_causal,) * rank, device)


indices = functools.lru_cache(maxsize=16)(make_indices)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None = None,
    *,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: bool = False,
    return_lse: bool = False,
) -> Any:
    """Gathers the keys and values of every query, then two batched products.

    Heads come first, so that nothing is copied that has been gathered; `index_select` takes rows, and its gradient
    needs no sort.
    """
    rank = len(kernel_size)
    # Dynamo traces what is below a cache, and warns that it does.
    indices_of = make_indices if torch.compiler.is_compiling() else indices
    token, entry, seen = indices_of(tuple(q.shape[1 : 1 + rank]), kernel_size, dilation, is_causal, q.device)

    def gathered(x: Tensor) -> Tensor:  # [batch, heads, queries, keys, dim]
        rows = x.flatten(1, rank).transpose(1, 2).contiguous()
        return rows.index_select(2, token.flatten()).unflatten(2, token.shape)

    queries = (q * q.shape[-1] ** -0.5).flatten(1, rank).transpose(1, 2)
    logits = (gathered(k) @ queries.unsqueeze(-1)).squeeze(-1)
    if rpb is not None:
        logits = logits + rpb.flatten(1)[:, entry]
    if is_causal:
        logits = logits.masked_fill(~seen, float("-inf"))
    out = (logits.softmax(-1).unsqueeze(-2) @ gathered(v)).squeeze(-2)
    out = out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
    if not return_lse:
        return out
    lse = logits.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return out, lse.transpose(1, 2).reshape(q.shape[:-1])


def prepare_flex(inputs: Inputs, training: bool) -> Function:
    """FlexAttention with a block mask of the neighborhood and the bias as a score_mod, compiled."""
    if "return_lse" in inputs.options:
        raise Unavailable("returns no lse")
    if training and not inputs.grad_out.is_cuda:
        raise Unavailable("FlexAttention has no backward on the CPU")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Unavailable(f"flex_attention: {error}") from error
    kernel_size, dilation = inputs.options["kernel_size"], inputs.options["dilation"]
    rank, device = len(kernel_size), inputs.grad_out.device
    sizes = tuple(inputs.grad_out.shape[1 : 1 + rank])
    token, entry, seen = indices(sizes, kernel_size, dilation, "is_causal" in inputs.options, device)
    tokens = token.shape[0]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool, device=device).scatter(1, token, seen)
    entries = torch.zeros(tokens, tokens, dtype=torch.int64, device=device).scatter(1, token, entry)
    mask = create_block_mask(lambda b, h, i, j: visible[i, j], None, None, tokens, tokens, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        score_mod = None
        if rpb is not None:
            flat = rpb.flatten(1)

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + flat[h, entries[i, j]]

        q, k, v = (t.flatten(1, rank).transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=score_mod, block_mask=mask)
        return out.transpose(1, 2).reshape(inputs.grad_out.shape)

    return attention


def prepare_full_scores(inputs: Inputs, training: bool) -> Function:
    """Attention of all tokens to all, masked: what natten's eager FlexAttention amounts to on the CPU."""
    if "return_lse" in inputs.options:
        raise Unavailable("returns no lse")
    kernel_size, dilation = inputs.options["kernel_size"], inputs.options["dilation"]
    rank, device = len(kernel_size), inputs.grad_out.device
    sizes = tuple(inputs.grad_out.shape[1 : 1 + rank])
    token, entry, seen = indices(sizes, kernel_size, dilation, "is_causal" in inputs.options, device)
    shape = (token.shape[0],) * 2
    hidden = torch.ones(shape, dtype=torch.bool, device=device).scatter(1, token, ~seen)
    entries = torch.zeros(shape, dtype=torch.int64, device=device).scatter(1, token, entry)

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        q, k, v = (t.flatten(1, rank).transpose(1, 2) for t in (q, k, v))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if rpb is not None:
            logits = logits + rpb.flatten(1)[:, entries]
        out = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return out.transpose(1, 2).reshape(inputs.grad_out.shape)

    return attention


def prepare_natten(inputs: Inputs, training: bool) -> Function:
    """natten's best backend; on the CPU that is eager FlexAttention, which forms the full score matrix."""
    try:
        import natten
    except ImportError as error:
        raise Unavailable(f"natten: {error}") from error
    if "rpb" in inputs.tensors:
        raise Unavailable("natten has had no relative position bias since 0.20")
    if training and not inputs.grad_out.is_cuda:
        raise Unavailable("natten has no backward on the CPU")
    if "return_lse" in inputs.options:
        raise Unavailable("its lse has no gradient")
    rank = len(inputs.options["kernel_size"])
    attend = natten.na1d if rank == 1 else natten.na2d
    options = {**inputs.options, **({} if inputs.grad_out.is_cuda else {"backend": "flex-fna"})}

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        return attend(q, k, v, **options)

    return attention


def peers(device: torch.device) -> Sequence[Provider]:
    return [
        Provider("full-scores", prepare_full_scores),
        Provider("flex", prepare_flex),
        Provider("natten", prepare_natten),
    ]


def cost(problem: NeighborhoodProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    layer, pairs = problem.layer, problem.pairs(batch)
    d, dv, size = layer.head_dim, layer.value_dim, dtype.itemsize
    rows = batch * layer.heads * torch.Size(layer.sizes).numel()
    flops = 2.0 * pairs * (d + dv)
    bias = layer.heads * problem.entries * size
    moved = rows * (2 * d + 2 * dv) * size + bias
    if mode == "fwd":
        return Cost(flops, moved, float(pairs))
    # Forward also writes lse. Backward reads q, k, v, out, grad_out, lse; writes dq, dk, dv.
    lse = rows * max(4, size // 2)
    backward = rows * (4 * d + 4 * dv) * size + 2 * bias
    return Cost(3 * flops, moved + backward + 2 * lse, 2.0 * pairs)


def reduced(problem: NeighborhoodProblem, batch: int) -> dict[str, int]:
    if not problem.entries:
        return {}
    return {"rpb": max(1, problem.pairs(batch) // problem.layer.heads // problem.entries)}


CASE = Case(
    operator="neighborhood_attention",
    presets={
        name: tuple(NeighborhoodProblem(label, layer) for label, layer in layers.items())
        for name, layers in NEIGHBORHOOD_MODELS.items()
    },
    default_preset="dinat_mini",
    shape_help="map=14x14,heads=1,d=32,dv=32,kernel=7x7,dilation=1x1,causal=0|1,rpb=0|1,lse=0|1",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "14x14": "map=14x14,heads=2",
        "14x14-dense": "map=14x14,heads=2,dilation=2x2,lse=1",
        "7x7": "map=7x7,heads=3,d=32,dv=48,lse=1",
        "15x22-dilated": "map=15x22,heads=2,d=24,dilation=2x3,lse=1",
        "13x17-even": "map=13x17,heads=2,d=40,dv=16,kernel=4x6",
        "9x31-causal": "map=9x31,heads=2,d=16,kernel=5x3,dilation=1x2,causal=1,rpb=0,lse=1",
        "1x64": "map=1x64,heads=1,d=64,kernel=1x9,rpb=0",
        "28x28": "map=28x28,heads=1,d=96,kernel=11x11",
    },
    reduced=reduced,
)
