"""S2AFormer's blocks and stem in inference: GELUs and residual sums in the memory of the layer in front of them.

A batch of its maps takes tens of megabytes, which the C library maps anew at every allocation: the faults cost the
CPU more than what is computed. The values are those of the layers, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkernels.core import backends
from vitkernels.core.checks import autocasts
from vitkernels.nn.conv_norm import has_hooks, is_plain_conv, is_plain_norm
from vitkernels.nn.depthwise_conv import DepthwiseConv
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.kept import transformed
from vitkernels.nn.strip_attention import LIM, MLP, HybridPerceptionBlock, StripSelfAttention
from vitkernels.patching.layers import Patched, runs_as

_gelu_in_place: Any = getattr(torch._C._nn, "gelu_", None)


class FusedPerceptionBlock(Patched):
    """`nn.HybridPerceptionBlock`."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        drop_path = self.drop_path  # which may be kept on, replaced or watched
        idle = _quiet(drop_path, DropPath) and not drop_path.training
        if self.training or not idle or not works_in_place(x):
            return super().forward(x)  # type: ignore[misc]
        x = _plus(self.local(x), x, _makes_its_output(self.local))
        attn, lim, mlp = self.attn, self.lim, self.mlp
        fresh = (
            _quiet(attn, StripSelfAttention)
            and _makes_its_output(attn.proj)
            and _quiet(attn.proj_drop, nn.Dropout)
        )
        x = _plus(attn(self.norm1(x)), x, fresh)
        x = _plus(_local_module(lim, self.norm2(x)), x, _quiet(lim, LIM) and _makes_its_output(lim.conv2))
        return _plus(_mlp(mlp, self.norm3(x)), x, _quiet(mlp, MLP) and _makes_its_output(mlp.fc2))


class FusedStem(Patched):
    """A sequence of Conv2d, GELU and batch norm, in this order, over and over."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.training or len(self._modules) % 3 or not works_in_place(x):  # a slice may end anywhere
            return super().forward(x)  # type: ignore[misc]
        children = iter(self._modules.values())
        for conv, act, norm in zip(children, children, children, strict=True):
            x = norm(_gelu(act, conv(x), _makes_its_output(conv)))
        return x


def is_block(module: nn.Module) -> bool:
    return type(module) is HybridPerceptionBlock or runs_as(module, FusedPerceptionBlock)


def is_stem(children: list[Any]) -> bool:
    """Whether these layers are what `FusedStem` runs."""
    return (
        len(children) > 0
        and len(children) % 3 == 0
        and all(is_plain_conv(conv) for conv in children[::3])
        and all(type(act) is nn.GELU for act in children[1::3])
        and all(is_plain_norm(norm) for norm in children[2::3])
    )


def works_in_place(x: torch.Tensor) -> bool:
    """Whether nobody can miss what the layers would have returned: no gradient, no trace, no cast between them."""
    return (
        _gelu_in_place is not None
        and not torch.is_grad_enabled()
        and not transformed()
        and not autocasts(x.device.type)
        and backends.requested(None) != "reference"
    )


def _quiet(layer: Any, *classes: type[nn.Module]) -> bool:
    return type(layer) in classes and not has_hooks(layer)


def _makes_its_output(layer: Any) -> bool:
    """Whether what the layer returns is new memory that nobody else holds."""
    if _quiet(layer, DepthwiseConv):
        layer = layer.conv
    return _quiet(layer, nn.Linear, nn.Conv2d)


def _plus(y: torch.Tensor, x: torch.Tensor, fresh: bool) -> torch.Tensor:
    """x + y, in y's memory if it is fresh."""
    return y.add_(x) if fresh and y.dtype is x.dtype else x + y


def _gelu(act: Any, y: torch.Tensor, fresh: bool) -> torch.Tensor:
    if fresh and _quiet(act, nn.GELU):
        return _gelu_in_place(y, approximate=act.approximate)
    return act(y)


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if not _quiet(mlp, MLP):
        return mlp(x)
    return mlp.fc2(_gelu(mlp.act, mlp.fc1(x), _makes_its_output(mlp.fc1)))


def _local_module(lim: Any, x: torch.Tensor) -> torch.Tensor:
    if not _quiet(lim, LIM):
        return lim(x)
    y = _gelu(lim.act, lim.conv1(x), _makes_its_output(lim.conv1))
    return lim.conv2(lim.norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
