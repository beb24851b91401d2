"""Convolution + batch norm and batch norm + linear, the two pairs EfficientViT is made of."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm


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
    conv: nn.Conv2d | nn.Linear, norm: _BatchNorm, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution (or linear layer) equal to `norm(conv(x))` in eval mode. Differentiable.

    Args:
        out_dtype: of the result; default: the convolution's.
    """
    factor, bias, dtype = affine(norm, conv)
    out_dtype = out_dtype or conv.weight.dtype
    weight = conv.weight.to(dtype) * factor.view(-1, *(1,) * (conv.weight.ndim - 1))
    return weight.to(out_dtype), bias.to(out_dtype)


def fold_norm_linear(norm: _BatchNorm, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one linear layer equal to `linear(norm(x))` in eval mode. Differentiable."""
    factor, shift, dtype = _affine(norm, linear.weight)
    matrix = linear.weight.to(dtype)
    bias = matrix @ shift
    if linear.bias is not None:
        bias = bias + linear.bias.to(dtype)
    return (matrix * factor).to(linear.weight.dtype), bias.to(linear.weight.dtype)


def affine(norm: _BatchNorm, conv: nn.Conv2d | nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """(factor, shift, dtype) with norm(conv(x)) = factor * (weight x) + shift in eval mode. Differentiable."""
    factor, shift, dtype = _affine(norm, conv.weight)
    return factor, shift if conv.bias is None else shift + factor * conv.bias.to(dtype), dtype


def _affine(norm: _BatchNorm, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
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


def is_plain_conv(module: nn.Module) -> bool:
    """Whether it is a Conv2d and nothing more."""
    cls: type = type(module)
    return cls is nn.Conv2d or (
        issubclass(cls, nn.Conv2d)
        and cls.forward is nn.Conv2d.forward
        and cls._conv_forward is nn.Conv2d._conv_forward
    )


def is_plain_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm and nothing more: some subclasses apply an activation too."""
    cls: type = type(module)
    return cls is nn.BatchNorm2d or (
        issubclass(cls, _BatchNorm) and cls.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    )


def folds(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a batch norm and the plain layer beside it have what a fold needs: parameters that nothing computes, and
    statistics. Layers may be replaced or parametrised at any time.
    """
    tensors, norms = layer._parameters, norm._parameters
    return (
        is_plain_norm(norm)
        and ("weight" in tensors and "bias" in tensors and "weight" in norms and "bias" in norms)
        and norm._buffers["running_mean"] is not None
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether the module must be called itself: somebody hooked into it or replaced its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
        or "forward" in module.__dict__
    )
