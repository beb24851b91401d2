"""Convolutions on the CPU with weights packed once, for inference in fp32.

PyTorch repacks a convolution's weight on every call, and sends pointwise convolutions of one image to a
general matrix product that reaches half the speed of oneDNN's kernels on AVX-512 machines. The operators used
here are the ones that Inductor freezes models with; where a PyTorch lacks them, nothing is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_convolve: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_reorder: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)

# The activations that oneDNN computes together with a convolution, by its names for them.
ACTIVATIONS = {nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}

# Below this many multiply-adds a dense convolution costs less than oneDNN's call does.
_LEAST_WORK = 1_000_000


def can_pack(conv: nn.Conv2d, weight: torch.Tensor) -> bool:
    """Whether pack() takes a convolution with this (folded) weight."""
    return bool(
        weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and _convolve is not None
        and _reorder is not None
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def pays(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether the packed convolution is the faster one for this input."""
    if conv.groups > 1:
        return True
    stride = conv.stride[0] * conv.stride[1]
    return x.numel() // stride * conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels >= _LEAST_WORK


def pack(conv: nn.Conv2d, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's own layout, chosen for inputs like x (it takes others too, slower)."""
    return _reorder(weight.to_mkldnn(), conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape))


def convolve(
    conv: nn.Conv2d, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, act: Any = None
) -> torch.Tensor:
    """The convolution of a channels-last map with a packed weight, then one of ACTIVATIONS. Not differentiable."""
    after = "none" if act is None else ACTIVATIONS[type(act)]
    kind = act.approximate if after == "gelu" else ""
    return _convolve(x, packed, bias, conv.padding, conv.stride, conv.dilation, conv.groups, after, [], kind)
