"""``ops.cascaded_group_attention`` against the composition that the public models run, batch norm folded or live."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.case import Case, Cost, Function, Inputs, Provider, parse_fields
from vitkernels.bench.presets import MIXER_MODELS, MixerStage


@dataclass(frozen=True)
class MixerProblem:
    label: str
    stage: MixerStage
    layout: str = "nchw"  # or "nhwc"
    residual: bool = True

    @property
    def windows(self) -> int:
        """Per image, padded ones included."""
        side = self.stage.window
        return -(-self.stage.size[0] // side) * -(-self.stage.size[1] // side)

    def describe(self, batch: int) -> str:
        height, width = self.stage.size
        kernels = "".join(map(str, self.stage.kernel_sizes))
        return f"{batch}x{self.stage.channels}x{height}x{width} w{self.stage.window} k{kernels}"


SHAPE_DEFAULTS = {
    "map": (14, 14),
    "channels": 64,
    "window": 7,
    "kernels": "5555",
    "k": 16,
    "layout": "nchw",
    "residual": 1,
}


def parse_shape(text: str) -> MixerProblem:
    fields = parse_fields(text, SHAPE_DEFAULTS, or_zero=("residual",))
    for key, allowed in {"layout": ("nchw", "nhwc"), "residual": (0, 1)}.items():
        if fields[key] not in allowed:
            raise ValueError(f"shape: expected {key} in {', '.join(map(str, allowed))}; got {fields[key]!r}")
    kernels = fields["kernels"]
    if not kernels.isdigit() or any(int(size) % 2 == 0 for size in kernels):
        raise ValueError(f"shape: expected kernels, an odd digit a head; got {kernels!r}")
    if fields["channels"] % len(kernels):
        raise ValueError(
            f"shape: expected channels in a multiple of {len(kernels)}; got {fields['channels']}"
        )
    sizes = tuple(map(int, kernels))
    stage = MixerStage(fields["map"], fields["channels"], fields["window"], sizes, fields["k"])
    return MixerProblem("shape", stage, fields["layout"], bool(fields["residual"]))


def weight_shapes(stage: MixerStage) -> dict[str, tuple[int, ...]]:
    heads, k, d = stage.heads, stage.key_dim, stage.channels // stage.heads
    side, largest = stage.window, max(stage.kernel_sizes)
    return {
        "qkv_weight": (heads, 2 * k + d, d),
        "qkv_bias": (heads, 2 * k + d),
        "dw_weight": (heads, k, largest, largest),
        "dw_bias": (heads, k),
        "attn_bias": (heads, side * side),
        "proj_weight": (stage.channels, stage.channels),
        "proj_bias": (stage.channels,),
    }


def make_inputs(
    problem: MixerProblem,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    stage = problem.stage

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

    shape = (batch, stage.channels, *stage.size)
    form = torch.channels_last if problem.layout == "nhwc" else torch.contiguous_format
    tensors = {"x": random(*shape).to(memory_format=form)}
    for name, size in weight_shapes(stage).items():
        if name == "dw_weight":
            spread = 1 / size[-1]
        else:
            spread = size[-1] ** -0.5 if name in ("qkv_weight", "proj_weight") else 0.5
        tensors[name] = random(*size, spread=spread)
    options = {
        "window_size": stage.window,
        "kernel_sizes": stage.kernel_sizes,
        "residual": problem.residual,
    }
    return Inputs(tensors, options, random(*shape).to(memory_format=form))


def make_index(side: int, device: torch.device) -> Tensor:
    """[N, N] positions in the bias table, as the public models keep them in a buffer."""
    y = torch.arange(side, device=device).repeat_interleave(side)
    x = torch.arange(side, device=device).repeat(side)
    return (y[:, None] - y).abs() * side + (x[:, None] - x).abs()


relative_index = functools.lru_cache(maxsize=64)(make_index)


Convolution = Callable[..., Tensor]  # (x, weight, bias, **options)


def mixer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    convolution: Convolution,
    *,
    window_size: int,
    kernel_sizes: Sequence[int],
    residual: bool,
) -> Tensor:
    """The public models' forward; bias [heads, N, N]."""
    batch, channels, height, width = x.shape
    side, k, largest = window_size, dw_weight.shape[1], dw_weight.shape[2]
    whole = height == side and width == side
    rows, columns = -(-height // side), -(-width // side)
    y = x
    if not whole:
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, columns * side - width, 0, rows * side - height))
        y = y.view(batch, rows, side, columns, side, channels).transpose(2, 3)
        y = y.reshape(batch * rows * columns, side, side, channels).permute(0, 3, 1, 2)
    features: list[Tensor] = []
    for i, (chunk, size) in enumerate(zip(y.chunk(len(kernel_sizes), 1), kernel_sizes, strict=True)):
        u = features[-1] + chunk if features else chunk
        q, key, v = convolution(u, qkv_weight[i, :, :, None, None], qkv_bias[i]).split(
            [k, k, channels // len(kernel_sizes)], 1
        )
        dead = (largest - size) // 2
        taps = dw_weight[i, :, None, dead : dead + size, dead : dead + size]
        q = convolution(q, taps, dw_bias[i], padding=size // 2, groups=k)
        logits = (q.flatten(2).transpose(-2, -1) @ key.flatten(2)) * k**-0.5 + bias[i]
        out = v.flatten(2) @ logits.softmax(-1).transpose(-2, -1)
        features.append(out.unflatten(2, (side, side)))
    y = convolution(F.relu(torch.cat(features, 1)), proj_weight[:, :, None, None], proj_bias)
    if not whole:
        y = y.permute(0, 2, 3, 1).view(batch, rows, columns, side, side, channels).transpose(2, 3)
        y = y.reshape(batch, rows * side, columns * side, channels)[:, :height, :width].permute(0, 3, 1, 2)
    return x + y if residual else y


def live_norm(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """Convolution and a batch norm in eval mode that together equal the folded convolution."""
    count = bias.shape[0]
    mean, variance = x.new_zeros(count), x.new_full((count,), 1 - 1e-5)
    y = F.conv2d(x, weight, **options)
    return F.batch_norm(y, mean, variance, None, bias, training=False, eps=1e-5)


def eager(attn_bias: Tensor, window_size: int, **others: Any) -> Tensor:
    # Dynamo traces what is below a cache, and warns that it does.
    index_of = make_index if torch.compiler.is_compiling() else relative_index
    bias = attn_bias[:, index_of(window_size, attn_bias.device)]
    return mixer(**others, bias=bias, convolution=F.conv2d, window_size=window_size)


def _composition(convolution: Convolution) -> Callable[[Inputs, bool], Function]:
    def prepare(inputs: Inputs, training: bool) -> Function:
        index = relative_index(inputs.options["window_size"], inputs.grad_out.device)
        # In eval mode the public models keep the gathered bias.
        kept = None if training else inputs.tensors["attn_bias"][:, index]

        def run(attn_bias: Tensor, **others: Any) -> Tensor:
            bias = attn_bias[:, index] if kept is None else kept
            return mixer(**others, bias=bias, convolution=convolution, **inputs.options)

        return run

    return prepare


def peers(device: torch.device) -> Sequence[Provider]:
    return [
        Provider("eager-cached", _composition(F.conv2d), modes=("fwd",)),
        Provider("eager-bn", _composition(live_norm)),
    ]


def cost(problem: MixerProblem, batch: int, dtype: torch.dtype, mode: str) -> Cost:
    stage, size = problem.stage, dtype.itemsize
    k, d, tokens = stage.key_dim, stage.channels // stage.heads, stage.window**2
    positions = batch * problem.windows * tokens
    per_token = stage.heads * (2 * k + d) * d + stage.heads * (k + d) * tokens
    per_token += k * sum(side * side for side in stage.kernel_sizes) + stage.channels**2
    flops = 2.0 * positions * per_token
    table = [torch.Size(shape).numel() for shape in weight_shapes(stage).values()]
    image = batch * stage.channels * stage.size[0] * stage.size[1]
    moved = (2 * image + sum(table)) * size
    exps = float(positions * stage.heads * tokens)
    if mode == "fwd":
        return Cost(flops, moved, exps)
    # Forward also writes the heads. Backward reads x, heads, grad_out and the weights; writes a gradient of each
    # input.
    backward = (3 * image + positions * stage.channels + 2 * sum(table)) * size
    return Cost(3 * flops, moved + backward + positions * stage.channels * size, exps)


def reduced(problem: MixerProblem, batch: int) -> dict[str, int]:
    positions = batch * problem.windows * problem.stage.window**2
    names = [name for name in weight_shapes(problem.stage) if name != "attn_bias"]
    # A pair of tokens for each query and each of the table's entries.
    return {**dict.fromkeys(names, positions), "attn_bias": positions}


CASE = Case(
    operator="cascaded_group_attention",
    presets={
        name: tuple(MixerProblem(f"stage {i}", stage) for i, stage in enumerate(stages, 1))
        for name, stages in MIXER_MODELS.items()
    },
    default_preset="efficientvit_m5",
    shape_help="map=14x14,channels=64,window=7,kernels=7533 (one digit a head),k=16,layout=nchw|nhwc,residual=0|1",
    parse_shape=parse_shape,
    make_inputs=make_inputs,
    eager=eager,
    peers=peers,
    cost=cost,
    check_shapes={
        "14x14": "map=14x14,channels=64,window=7,kernels=5555",
        "14x14-nhwc": "map=14x14,channels=192,window=7,kernels=753,layout=nhwc",
        "7x7": "map=7x7,channels=288,window=7,kernels=753",
        "4x4": "map=4x4,channels=384,window=4,kernels=7533",
        "4x4-wide": "map=4x4,channels=224,window=4,kernels=75,residual=0",
        "15x22-padded": "map=15x22,channels=128,window=7,kernels=7533",
        "13x5-padded-nhwc": "map=13x5,channels=144,window=7,kernels=753,layout=nhwc",
        "24x24": "map=24x24,channels=64,window=12,kernels=53",
        "6x6-one_head": "map=6x6,channels=32,window=6,kernels=3",
        "1x1": "map=1x1,channels=64,window=1,kernels=33",
    },
    reduced=reduced,
)
