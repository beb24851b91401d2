"""Residual depthwise convolution and residual FFN at every position of a map, in one call."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.residual_ffn import reference

_ONE_DTYPE = "Cast x, weight1 and weight2 to one dtype, or run under torch.autocast."


def residual_ffn(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    scale1: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    dw_weight: torch.Tensor | None = None,
    dw_bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The residual units around a token mixer: a 3x3 depthwise convolution, then a two-layer perceptron::

        u = x + depthwise3x3(x, dw_weight) + dw_bias        zero-padded; u = x without dw_weight
        h = relu(scale1 * (weight1 u) + bias1)              at every position
        out = u + scale2 * (weight2 h) + bias2

    A batch norm in eval mode behind a weight is its scale and bias, so a network's own weights go in as they are:
    the kernels read them in place and keep nothing. Accumulates in float32 (float64 for float64 inputs).
    Deterministic. Under autocast x and the two weights are cast, the vectors and the depthwise convolution are left as
    they are.

    CPU and CUDA have kernels for the forward; the backward is composed of PyTorch's matrix products. On CUDA half
    precision whose C and hidden are multiples of 16 takes tensor cores: one launch, or for few tokens and large weights
    two with the hidden layer between them in memory; on Hopper, from 64 channels and 65,536 elements of x on, three
    with u and the hidden layer. Everything else takes three launches of a plain kernel.
    With backward it was slower than PyTorch's convolutions on an H200: for inference.

    Args:
        x: [B, C, H, W], NCHW or channels-last (the CPU copies other strides); float16, bfloat16, float32 or float64.
        weight1: [hidden, C], or [hidden, C, 1, 1] as a pointwise convolution has it; in x's dtype.
        bias1: [hidden].
        weight2: [C, hidden] or [C, hidden, 1, 1]; in x's dtype.
        bias2: [C].
        scale1: [hidden], or None for ones.
        scale2: [C], or None for ones.
        dw_weight: [C, 3, 3], or None for no depthwise convolution.
        dw_bias: [C], with dw_weight. The vectors and dw_weight share one dtype: x's, or float32.
        backend: "cuda", "cpu", "reference" or "auto". Default: the choice of the enclosing ``vitkernels.backend``
            scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        [B, C, H, W] in x's dtype and memory format.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; dw_weight or dw_bias alone; a forced backend that cannot run
            the call.

    Paper: EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (Liu et al., CVPR 2023).

    Example:
        >>> x = torch.randn(2, 64, 14, 14)
        >>> out = residual_ffn(x, torch.randn(128, 64), torch.zeros(128), torch.randn(64, 128), torch.zeros(64))
        >>> out.shape
        torch.Size([2, 64, 14, 14])
    """
    tensors = (x, weight1, bias1, weight2, bias2, scale1, scale2, dw_weight, dw_bias)
    return operator(tensors, (), backend)[0]


def _check(
    x: Any,
    weight1: Any,
    bias1: Any,
    weight2: Any,
    bias2: Any,
    scale1: Any,
    scale2: Any,
    dw_weight: Any,
    dw_bias: Any,
) -> tuple[Any, ...]:
    check_tensor("x", x, (None, None, None, None), "[B, C, H, W]")
    channels = x.shape[1]
    _check_matrix("weight1", weight1, (None, channels), "[hidden, C]")
    hidden = weight1.shape[0]
    if channels == 0 or hidden == 0:
        fail("weight1", "at least one hidden unit and one channel", weight1)
    _check_matrix("weight2", weight2, (channels, hidden), "[C, hidden]")
    if (dw_weight is None) != (dw_bias is None):
        name = "dw_weight" if dw_weight is None else "dw_bias"
        fail(name, "a tensor, as the other of dw_weight and dw_bias", None, "Pass both or neither.")
    vectors = {
        "bias1": (bias1, (hidden,), "[hidden]"),
        "bias2": (bias2, (channels,), "[C]"),
        "scale1": (scale1, (hidden,), "[hidden]"),
        "scale2": (scale2, (channels,), "[C]"),
        "dw_weight": (dw_weight, (channels, 3, 3), "[C, 3, 3]"),
        "dw_bias": (dw_bias, (channels,), "[C]"),
    }
    for name, (tensor, shape, layout) in vectors.items():
        if tensor is not None or name.startswith("bias"):
            check_tensor(name, tensor, shape, layout)
            check_device(name, tensor, x.device, "x")
    check_device("weight1", weight1, x.device, "x")
    check_device("weight2", weight2, x.device, "x")

    x, weight1, weight2 = autocast(x, weight1, weight2)
    check_dtype("x", x, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("weight1", weight1, (x.dtype,), _ONE_DTYPE)
    check_dtype("weight2", weight2, (x.dtype,), _ONE_DTYPE)
    check_dtype("bias1", bias1, (x.dtype,) if x.dtype is torch.float64 else (x.dtype, torch.float32))
    for name, (tensor, _, _) in vectors.items():
        if tensor is not None:
            check_dtype(name, tensor, (bias1.dtype,), "Cast the vectors and dw_weight to one dtype.")
    return x, weight1, bias1, weight2, bias2, scale1, scale2, dw_weight, dw_bias


def _check_matrix(name: str, value: Any, shape: tuple[int | None, int], layout: str) -> None:
    pointwise = isinstance(value, torch.Tensor) and value.ndim == 4
    check_tensor(
        name, value, (*shape, 1, 1) if pointwise else shape, layout[:-1] + ", 1, 1]" if pointwise else layout
    )


def _flops(x: Any, weight1: Any, *rest: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the two products and of the depthwise convolution, or of their wanted gradients."""
    batch, channels, height, width = x
    positions = batch * height * width
    product, depthwise = 2 * positions * channels * weight1[0], 2 * positions * channels * 9
    with_dw = rest[5] is not None
    if mask is None:
        return 2 * product + with_dw * depthwise
    grad_x, grad_w1, grad_b1, grad_w2, _, grad_s1, _, grad_dw, grad_dw_bias = mask
    first = grad_x or grad_dw or grad_dw_bias
    inner = first or grad_w1 or grad_b1 or grad_s1
    total = product * (inner + first + grad_w1 + grad_w2)
    return total + with_dw * depthwise * (grad_x + grad_dw * channels)


def _cuda_limits(x: torch.Tensor, *rest: Any) -> list[str]:
    batch, _, height, width = x.shape
    positions = batch * height * width
    return [f"takes fewer than 2^31 positions, got {positions}"] if positions >= 2**31 else []


_NATIVE = "vitkernels.kernels.residual_ffn.native"

operator = Operator(
    "residual_ffn",
    tensors=("x", "weight1", "bias1", "weight2", "bias2", "scale1?", "scale2?", "dw_weight?", "dw_bias?"),
    params="",
    outputs=("out",),
    check=_check,
    allocate=("x",),
    reference=reference.forward,
    backends=(Backend("cuda", _NATIVE, limits=_cuda_limits), Backend("cpu", _NATIVE)),
    order={"cuda": ("cuda",), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
