"""``ops.window_attention`` against plain PyTorch, SDPA and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.bench.presets import WINDOW_MODELS, WindowStage


def table_entries(window: tuple[int, int], bias: str | None) -> int:
    """Entries of a head's bias table: of "absolute", "signed", or no bias."""
    height, width = window
    return {"absolute": height * width, "signed": (2 * height - 1) * (2 * width - 1)}.get(bias or "none", 0)


def table_terms(windows: int, window: tuple[int, int], bias: str | None) -> int:
    """How many (query, key) pairs of all windows share an entry of the bias table, on average; at least 1."""
    pairs = windows * (window[0] * window[1]) ** 2
    return max(1, pairs // max(1, table_entries(window, bias)))


@dataclass(frozen=True)
class WindowProblem:
    label: str
    stage: WindowStage
    with_lse: bool = False  # lse is returned too, and a gradient reaches it

    @property
    def tokens(self) -> int:
        return self.stage.window[0] * self.stage.window[1]

    @property
    def entries(self) -> int:
        return table_entries(self.stage.window, self.stage.bias)

    def describe(self, batch: int) -> str:
        stage = self.stage
        shape = f"{batch * stage.windows}x{stage.heads}x{self.tokens}x{stage.head_dim}"
        return shape if stage.value_dim == stage.head_dim else f"{shape}|{stage.value_dim}"


SHAPE_DEFAULTS = {
    "windows": 1,
    "window": (7, 7),
    "heads": 1,
    "d": 16,
    "dv": 0,  # as d
    "bias": "absolute",
    "layout": "packed",
    "lse": 0,
}


def parse_shape(text: str) -> WindowProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("dv", "lse"))
    choices = {"bias": ("absolute", "signed", "none"), "layout": ("map", "packed"), "lse": (0, 1)}
    for key, allowed in choices.items():
        if fields[key] not in allowed:
            raise ValueError(f"shape: expected {key} in {', '.join(map(str, allowed))}; got {fields[key]!r}")
    d = fields["d"]
    size = (fields["windows"], fields["window"], fields["heads"], d, fields["dv"] or d)
    stage = WindowStage(*size, fields["bias"], fields["layout"])
    return WindowProblem("shape", stage, with_lse=bool(fields["lse"]))


def make_inputs(
    problem: WindowProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    stage, tokens = problem.stage, problem.tokens
    count, heads, d, dv = batch * stage.windows, stage.heads, stage.head_dim, stage.value_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def heads_of(channels: Tensor) -> Tensor:  # [count, heads * c, tokens] -> [count, heads, tokens, c]
        return channels.unflatten(1, (heads, -1)).transpose(-2, -1)

    if stage.layout == "map":
        # q comes out of its own depthwise convolution; k and v are channel slices of one 1x1 convolution.
        _, k, v = random(count, heads * (2 * d + dv), tokens).split([heads * d, heads * d, heads * dv], dim=1)
        q, k, v = heads_of(random(count, heads * d, tokens)), heads_of(k), heads_of(v)
        grad_out = heads_of(random(count, heads * dv, tokens))
    else:
        packed = random(count, tokens, heads, 2 * d + dv).transpose(1, 2)
        q, k, v = packed.split([d, d, dv], dim=-1)
        grad_out = random(count, tokens, heads, dv).transpose(1, 2)
    tensors = {"q": q, "k": k, "v": v}
    options: dict[str, Any] = {"window": stage.window}
    if stage.bias != "none":
        tensors["bias_table"], options["bias_index"] = random(heads, problem.entries), stage.bias
    if not problem.with_lse:
        return Inputs(tensors, options, grad_out)
    options["return_lse"] = True
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    grad_lse = torch.randn((count, heads, tokens), generator=generator).to(device, accumulate)
    return Inputs(tensors, options, grad_out, {"lse": grad_lse})


def make_index(window: tuple[int, int], bias_index: str, device: torch.device) -> Tensor:
    """[N, N] positions in the bias table, as the public models keep them in a buffer."""
    height, width = window
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    dy, dx = y[:, None] - y, x[:, None] - x
    if bias_index == "signed":
        return (dy + height - 1) * (2 * width - 1) + dx + width - 1
    return dy.abs() * width + dx.abs()


relative_index = functools.lru_cache(maxsize=64)(make_index)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    *,
    window: tuple[int, int],
    bias_index: str = "absolute",
    return_lse: bool = False,
) -> Any:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias_table is not None:
        # Dynamo traces what is below a cache, and warns that it does.
        index_of = make_index if torch.compiler.is_compiling() else relative_index
        logits = logits + bias_table[:, index_of(window, bias_index, q.device)]
    out = logits.softmax(-1) @ v
    if not return_lse:
        return out
    return out, logits.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)


def _gather(inputs: Inputs) -> Callable[[Tensor | None], Tensor | None]:
    """table -> bias, for the peers, which have no other way to add one."""
    if "return_lse" in inputs.options:
        raise Unavailable("returns no lse")
    if "bias_table" not in inputs.tensors:
        return lambda table: None
    index = relative_index(inputs.options["window"], inputs.options["bias_index"], inputs.grad_out.device)
    return lambda table: None if table is None else table[:, index]


def _cached_bias(inputs: Inputs) -> Tensor | None:
    bias = _gather(inputs)(inputs.tensors.get("bias_table"))
    return None if bias is None else bias.contiguous()


def prepare_cached_bias(inputs: Inputs, training: bool) -> Function:
    """Eager as the public models run it in eval mode: the bias was gathered beforehand."""
    bias = _cached_bias(inputs)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (logits if bias is None else logits + bias).softmax(-1) @ v

    return attention


def prepare_sdpa(inputs: Inputs, training: bool) -> Function:
    # Inference may gather the mask once; training has to send a gradient through the gather.
    gather, cached = _gather(inputs), None if training else _cached_bias(inputs)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None = None) -> Tensor:
        bias = gather(bias_table) if cached is None else cached
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[None])

    return attention


def prepare_flex(inputs: Inputs, training: bool) -> Function:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Unavailable(f"flex_attention: {error}") from error
    if "return_lse" in inputs.options:
        raise Unavailable("returns no lse")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if "bias_table" not in inputs.tensors:
        return compiled
    index = relative_index(inputs.options["window"], inputs.options["bias_index"], inputs.grad_out.device)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, n: Tensor, m: Tensor) -> Tensor:
            return score + bias_table[h, index[n, m]]

        return compiled(q, k, v, score_mod=score_mod)

    return attention


def peers(device: torch.device) -> Sequence[Provider]:
    found = [Provider("eager-cached", prepare_cached_bias, modes=("fwd",)), Provider("sdpa", prepare_sdpa)]
    if device.type == "cuda":
        found.append(Provider("flex", prepare_flex))
    return found


def cost(problem: WindowProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    stage, tokens = problem.stage, problem.tokens
    rows = batch * stage.windows * stage.heads * tokens
    d, dv, size = stage.head_dim, stage.value_dim, dtype.itemsize
    flops = 2.0 * rows * tokens * (d + dv)
    table = stage.heads * problem.entries * size
    moved = rows * (2 * d + 2 * dv) * size + table
    exps = float(rows * tokens)
    if mode == "fwd":
        return Cost(flops, moved, exps)
    # Forward also writes lse. Backward reads q, k, v, out, grad_out, lse; writes dq, dk, dv.
    lse = rows * max(4, size // 2)
    backward = rows * (4 * d + 4 * dv) * size + 2 * table
    return Cost(3 * flops, moved + backward + 2 * lse, exps)


def reduced(problem: WindowProblem, batch: int) -> dict[str, int]:
    stage = problem.stage
    return {"bias_table": table_terms(batch * stage.windows, stage.window, stage.bias)}


CASE = Case(
    operator="window_attention",
    presets={
        name: tuple(WindowProblem(f"stage {i}", stage) for i, stage in enumerate(stages, 1))
        for name, stages in WINDOW_MODELS.items()
    },
    default_preset="efficientvit_m5",
    shape_help="windows=4,window=7x7,heads=1,d=16,dv=64,bias=absolute|signed|none,layout=packed|map,lse=0|1",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "3x5": "windows=3,window=3x5,heads=2,d=16,dv=16",
        "4x4": "windows=5,window=4x4,heads=1,d=16,dv=48,layout=map",
        "4x4-lse": "windows=5,window=4x4,heads=2,d=16,dv=112,bias=signed,lse=1",
        "7x7": "windows=4,window=7x7,heads=1,d=16,dv=64,layout=map",
        "7x7-lse": "windows=2,window=7x7,heads=3,d=32,dv=32,bias=signed,lse=1",
        "7x7-no_bias": "windows=2,window=7x7,heads=2,d=16,dv=32,bias=none,lse=1",
        "7x5": "windows=3,window=7x5,heads=2,d=24,dv=80,bias=signed",
        "8x8": "windows=2,window=8x8,heads=2,d=32,dv=112",
        # Several tiles: the gradients of queries, keys and, where the tensors are wide, values have passes
        # of their own.
        "12x12": "windows=1,window=12x12,heads=2,d=32,dv=32,bias=signed",
        "12x12-lse": "windows=1,window=12x12,heads=1,d=16,dv=64,layout=map,lse=1",
        "12x12-wide": "windows=1,window=12x12,heads=2,d=24,dv=112",
        "12x12-no_bias": "windows=1,window=12x12,heads=1,d=32,dv=96,bias=none",
        # More windows than work items: a group walks over a chunk of the batch.
        "4x4-many": "windows=1500,window=4x4,heads=1,d=16,dv=48,layout=map,lse=1",
        "7x7-many": "windows=1000,window=7x7,heads=1,d=16,dv=32,layout=map",
        "12x12-many": "windows=300,window=12x12,heads=1,d=16,dv=16,bias=signed",
    },
    reduced=reduced,
)
