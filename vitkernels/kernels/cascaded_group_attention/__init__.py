"""Cascaded group attention: the whole token mixer of EfficientViT on affine (folded or frozen) weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import (
    autocast,
    check_device,
    check_dtype,
    check_positive_ints,
    check_scale,
    check_tensor,
    fail,
)
from vitkernels.core.operator import Operator
from vitkernels.kernels.cascaded_group_attention import reference

_ONE_DTYPE = "Cast x, the weights and their biases to one dtype, or run under torch.autocast."
_MAX_HEADS = 16  # kMaxHeads of csrc/cascaded_group_attention


def cascaded_group_attention(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor,
    attn_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *,
    window_size: int | tuple[int, int],
    kernel_sizes: Sequence[int],
    scale: float | None = None,
    residual: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """EfficientViT's token mixer in one call: h heads in sequence, each fed with its share of the channels plus the
    output of the head before it, then ReLU and a projection.

    The map is split into windows of Wh x Ww tokens, zero-padded right and bottom; padded positions are tokens like
    any other. With X_i the i-th of h equal shares of a window's channels, k the key dimension and d = C / h::

        U_0 = X_0;  U_i = O_(i-1) + X_i
        q~, K, V = split(qkv_weight[i] U_i + qkv_bias[i], [k, k, d])      1x1 convolution
        Q = depthwise(q~, dw_weight[i]) + dw_bias[i]                      zero-padded inside the window
        P = softmax(scale * Q^T K + attn_bias[i, |dy| * Ww + |dx|])       over the keys
        O_i = V P^T
        out = proj_weight relu(concat(O_0 .. O_(h-1))) + proj_bias        (+ x with residual)

    Windows are cut, padded and cropped by address arithmetic. Accumulation and softmax are in float32 (float64 for
    float64 inputs). Deterministic, forward and backward. Under autocast x and the weights are cast as a
    convolution's; attn_bias is left as it is.

    Args:
        x: [B, C, H, W], NCHW or channels-last (other strides work, slower); float16, bfloat16, float32 or float64.
        qkv_weight: [h, 2 k + d, d]; output channels in the order q, k, v.
        qkv_bias: [h, 2 k + d].
        dw_weight: [h, k, kmax, kmax], kmax odd. A head with a smaller kernel has it in the middle; the taps around
            it are ignored and get a zero gradient.
        dw_bias: [h, k].
        attn_bias: [h, Wh * Ww], learned biases by offset between query and key; in x's dtype or float32.
        proj_weight: [C, C].
        proj_bias: [C]. The six weights and biases share one dtype: x's, or float32.
        window_size: (Wh, Ww), or one int for square windows.
        kernel_sizes: side of each head's depthwise kernel: h odd ints up to kmax.
        scale: factor on the dot products. Default: ``k ** -0.5``.
        residual: add x to the result.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        [B, C, H, W] in x's dtype and memory format (the reference promises no format).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, window, kernel size or backend name; a forced backend that cannot run the
            call.

    Paper: EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (Liu et al., CVPR 2023).

    Example:
        >>> h, k, d = 4, 16, 16
        >>> x = torch.randn(2, h * d, 14, 14)
        >>> weights = [torch.randn(shape) for shape in ((h, 2 * k + d, d), (h, 2 * k + d), (h, k, 5, 5), (h, k))]
        >>> weights += [torch.randn(shape) for shape in ((h, 49), (h * d, h * d), (h * d,))]
        >>> cascaded_group_attention(x, *weights, window_size=7, kernel_sizes=(5, 5, 5, 5)).shape
        torch.Size([2, 64, 14, 14])
    """
    if type(kernel_sizes) is list:
        kernel_sizes = tuple(kernel_sizes)
    tensors = (x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias)
    return operator(tensors, (window_size, kernel_sizes, scale, residual), backend, False)[0]


def _check(
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    dw_weight: Any,
    dw_bias: Any,
    attn_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    window_size: Any,
    kernel_sizes: Any,
    scale: Any,
    residual: Any,
) -> tuple[Any, ...]:
    window_h, window_w = check_positive_ints("window_size", window_size, 2)
    check_tensor("x", x, (None, None, None, None), "[B, C, H, W]")
    check_tensor("dw_weight", dw_weight, (None, None, None, None), "[heads, k, kmax, kmax]")
    channels = x.shape[1]
    heads, key_dim, largest, _ = dw_weight.shape
    if largest % 2 == 0 or dw_weight.shape[3] != largest:
        fail("dw_weight", "shape [heads, k, kmax, kmax] with an odd kmax", dw_weight)
    if heads == 0 or key_dim == 0:
        fail("dw_weight", "at least one head and one channel", dw_weight)
    if channels == 0 or channels % heads:
        fail("x", f"channels in a positive multiple of the {heads} heads of dw_weight", x)
    value_dim = channels // heads
    rows = 2 * key_dim + value_dim
    named = {
        "qkv_weight": (qkv_weight, (heads, rows, value_dim), "[heads, 2 * k + C / heads, C / heads]"),
        "qkv_bias": (qkv_bias, (heads, rows), "[heads, 2 * k + C / heads]"),
        "dw_bias": (dw_bias, (heads, key_dim), "[heads, k]"),
        "attn_bias": (attn_bias, (heads, window_h * window_w), "[heads, Wh * Ww]"),
        "proj_weight": (proj_weight, (channels, channels), "[C, C]"),
        "proj_bias": (proj_bias, (channels,), "[C]"),
    }
    for name, (tensor, shape, layout) in named.items():
        check_tensor(name, tensor, shape, layout)
        check_device(name, tensor, x.device, "x")
    check_device("dw_weight", dw_weight, x.device, "x")
    kernel_sizes = check_positive_ints("kernel_sizes", _sequence(kernel_sizes), heads)
    for size in kernel_sizes:
        if size % 2 == 0 or size > largest:
            fail("kernel_sizes", f"odd ints up to the {largest} of dw_weight", kernel_sizes)
    scale = check_scale(scale, key_dim**-0.5)
    if not isinstance(residual, bool):
        fail("residual", "True or False", residual, kind=TypeError)

    x, qkv_weight, qkv_bias, dw_weight, dw_bias, proj_weight, proj_bias = autocast(
        x, qkv_weight, qkv_bias, dw_weight, dw_bias, proj_weight, proj_bias
    )
    check_dtype("x", x, FLOAT_DTYPES, _ONE_DTYPE)
    allowed = (x.dtype,) if x.dtype is torch.float64 else (x.dtype, torch.float32)
    check_dtype("qkv_weight", qkv_weight, allowed, _ONE_DTYPE)
    weights = {"qkv_bias": qkv_bias, "dw_weight": dw_weight, "dw_bias": dw_bias}
    for name, tensor in {**weights, "proj_weight": proj_weight, "proj_bias": proj_bias}.items():
        check_dtype(name, tensor, (qkv_weight.dtype,), _ONE_DTYPE)
    check_dtype("attn_bias", attn_bias, allowed, "Cast it with attn_bias.to(x.dtype).")
    tensors = (x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias)
    return *tensors, window_h, window_w, list(kernel_sizes), scale, residual


def _sequence(kernel_sizes: Any) -> Any:
    """As a tuple, but an int as it is, so that it does not stand for all heads."""
    return (kernel_sizes,) if isinstance(kernel_sizes, int) else kernel_sizes


def _allocate_heads(x: torch.Tensor, *inputs: Any) -> torch.Tensor:
    window_h, window_w = inputs[7:9]
    batch, channels, height, width = x.shape
    windows = batch * (-(-height // window_h)) * (-(-width // window_w))
    return x.new_empty((windows, window_h * window_w, channels))


def _flops(
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    dw_weight: Any,
    dw_bias: Any,
    attn_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    window_h: int,
    window_w: int,
    kernel_sizes: Sequence[int],
    *params: Any,
    mask: list[bool] | None,
) -> int:
    """2 x MACs of the four products of every head and of the projection, or of their wanted gradients.

    The weight gradient of the depthwise convolution counts as PyTorch counts it, as if every output channel met
    every input channel.
    """
    batch, channels, height, width = x
    heads, rows, value_dim = qkv_weight
    key_dim, tokens = dw_weight[1], window_h * window_w
    positions = batch * (-(-height // window_h)) * (-(-width // window_w)) * tokens
    qkv = 2 * positions * rows * value_dim
    depthwise = [2 * positions * key_dim * size * size for size in kernel_sizes]
    qk, pv = (2 * positions * tokens * width for width in (key_dim, value_dim))
    proj = 2 * positions * channels * channels
    if mask is None:
        return heads * (qkv + qk + pv) + sum(depthwise) + proj
    grad_x, grad_qkv, grad_qkv_bias, grad_dw, grad_dw_bias, grad_table, grad_proj, _ = mask
    inner = grad_x or grad_qkv or grad_qkv_bias or grad_dw or grad_dw_bias or grad_table
    total = proj * (grad_proj + inner)
    if inner:
        total += heads * (2 * pv + 2 * qk) + sum(depthwise) + heads * qkv * grad_qkv
        total += sum(depthwise) * key_dim * grad_dw + qkv * (heads - 1 + grad_x)
    return total


def _cuda_limits(*inputs: Any) -> list[str]:
    reasons, x, (window_h, window_w) = _common_limits(*inputs), inputs[0], inputs[8:10]
    tokens, (rows, value_dim) = window_h * window_w, inputs[1].shape[1:]
    # What the plain backward keeps of a window: two of each of C, d, 2 k + d, k and N values a token.
    kept = 2 * tokens * (x.shape[1] + value_dim + rows + inputs[3].shape[1] + tokens + 5)
    size = kept * (8 if x.dtype is torch.float64 else 4)
    if size >= 2**31:
        reasons.append(f"takes windows whose intermediate results stay below 2 GB, got {size >> 20} MB")
    return reasons


def _triton_limits(*inputs: Any) -> list[str]:
    (heads, key_dim, largest, _), (window_h, window_w) = inputs[3].shape, inputs[8:10]
    reasons, value_dim = _common_limits(*inputs), inputs[0].shape[1] // heads
    if window_h * window_w > 64:  # a tile holds a window; beyond, its logits would spill
        reasons.append(f"takes windows of up to 64 tokens, got {window_h * window_w}")
    if value_dim > 128 or key_dim > 32:
        reasons.append(f"takes k up to 32 and C / heads up to 128, got {key_dim} and {value_dim}")
    if largest > 15:  # sizes are packed in four bits a head
        reasons.append(f"takes depthwise kernels of up to 15 x 15, got {largest}")
    return reasons


def _common_limits(*inputs: Any) -> list[str]:
    heads = inputs[3].shape[0]
    return [f"takes up to {_MAX_HEADS} heads, got {heads}"] if heads > _MAX_HEADS else []


_NATIVE = "vitkernels.kernels.cascaded_group_attention.native"

operator = Operator(
    "cascaded_group_attention",
    tensors=(
        "x",
        "qkv_weight",
        "qkv_bias",
        "dw_weight",
        "dw_bias",
        "attn_bias",
        "proj_weight",
        "proj_bias",
    ),
    params="int window_h, int window_w, int[] kernel_sizes, float scale, bool residual",
    outputs=("out", "heads"),
    check=_check,
    allocate=("x", _allocate_heads),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_cuda_limits, skips_by_products=True),
        Backend(
            "triton",
            "vitkernels.kernels.cascaded_group_attention.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
        ),
        Backend("cpu", _NATIVE, limits=_common_limits, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
