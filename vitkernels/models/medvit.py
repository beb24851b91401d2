"""MedViTV2 (Manzari et al., 2025): the function and the parameter names of the released code.

Two of its habits look like mistakes and are what the published weights were trained with, so they stay:

- Neighborhood attention gets the map `[B, C, H, W]` *reinterpreted* as `[B, H, W, C]`, without a permutation, and
  the KAN gets it re-cut into rows of C consecutive elements. Both follow the logical order of NCHW, whatever
  the memory format of the input.
- Every global block carries a convolutional feed-forward `conv` that is never run. Its tensors are in every
  checkpoint, so they are parameters here too. They have no gradient, which DistributedDataParallel must be told:
  `find_unused_parameters=True`, or `requires_grad_(False)` for the names in `MedViT.unused_parameters()`.

The neighborhoods are 7 x 7 and not dilated, as in the released models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.faster_kan import FasterKAN
from vitkernels.nn.neighborhood_attention import NeighborhoodAttention2D

_KERNEL_SIZE = 7


class ConvBNReLU(nn.Module):
    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class PatchEmbed(nn.Module):
    """Halves the map by averages, changes the number of channels, does both or nothing."""

    def __init__(self, in_dim: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.avgpool: nn.Module = nn.Identity()
        if stride == 2:
            self.avgpool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.conv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if stride == 2 or in_dim != dim:
            self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
            self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.avgpool(x)))


class SELayer(nn.Module):
    """Scales the channels by a gate computed from their means."""

    def __init__(self, dim: int, reduced: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim, reduced), nn.ReLU(), nn.Linear(reduced, dim), nn.Hardsigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class LocalityFeedForward(nn.Module):
    """x + an inverted bottleneck with a depthwise convolution and a channel gate of `ratio` hidden units."""

    def __init__(self, dim: int, ratio: int, kernel_size: int) -> None:
        super().__init__()
        hidden = ratio * dim
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SELayer(hidden, hidden // dim),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class LFP(nn.Module):
    """Local block: neighborhood attention, then a convolutional feed-forward."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        kernel_size: int,
        drop_path: float,
        head_dim: int,
        drop: float,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_dim, dim, stride)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = NeighborhoodAttention2D(
            dim, dim // head_dim, _KERNEL_SIZE, rel_pos_bias=True, proj_drop=drop
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(dim)
        self.conv = LocalityFeedForward(dim, 3, kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        batch, dim, height, width = x.shape
        # Not a permutation: the elements in NCHW order, read as if they were NHWC.
        tokens = self.norm1(x).reshape(batch, height, width, dim)
        x = x + self.drop_path(self.attn(tokens).reshape(batch, dim, height, width))
        return x + self.conv(self.norm2(x))


class EMHSA(nn.Module):
    """Attention whose keys and values are averages over runs of sr_ratio ** 2 consecutive tokens.

    The runs are cut from the flattened sequence, not from the map; what does not fill a run is left out.
    """

    def __init__(self, dim: int, sr_ratio: int, head_dim: int, drop: float) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.proj_drop = nn.Dropout(drop)
        self.run = sr_ratio**2
        if sr_ratio > 1:
            self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x
        if self.run > 1:
            pooled = self.norm(F.avg_pool1d(x.transpose(1, 2), self.run)).transpose(1, 2)
        q, k, v = (
            linear(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, tokens in ((self.q, x), (self.k, pooled), (self.v, pooled))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MHCA(nn.Module):
    """Multi-head convolutional attention: a grouped convolution, one group a head, and a projection."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // head_dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


class GFP(nn.Module):
    """Global block: attention and convolution on shares of the channels, then a KAN."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        sr_ratio: int,
        drop_path: float,
        head_dim: int,
        mix_block_ratio: float,
        drop: float,
    ) -> None:
        super().__init__()
        attended = make_divisible(dim * mix_block_ratio, 32)
        convolved = dim - attended
        if convolved < head_dim or convolved % head_dim or attended % head_dim:
            fail(
                "dims",
                f"widths of global blocks of which the attended share, {mix_block_ratio:g} rounded to a multiple "
                f"of 32, and the rest are multiples of head_dim = {head_dim}",
                dim,
                "128, 160 and 192 are the smallest.",
            )
        self.patch_embed = PatchEmbed(in_dim, attended, stride)
        self.norm1 = nn.BatchNorm2d(attended)
        self.e_mhsa = EMHSA(attended, sr_ratio, head_dim, drop)
        self.mhsa_path_dropout = DropPath(drop_path * mix_block_ratio)
        self.projection = PatchEmbed(attended, convolved)
        self.mhca = MHCA(convolved, head_dim)
        self.mhca_path_dropout = DropPath(drop_path * (1 - mix_block_ratio))
        self.norm2 = nn.BatchNorm2d(dim)
        self.conv = LocalityFeedForward(dim, 2, 3)  # never run, see the head of this file
        self.kan = FasterKAN([dim, 2 * dim, dim])
        self.mlp_path_dropout = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)
        mixed = self.mhsa_path_dropout(self.e_mhsa(tokens))
        x = x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])
        local = self.projection(x)
        x = torch.cat([x, local + self.mhca_path_dropout(self.mhca(local))], dim=1)
        # Not a permutation: the elements in NCHW order, cut into rows as long as there are channels.
        batch, dim, height, width = x.shape
        rows = self.norm2(x).reshape(batch, height * width, dim)  # by images: torch.export can undo it
        return x + self.mlp_path_dropout(self.kan(rows).reshape(x.shape))


def make_divisible(value: float, divisor: int) -> int:
    """The nearest multiple of divisor, at least divisor, that is no less than nine tenths of value."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


class MedViT(nn.Module):
    """MedViTV2 for images of any size from `minimum_size` on; the original takes square ones only.

    Args:
        depths: blocks of each of the four stages; the third a multiple of 3.
        dims: channels of each stage.
        path_dropout: drop-path of the last block, rising linearly from 0 at the first.
        in_chans: channels of the image.
        num_classes: width of the classifier `proj_head`; 0 returns the pooled features.
        stem_chs: channels of the stem's convolutions.
        sr_ratios: square roots of the lengths of the runs that E-MHSA averages, one a stage.
        head_dim: channels of a head, a divisor of all widths.
        mix_block_ratio: share of a global block's channels that is attended to.
        drop: dropout on the attentions' outputs.
    """

    classifiers = ("proj_head",)
    stage_strides = (4, 8, 16, 32)
    proj_head: nn.Module

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 1),
        dims: Sequence[int] = (64, 128, 192, 384),
        path_dropout: float = 0.1,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_chs: Sequence[int] = (64, 32, 64),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or depths[2] % 3:
            fail("depths", "four ints, the third a multiple of 3", tuple(depths))
        kinds = [
            ["LFP"] * depths[0],
            ["LFP"] * (depths[1] - 1) + ["GFP"],
            ["LFP", "LFP", "GFP"] * (depths[2] // 3),
            ["GFP"] * depths[3],
        ]
        self.num_features = dims[-1]
        self.stage_channels = tuple(dims)
        first, second, third = stem_chs
        self.stem = nn.Sequential(
            ConvBNReLU(in_chans, first, 2),
            ConvBNReLU(first, second, 1),
            ConvBNReLU(second, third, 1),
            ConvBNReLU(third, third, 2),
        )
        rates = iter(torch.linspace(0, path_dropout, sum(depths), device="cpu").tolist())
        blocks: list[nn.Module] = []
        self._ends: list[int] = []
        width = third
        for stage, dim in enumerate(dims):
            for index, kind in enumerate(kinds[stage]):
                stride = 2 if stage and index == 0 else 1
                rate = next(rates)
                if kind == "LFP":
                    kernel_size = 3 if stage else 7
                    blocks.append(LFP(width, dim, stride, kernel_size, rate, head_dim, drop))
                else:
                    sr_ratio = sr_ratios[stage]
                    blocks.append(GFP(width, dim, stride, sr_ratio, rate, head_dim, mix_block_ratio, drop))
                width = dim
            self._ends.append(len(blocks) - 1)
        self.features = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                _initialise(module)
        self.reset_classifier(num_classes)

    @property
    def minimum_size(self) -> int:
        """Smallest height and width of an image: the maps of stages 1 to 3 may not be smaller than 7."""
        return (_KERNEL_SIZE - 1) * self.stage_strides[2] + 1

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Sequential(_initialise(nn.Linear(self.num_features, num_classes))).to(self.norm.weight)
        self.proj_head = head.train(self.training)

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that are in every checkpoint and in no computation."""
        dead = {name for name, module in self.named_modules() if isinstance(module, GFP)}
        return {
            f"{name}.conv.{key}"
            for name in dead
            for key, _ in self.get_submodule(f"{name}.conv").named_parameters()
        }

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The map after each stage, `[B, stage_channels[i], H / stage_strides[i], W / stage_strides[i]]`,
        sizes rounded up."""
        if min(x.shape[-2:]) < self.minimum_size:
            side = self.minimum_size
            fail(
                "x",
                f"images of at least {side} x {side}, so that no map with {_KERNEL_SIZE} x {_KERNEL_SIZE} "
                "neighborhoods is smaller than them",
                x,
                "Resize the images.",
            )
        x = self.stem(x)
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self._ends:
                maps.append(x)
        return maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map after the final norm, `[B, num_features, H / 32, W / 32]`, sizes rounded up."""
        return self.norm(self.forward_intermediates(x)[-1])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooled features of a map, then the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.proj_head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _initialise(layer: Any) -> Any:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@register_model
def medvit_tiny(**kwargs: Any) -> MedViT:
    """11.7 M parameters (1.0 M of them unused), 2.6 G MACs. Keyword arguments: those of `MedViT`."""
    return MedViT(**{"depths": (2, 2, 6, 1), "dims": (64, 128, 192, 384), "path_dropout": 0.1, **kwargs})


@register_model
def medvit_small(**kwargs: Any) -> MedViT:
    """30.1 M parameters (2.8 M of them unused), 3.9 G MACs. Keyword arguments: those of `MedViT`."""
    return MedViT(**{"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "path_dropout": 0.1, **kwargs})


@register_model
def medvit_base(**kwargs: Any) -> MedViT:
    """67.0 M parameters (6.1 M of them unused), 7.9 G MACs. Keyword arguments: those of `MedViT`."""
    return MedViT(**{"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "path_dropout": 0.2, **kwargs})


@register_model
def medvit_large(**kwargs: Any) -> MedViT:
    """118.3 M parameters (10.9 M of them unused), 13.0 G MACs. Keyword arguments: those of `MedViT`."""
    return MedViT(**{"depths": (2, 2, 6, 2), "dims": (96, 256, 512, 1024), "path_dropout": 0.2, **kwargs})
