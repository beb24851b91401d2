"""Networks for the tests of `vitkernels.apply`, and what shows whether it left a trace."""

from __future__ import annotations

import copy
import functools

import torch
from randomise import randomise
from timm_import import import_timm
from torch import nn

from vitkernels import models

IMAGE = 112  # maps of 7, 4 and 2, so one whole and two padded windows for M0's tables of 7, 7 and 4


@functools.cache
def _timm_model(name: str) -> nn.Module:
    return randomise(import_timm().create_model(name)).eval()


def timm_model(name: str = "efficientvit_m0") -> nn.Module:
    return copy.deepcopy(_timm_model(name))


def small_model() -> nn.Module:
    """A model of this package's own layers and plain ones, quick to run and the same in every process."""
    torch.manual_seed(0)
    body = models.EfficientViT(
        img_size=112,
        num_classes=10,
        embed_dim=(32, 64),
        key_dim=(16, 16),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        kernels=(5, 3),
    )
    return randomise(body).eval()


def image(batch: int = 2, size: int = IMAGE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def traces(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(module), list(module.__dict__)) for module in model.modules()]
