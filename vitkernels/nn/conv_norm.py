"""Convolution + batch norm and batch norm + linear, the two pairs EfficientViT is made of."""

from __future__ import annotations

import torch
from torch import nn


class ConvNorm(nn.Sequential):
    """Bias-free Conv2d followed by BatchNorm2d, with the official parameter names `c` and `bn`.

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`.
        norm_weight: initial value of the batch norm's weight; 0 closes a residual branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, norm_weight)


class NormLinear(nn.Sequential):
    """BatchNorm1d followed by Linear, with the official parameter names `bn` and `l`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, out_features, bias=bias)
        nn.init.trunc_normal_(self.l.weight, std=std)
        if bias:
            nn.init.zeros_(self.l.bias)


def fold_conv_norm(
    conv: nn.Conv2d, norm: nn.modules.batchnorm._BatchNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution equal to `norm(conv(x))` in eval mode. Differentiable."""
    factor, shift, dtype = _affine(norm, conv.weight)
    weight = conv.weight.to(dtype) * factor.view(-1, 1, 1, 1)
    bias = shift if conv.bias is None else shift + factor * conv.bias.to(dtype)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def fold_norm_linear(
    norm: nn.modules.batchnorm._BatchNorm, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one linear layer equal to `linear(norm(x))` in eval mode. Differentiable."""
    factor, shift, dtype = _affine(norm, linear.weight)
    matrix = linear.weight.to(dtype)
    bias = matrix @ shift
    if linear.bias is not None:
        bias = bias + linear.bias.to(dtype)
    return (matrix * factor).to(linear.weight.dtype), bias.to(linear.weight.dtype)


def _affine(
    norm: nn.modules.batchnorm._BatchNorm, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Batch norm in eval mode as x * factor + shift, in fp32 at least: 16 bits would lose digits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    factor = torch.rsqrt(variance.to(dtype) + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.to(dtype)
    shift = -mean.to(dtype) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return factor, shift, dtype
