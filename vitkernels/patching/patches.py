"""A vision transformer's patch embedding as a matrix product, on GPUs in half precision.

A convolution whose kernel is its stride is a product of the patches with its weight. With three channels cuDNN's does
not reach the tensor cores: in DeiT-S with merged tokens it took 0.42 ms of 2.3 ms (H200, bf16, 64 images), some fifteen
times what the bytes of a copied batch and the operations need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vitkernels.nn.conv_norm import is_plain_conv
from vitkernels.nn.kept import compute_dtype
from vitkernels.patching.layers import Patched

_HALF = (torch.float16, torch.bfloat16)
# Tensor cores take channels in eights.
_FEW_CHANNELS = 8


def cuts_patches(layer: Any) -> bool:
    """Whether a layer is a plain convolution of few channels that cuts its input into patches."""
    return bool(
        is_plain_conv(layer)  # not one that standardizes or quantizes its weight on the way
        and layer.in_channels < _FEW_CHANNELS
        and layer.groups == 1
        and tuple(layer.kernel_size) == tuple(layer.stride)
        and tuple(layer.dilation) == (1, 1)
        and layer.padding in ((0, 0), "valid")
    )


def pays(x: torch.Tensor) -> bool:
    """Whether an input is one that the matrix product is meant for: on a GPU, in half precision."""
    return x.is_cuda and compute_dtype(x) in _HALF


def project(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """The convolution of a map `[B, C, H, W]`, whose sides are multiples of the kernel's, with its channels last."""
    (rows, columns), height, width = conv.kernel_size, *x.shape[2:]
    patches = x.unflatten(2, (height // rows, rows)).unflatten(4, (width // columns, columns))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class PatchProjection(Patched):
    """A convolution that `cuts_patches`, as a product where that pays."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.kernel_size
        whole = (
            x.ndim == 4 and x.shape[1] == self.in_channels and not (x.shape[2] % rows or x.shape[3] % columns)
        )
        return project(self, x) if whole and pays(x) else super().forward(x)  # type: ignore[misc]
