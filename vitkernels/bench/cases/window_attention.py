"""``ops.window_attention`` against plain PyTorch, SDPA and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, Unavailable, parse_fields
from vitkernels.bench.presets import WINDOW_MODELS, WindowStage


@dataclass(frozen=True)
class WindowProblem:
    label: str
    stage: WindowStage

    @property
    def tokens(self) -> int:
        return self.stage.window[0] * self.stage.window[1]

    @property
    def entries(self) -> int:
        height, width = self.stage.window
        return (2 * height - 1) * (2 * width - 1) if self.stage.bias == "signed" else height * width

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
}


def parse_shape(text: str) -> WindowProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS)
    for key, choices in (("bias", ("absolute", "signed")), ("layout", ("map", "packed"))):
        if fields[key] not in choices:
            raise ValueError(f"shape: expected {key} in {', '.join(choices)}; got {fields[key]!r}")
    d = fields["d"]
    size = (fields["windows"], fields["window"], fields["heads"], d, fields["dv"] or d)
    return WindowProblem("shape", WindowStage(*size, fields["bias"], fields["layout"]))


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
    tensors = {"q": q, "k": k, "v": v, "bias_table": random(heads, problem.entries)}
    return Inputs(tensors, {"bias_index": stage.bias, "window": stage.window}, grad_out)


@functools.lru_cache(maxsize=64)
def relative_index(window: tuple[int, int], bias_index: str, device: torch.device) -> Tensor:
    """[N, N] positions in the bias table, as the public models keep them in a buffer."""
    height, width = window
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    dy, dx = y[:, None] - y, x[:, None] - x
    if bias_index == "signed":
        return (dy + height - 1) * (2 * width - 1) + dx + width - 1
    return dy.abs() * width + dx.abs()


def eager(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, *, bias_index: str, window: tuple[int, int]
) -> Tensor:
    bias = bias_table[:, relative_index(window, bias_index, q.device)]
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v


def _bias(inputs: Inputs) -> Tensor:
    table = inputs.tensors["bias_table"]
    index = relative_index(inputs.options["window"], inputs.options["bias_index"], table.device)
    return table[:, index].contiguous()


def prepare_cached_bias(inputs: Inputs, training: bool) -> Function:
    """Eager as the public models run it in eval mode: the bias was gathered beforehand."""
    bias = _bias(inputs)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v

    return attention


def prepare_sdpa(inputs: Inputs, training: bool) -> Function:
    index = relative_index(inputs.options["window"], inputs.options["bias_index"], inputs.grad_out.device)
    # Inference may gather the mask once; training has to send a gradient through the gather.
    cached = None if training else _bias(inputs)[None]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor) -> Tensor:
        mask = bias_table[:, index][None] if cached is None else cached
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attention


def prepare_flex(inputs: Inputs, training: bool) -> Function:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Unavailable(f"flex_attention: {error}") from error
    index = relative_index(inputs.options["window"], inputs.options["bias_index"], inputs.grad_out.device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

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
    pairs = batch * problem.stage.windows * problem.tokens**2
    return {"bias_table": max(1, pairs // problem.entries)}


CASE = Case(
    operator="window_attention",
    presets={
        name: tuple(WindowProblem(f"stage {i}", stage) for i, stage in enumerate(stages, 1))
        for name, stages in WINDOW_MODELS.items()
    },
    default_preset="efficientvit_m5",
    shape_help="windows=4,window=7x7,heads=1,d=16,dv=64,bias=absolute|signed,layout=packed|map",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes=(
        "windows=3,window=3x5,heads=2,d=16,dv=16",
        "windows=5,window=4x4,heads=1,d=16,dv=48,layout=map",
        "windows=4,window=7x7,heads=1,d=16,dv=64,layout=map",
        "windows=2,window=7x7,heads=3,d=32,dv=32,bias=signed",
        "windows=3,window=7x5,heads=2,d=24,dv=80,bias=signed",
        "windows=2,window=8x8,heads=2,d=32,dv=112",
        "windows=1,window=12x12,heads=2,d=32,dv=32,bias=signed",
    ),
    reduced=reduced,
)
