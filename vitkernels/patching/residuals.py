"""EfficientViT's residual units in eval mode: `x + ffn(x)` after `x + dw(x)` in one call, and `x + mixer(x)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkernels import ops
from vitkernels.core import backends, native
from vitkernels.nn.conv_norm import affine, fold_conv_norm, has_hooks
from vitkernels.nn.folded_cascade import mix_folded
from vitkernels.nn.kept import Kept, compute_dtype, keep, transformed
from vitkernels.patching.folding import (
    FoldedConvNorm,
    FusedFFN,
    is_pointwise,
    quiet_pair,
    requires_grad,
    rides,
    sources_of,
    with_act,
)
from vitkernels.patching.layers import Keeping, Patched, WindowedCascade, WindowPartition, runs_as

# On CUDA the kernel computes float32 without tensor cores, where PyTorch's convolutions take TF32 by default.
_CUDA_DTYPES = (torch.float16, torch.bfloat16)


class _Vectors(Kept):
    """What `ops.residual_ffn` needs beside the network's own weights: the norms as scales and biases, and the folded
    taps of the depthwise convolution. In float32 at least, whatever the weights are in. Under autocast also the
    weights in its dtype.
    """

    def __init__(self, first: Any, second: Any, dw: Any, cast: torch.dtype | None) -> None:
        self.arguments: dict[str, Any] = {}
        for number, (conv, norm) in ((1, first), (2, second)):
            self.arguments[f"scale{number}"], self.arguments[f"bias{number}"], dtype = affine(norm, conv)
            if cast is not None:
                self.arguments[f"weight{number}"] = conv.weight.to(cast)
        if dw is not None:
            conv, norm = dw
            taps, self.arguments["dw_bias"] = fold_conv_norm(conv, norm, dtype)
            self.arguments["dw_weight"] = taps.squeeze(1)


class FusedResidual(Keeping):
    """x + m(x), in one kernel where m is a mixer or an FFN that has one."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.training:  # may drop the path
            return super().forward(x)  # type: ignore[misc]
        inner = self._modules["m"]
        if runs_as(inner, WindowPartition) or runs_as(inner, WindowedCascade):
            y = _residual_mixer(inner, x)
        else:
            y = _run_unit(None, self, x)
        return x + inner(x) if y is None else y


def _residual_mixer(inner: Any, x: torch.Tensor) -> torch.Tensor | None:
    if has_hooks(inner):
        return None
    if runs_as(inner, WindowPartition):
        inner = inner._modules["attn"]
        if not runs_as(inner, WindowedCascade) or has_hooks(inner):
            return None
    return mix_folded(inner, x, residual=True, backend=inner.vitkernels_backend)


class FusedBlock(Patched):
    """The sandwich: depthwise convolution and FFN, the mixer, depthwise convolution and FFN."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        parts = self._modules
        x = residual_unit(parts["dw0"], parts["ffn0"], x)
        x = parts["mixer"](x)
        return residual_unit(parts["dw1"], parts["ffn1"], x)


class FusedSequence(Patched):
    """A plain sequence in which ReLUs follow folded convolutions, as EfficientViT's stem, or FFN units follow
    depthwise units.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        children = [*self._modules.values(), None]
        position = 0
        while (child := children[position]) is not None:
            after = children[position + 1]
            if isinstance(child, FoldedConvNorm) and rides(after):
                x = with_act(child, after, x)
                position += 2
            elif is_depthwise_unit(child) and is_ffn_unit(after):
                x = residual_unit(child, after, x)
                position += 2
            else:
                x = child(x)
                position += 1
        return x


def residual_unit(dw: Any, ffn: Any, x: torch.Tensor) -> torch.Tensor:
    """ffn(dw(x)) for a residual depthwise convolution and a residual FFN, in one call where that can be."""
    fused = is_depthwise_unit(dw) and is_ffn_unit(ffn) and not (has_hooks(dw) or has_hooks(ffn))
    if fused and not (dw.training or ffn.training):  # in train mode a unit may drop its path
        y = _run_unit(dw, ffn, x)
        if y is not None:
            return y
    return ffn(dw(x))


def is_depthwise_unit(module: Any) -> bool:
    return runs_as(module, FusedResidual) and runs_as(module._modules["m"], FoldedConvNorm)


def is_ffn_unit(module: Any) -> bool:
    return runs_as(module, FusedResidual) and runs_as(module._modules["m"], FusedFFN)


def _run_unit(dw: Any, ffn: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The units in one call; None where their layers have to be called themselves."""
    if type(x) is not torch.Tensor or x.ndim != 4 or not _has_kernel(x):
        return None
    inner = ffn._modules["m"]
    if not runs_as(inner, FusedFFN) or has_hooks(inner):
        return None
    parts = inner._modules
    act = parts["act"]
    if type(act) is not nn.ReLU or has_hooks(act):
        return None
    first, second = _quiet_pair(parts["pw1"]), _quiet_pair(parts["pw2"])
    third = None if dw is None else _quiet_pair(dw._modules["m"])
    if first is None or second is None or (dw is not None and third is None):
        return None
    if not (is_pointwise(first[0]) and is_pointwise(second[0])):
        return None
    weight1, *rest1 = sources_of(*first)
    weight2, *rest2 = sources_of(*second)
    sources: tuple[Any, ...] = (*rest1, *rest2)
    eps: tuple[Any, ...] = (first[1].eps, second[1].eps)
    if third is not None:
        if not _is_depthwise(third[0], x.shape[1]):
            return None
        sources, eps = (*sources, *sources_of(*third)), (*eps, third[1].eps)
    if compute_dtype(weight1) is not x.dtype or compute_dtype(weight2) is not x.dtype:
        return None  # what becomes of two dtypes is PyTorch's to say
    if torch.is_grad_enabled() and requires_grad((x, weight1, weight2, *sources)):
        return None
    cast = None
    if weight1.dtype is not x.dtype or weight2.dtype is not x.dtype:
        cast, sources = x.dtype, (*sources, weight1, weight2)
    options = (*eps, x.dtype, third is None, cast is None)
    kept = keep(ffn, sources, options, lambda: _Vectors(first, second, third, cast))
    arguments = {"weight1": weight1, "weight2": weight2, **kept.arguments}
    return ops.residual_ffn(x, **arguments)


def _has_kernel(x: torch.Tensor) -> bool:
    if not native.holds("residual_ffn") or transformed() or x.numel() == 0:
        return False
    kind = x.device.type
    if backends.requested(None) not in (None, kind):
        return False
    if kind == "cpu":
        return x.dtype in backends.FLOAT_DTYPES and not torch.is_autocast_enabled("cpu")
    return (
        kind == "cuda"
        and x.dtype in _CUDA_DTYPES
        and not backends.why_unavailable("cuda", "cuda", x.get_device())
    )


def _quiet_pair(module: Any) -> Any:
    """(convolution, batch norm) of a folded pair in eval mode that nobody listens to, else None."""
    return None if not runs_as(module, FoldedConvNorm) or has_hooks(module) else quiet_pair(module)


def _is_depthwise(conv: Any, channels: int) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == conv.out_channels == channels
        and conv.padding_mode == "zeros"
    )
