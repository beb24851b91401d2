"""Cascaded group attention on folded batch norms: from a module's pairs of layers to one call of the operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import autocasts
from vitkernels.nn.conv_norm import fold_conv_norm, folds, has_hooks, is_plain_conv
from vitkernels.nn.kept import Kept, compute_dtype, keep, transformed


class CascadeFold(Kept):
    """The weights of `ops.cascaded_group_attention` but for the table of biases, which is used in place."""

    def __init__(self, pairs: list[tuple[Any, Any]], heads: int, dtype: torch.dtype) -> None:
        self.weights, self.kernel_sizes = fold_cascade(pairs, heads, dtype)


def fold_cascade(
    pairs: list[tuple[Any, Any]], heads: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Pairs of convolution and batch norm as the operator's stacked weights, and the kernel sizes. Differentiable.

    Args:
        pairs: of each head's qkv, of each head's depthwise convolution, of the projection.
    """
    folded = [fold_conv_norm(conv, norm, dtype) for conv, norm in pairs]
    qkvs, dws, (proj_weight, proj_bias) = folded[:heads], folded[heads:-1], folded[-1]
    kernel_sizes = tuple(int(weight.shape[2]) for weight, _ in dws)
    largest = max(kernel_sizes)
    taps = [F.pad(weight.squeeze(1), [(largest - weight.shape[2]) // 2] * 4) for weight, _ in dws]
    weights = (
        torch.stack([weight.flatten(1) for weight, _ in qkvs]),
        torch.stack([bias for _, bias in qkvs]),
        torch.stack(taps),
        torch.stack([bias for _, bias in dws]),
        proj_weight.flatten(1),
        proj_bias,
    )
    return weights, kernel_sizes


def mix_folded(
    module: Any, x: torch.Tensor, residual: bool = False, backend: str | None = None
) -> torch.Tensor | None:
    """The mixer `module` on a map of any size, in one kernel; None where its layers have to be called themselves:
    a batch norm uses the batch's statistics, somebody hooked into a layer, or a layer is not the one expected.

    Args:
        module: has `qkvs`, `dws`, `proj`, `attention_biases` and `scale` of the official code.
        residual: add x.
    """
    pairs, sources, eps = _pairs(module)
    if pairs is None or x.ndim != 4:
        return None
    weight = sources[0]
    autocast = autocasts(x.device.type)
    if x.dtype is not weight.dtype and not autocast:
        return None  # PyTorch's own error is the best
    heads = len(pairs) // 2
    dtype = compute_dtype(weight)
    if residual and autocast and x.dtype is not dtype:
        return None  # the sum with a map of another dtype is the caller's, with PyTorch's promotion
    if not autocast and weight.device.type == "cpu":  # whose kernel computes in float32 anyway
        dtype = torch.promote_types(dtype, torch.float32)
    if transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)):
        weights, kernel_sizes = fold_cascade(pairs, heads, dtype)
    else:
        fold = keep(module, sources, (dtype, *eps), lambda: CascadeFold(pairs, heads, dtype))
        weights, kernel_sizes = fold.weights, fold.kernel_sizes
    table = module.attention_biases
    qkv_weight, qkv_bias, dw_weight, dw_bias, proj_weight, proj_bias = weights
    return ops.cascaded_group_attention(
        x,
        qkv_weight,
        qkv_bias,
        dw_weight,
        dw_bias,
        table,
        proj_weight,
        proj_bias,
        window_size=math.isqrt(table.shape[1]),
        kernel_sizes=kernel_sizes,
        scale=module.scale,
        residual=residual,
        backend=backend,
    )


def _pairs(module: Any) -> tuple[Any, list[Any], tuple[float, ...]]:
    """(pairs of layers, their parameters and statistics, eps of the norms), or None for the pairs."""
    parts = module._modules
    proj = parts["proj"]
    relu, last = proj._modules.values() if len(proj._modules) == 2 else (None, None)
    if type(relu) is not nn.ReLU or has_hooks(relu) or has_hooks(proj):
        return None, [], ()
    pairs: list[tuple[Any, Any]] = []
    sources: list[Any] = []
    for pair in (*parts["qkvs"]._modules.values(), *parts["dws"]._modules.values(), last):
        if len(pair._modules) != 2 or has_hooks(pair):
            return None, [], ()
        conv, norm = pair._modules.values()
        if norm.training or has_hooks(conv) or has_hooks(norm):
            return None, [], ()
        if not (is_plain_conv(conv) and folds(conv, norm)):
            return None, [], ()
        tensors, norms, statistics = conv._parameters, norm._parameters, norm._buffers
        pairs.append((conv, norm))
        sources += (tensors["weight"], tensors["bias"], norms["weight"], norms["bias"])
        sources += (statistics["running_mean"], statistics["running_var"])
    return pairs, sources, tuple(norm.eps for _, norm in pairs)
