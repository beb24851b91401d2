"""Launches the Triton kernels of cascaded group attention: how many programs, and the order of the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.cascaded_group_attention.triton_backward import backward_head, backward_projection
from vitkernels.kernels.cascaded_group_attention.triton_forward import forward_heads, forward_projection
from vitkernels.kernels.cascaded_group_attention.triton_gradients import (
    depthwise_weight_gradient,
    projection_weight_gradient,
    qkv_weight_gradient,
    reduce_partials,
    reduce_table,
)
from vitkernels.kernels.cascaded_group_attention.triton_shapes import (
    channels_innermost,
    packed_sizes,
    product_configuration,
    shape_of,
    slice_of,
    weight_configuration,
    window_configuration,
)

# Most memory for partials of the bias gradient, N x N for each program and head of the backward: more windows
# take several launches, which add to the same partials.
PARTIAL_BYTES = 64 << 20
# Programs of the sums over tokens, which each write a partial tile of a weight.
PRODUCT_PROGRAMS = 512


def split(blocks: int, tiles: int, programs: int) -> int:
    """Into how many interleaved chunks blocks of tokens are split, evenly, so that programs loop over the rest."""
    rounds = -(-blocks // max(1, programs // tiles))
    return -(-blocks // rounds)


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _scratch(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(
    out: Tensor,
    heads: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    attn_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window_h: int,
    window_w: int,
    kernel_sizes: Sequence[int],
    scale: float,
    residual: bool,
) -> None:
    """Fills out and heads."""
    shape = shape_of(x, qkv_weight, dw_weight, window_h, window_w, kernel_sizes)
    with device_of(x):
        _forward_heads(heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, scale, shape)
        nchw = not channels_innermost(out)
        config = product_configuration(shape.channels, shape.itemsize, nchw)
        pixels = shape.batch * shape.height * shape.width
        tiles = -(-pixels // config["BLOCK_M"]) * -(-shape.channels // config["BLOCK_N"])
        forward_projection[(tiles,)](
            out, heads, x, proj_weight, proj_bias, *out.stride(), *x.stride(), *proj_weight.stride(),
            *proj_bias.stride(), pixels, shape.rows, shape.columns, shape.height, shape.width,
            shape.channels, window_h, window_w, residual, **config, NCHW=nchw,
        )  # fmt: skip


def _forward_heads(heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, scale, shape):
    nchw = not channels_innermost(x)
    config = window_configuration(shape.tokens, shape.key_dim, shape.value_dim, shape.itemsize, nchw)
    # q~ lies where O of the same head will, if it fits there.
    if shape.key_dim <= shape.value_dim:
        queries, queries_h, queries_n = heads, shape.value_dim, shape.channels
    else:
        queries = _scratch(x, x.dtype, shape.windows * shape.tokens, shape.key_dim)
        queries_h, queries_n = 0, shape.key_dim
    forward_heads[(-(-shape.windows // config["PACK"]),)](
        heads, queries, x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, queries_h, queries_n,
        *x.stride(), *qkv_weight.stride(), *qkv_bias.stride(), *dw_weight.stride(), *dw_bias.stride(),
        *attn_bias.stride(), shape.windows, shape.rows, shape.columns, shape.height, shape.width, scale,
        shape.heads, packed_sizes(shape.kernel_sizes), shape.kernel_max, shape.key_dim, shape.value_dim,
        shape.window_h, shape.window_w, **config, STAGES=2, NCHW=nchw,
    )  # fmt: skip


def backward(
    grad_x: Tensor | None,
    grad_qkv_weight: Tensor | None,
    grad_qkv_bias: Tensor | None,
    grad_dw_weight: Tensor | None,
    grad_dw_bias: Tensor | None,
    grad_attn_bias: Tensor | None,
    grad_proj_weight: Tensor | None,
    grad_proj_bias: Tensor | None,
    grad_out: Tensor | None,
    grad_heads: Tensor | None,
    out: Tensor,
    heads: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    attn_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window_h: int,
    window_w: int,
    kernel_sizes: Sequence[int],
    scale: float,
    residual: bool,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero."""
    shape = shape_of(x, qkv_weight, dw_weight, window_h, window_w, kernel_sizes)
    heads = heads.contiguous()
    of_projection, of_qkv = (grad_proj_weight, grad_proj_bias), (grad_qkv_weight, grad_qkv_bias)
    of_depthwise = (grad_dw_weight, grad_dw_bias)
    inner = (grad_x, *of_qkv, *of_depthwise, grad_attn_bias)
    if grad_out is None:
        _zero(of_projection)
        if grad_heads is None:
            _zero(inner)
            return
    with device_of(x):
        if grad_out is not None and _wanted(of_projection):
            _projection_weight(of_projection, grad_out, heads, shape)
        if not _wanted(inner):
            return
        grads = _backward_projection(x, grad_out, grad_heads, heads, proj_weight, shape)
        saved = _backward_heads(
            grad_x, grad_attn_bias, grads, grad_out if residual else None, heads, x, qkv_weight, qkv_bias,
            dw_weight, dw_bias, attn_bias, scale, shape,
        )  # fmt: skip
        if _wanted(of_qkv):
            _qkv_weight(of_qkv, saved, heads, x, shape)
        if _wanted(of_depthwise):
            _depthwise_weight(of_depthwise, saved, shape)


def _zero(grads: Sequence[Tensor | None]) -> None:
    for grad in grads:
        if grad is not None:
            grad.zero_()


def _wanted(grads: Sequence[Tensor | None]) -> bool:
    return any(grad is not None for grad in grads)


def _backward_projection(x, grad_out, grad_heads, heads, weight, shape):
    """Gradient of heads, [windows, tokens, C] in x's dtype."""
    grads = _scratch(x, x.dtype, *heads.shape)
    nchw = grad_out is not None and not channels_innermost(grad_out)
    config = product_configuration(shape.channels, shape.itemsize, nchw)
    tokens = shape.windows * shape.tokens
    tiles = -(-tokens // config["BLOCK_M"]) * -(-shape.channels // config["BLOCK_N"])
    backward_projection[(tiles,)](
        grads, grad_out, grad_heads, heads, weight, *_strides(grad_out, 4), *_strides(grad_heads, 3),
        *weight.stride(), tokens, shape.rows, shape.columns, shape.height, shape.width, shape.channels,
        shape.window_h, shape.window_w, **config, NCHW=nchw,
    )  # fmt: skip
    return grads


def _backward_heads(
    grad_x, grad_table, grads, grad_out, heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias, table, scale,
    shape,
):  # fmt: skip
    """Fills the gradients of x and of the tables, and returns what the weight gradients need."""
    nchw = not channels_innermost(x)
    config = window_configuration(shape.tokens, shape.key_dim, shape.value_dim, shape.itemsize, nchw)
    groups = -(-shape.windows // config["PACK"])
    outputs = 2 * shape.key_dim + shape.value_dim
    saved = _scratch(x, x.dtype, shape.heads, shape.windows * shape.tokens, outputs + 2 * shape.key_dim)
    programs, partials = groups, None
    if grad_table is not None:
        programs = min(groups, max(1, PARTIAL_BYTES // (4 * shape.heads * shape.tokens**2)))
        partials = _scratch(x, torch.float32, programs, shape.heads, shape.tokens, shape.tokens)
    for head in range(shape.heads - 1, -1, -1):
        for first_group in range(0, groups, programs):
            backward_head[(min(programs, groups - first_group),)](
                grad_x, grads, saved, partials, grad_out, heads, x, qkv_weight, qkv_bias, dw_weight, dw_bias,
                table, *_strides(grad_x, 4), *_strides(grad_out, 4), *x.stride(), *qkv_weight.stride(),
                *qkv_bias.stride(), *dw_weight.stride(), *dw_bias.stride(), *table.stride(), shape.windows,
                first_group, shape.rows, shape.columns, shape.height, shape.width, head,
                shape.kernel_sizes[head], scale, shape.heads, shape.kernel_max, shape.key_dim,
                shape.value_dim, shape.window_h, shape.window_w, **config, SLICE_Y=slice_of(outputs, 32),
                STAGES=2, NCHW=nchw, GRAD_NCHW=grad_out is not None and not channels_innermost(grad_out),
            )  # fmt: skip
    if partials is not None:
        sums = _scratch(x, torch.float32, *partials.shape[1:])
        _reduce((sums,), (partials,))
        reduce_table[(shape.heads * shape.window_h,)](
            grad_table, sums, *grad_table.stride(), shape.window_h, shape.window_w,
            BLOCK_X=triton.next_power_of_2(shape.window_w), BLOCK_T=padded(shape.tokens), num_warps=4,
        )  # fmt: skip
    return saved


def _projection_weight(targets, grad_out, heads, shape):
    nchw = not channels_innermost(grad_out)
    config = weight_configuration(shape.channels, shape.channels, shape.itemsize, nchw)
    tiles = -(-shape.channels // config["BLOCK_M"]) * -(-shape.channels // config["BLOCK_N"])
    pixels = shape.batch * shape.height * shape.width
    chunks = split(-(-pixels // config["BLOCK_T"]), tiles, PRODUCT_PROGRAMS)
    partials = [
        _scratch(heads, torch.float32, chunks, *size) for size in ((shape.channels,) * 2, (shape.channels,))
    ]
    projection_weight_gradient[(chunks * tiles,)](
        *partials, grad_out, heads, *grad_out.stride(), pixels, chunks, shape.rows, shape.columns,
        shape.height, shape.width, shape.channels, shape.window_h, shape.window_w, **config,
        NCHW=nchw,
    )  # fmt: skip
    _reduce(targets, partials)


def _qkv_weight(targets, saved, heads, x, shape):
    outputs = 2 * shape.key_dim + shape.value_dim
    config = weight_configuration(outputs, shape.value_dim, shape.itemsize)
    tiles = shape.heads * -(-outputs // config["BLOCK_M"]) * -(-shape.value_dim // config["BLOCK_N"])
    chunks = split(-(-shape.windows * shape.tokens // config["BLOCK_T"]), tiles, PRODUCT_PROGRAMS)
    partials = [
        _scratch(x, torch.float32, chunks, shape.heads, *size)
        for size in ((outputs, shape.value_dim), (outputs,))
    ]
    qkv_weight_gradient[(chunks * tiles,)](
        *partials, saved, heads, x, *x.stride(), shape.windows, chunks, shape.rows, shape.columns,
        shape.height, shape.width, shape.heads, shape.key_dim, shape.value_dim, shape.window_h,
        shape.window_w, **config, NCHW=not channels_innermost(x),
    )  # fmt: skip
    _reduce(targets, partials)


def _depthwise_weight(targets, saved, shape):
    block_t, tiles = 32, shape.heads * shape.kernel_max
    chunks = split(-(-shape.windows * shape.tokens // block_t), tiles, PRODUCT_PROGRAMS)
    partials = [
        _scratch(saved, torch.float32, chunks, shape.heads, shape.key_dim, *size)
        for size in ((shape.kernel_max,) * 2, ())
    ]
    depthwise_weight_gradient[(chunks * tiles,)](
        *partials, saved, shape.windows, chunks, shape.heads, packed_sizes(shape.kernel_sizes),
        shape.kernel_max, shape.key_dim, shape.value_dim, shape.window_h, shape.window_w,
        BLOCK_K=padded(shape.key_dim), BLOCK_X=triton.next_power_of_2(shape.kernel_max), BLOCK_T=block_t,
        num_warps=4,
    )  # fmt: skip
    _reduce(targets, partials)


def _reduce(targets, partials):
    """Adds up partials [chunks, ...] into each gradient that is wanted."""
    for grad, partial in zip(targets, partials, strict=True):
        if grad is not None:
            block = 1024 if grad.numel() >= 32768 else 256
            leading = 4 - grad.ndim
            strides, sizes = (*(0,) * leading, *grad.stride()), (*(1,) * leading, *grad.shape)
            reduce_partials[(-(-grad.numel() // block),)](
                grad, partial, *strides, *sizes[1:], grad.numel(), partial.shape[0], BLOCK_C=4096 // block,
                BLOCK_E=block, num_warps=8,
            )  # fmt: skip


# (channels, heads, kernel sizes, window side, map side, channels-last) of EfficientViT mixers: the narrowest, one
# whose value channels take two tiles, and packed windows.
EXAMPLES = (
    (64, 4, (5, 5, 5, 5), 7, 14, False),
    (240, 3, (5, 5, 5), 7, 7, True),
    (224, 2, (7, 5), 4, 4, False),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for channels, heads, sizes, window, side, channels_last in EXAMPLES:
        value_dim, largest = channels // heads, max(sizes)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x, out = (torch.empty(2, channels, side, side, dtype=dtype, memory_format=layout) for _ in range(2))
        features = torch.empty(2 * (side // window) ** 2, window**2, channels, dtype=dtype)
        shapes = (
            (heads, 32 + value_dim, value_dim), (heads, 32 + value_dim), (heads, 16, largest, largest),
            (heads, 16), (heads, window**2), (channels, channels), (channels,),
        )  # fmt: skip
        weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
        inputs: tuple[Any, ...] = (x, *weights, window, window, sizes, 0.25, True)

        def call(out=out, features=features, inputs=inputs):
            forward(out, features, *inputs)
            arguments: list[Any] = [*inputs[:8], out, None, out, features, *inputs]
            backward(*arguments)

        yield f"C={channels} heads={heads} {window}x{window} {'nhwc' if channels_last else 'nchw'}", call
