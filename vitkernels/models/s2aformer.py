"""Networks of S2AFormer's shape (arXiv 2505.22195), for images of any size from `minimum_size` on.

The authors published neither code, nor weights, nor widths and depths. From the paper: four stages of strides 4 to
32, a stem of three 3 x 3 convolutions of which the first has stride 2, a patch embedding in front of every stage,
hybrid perception blocks; the numbers of parameters and multiply-accumulates (MACs) of five sizes. Inferred, and
chosen here:

- widths, depths and numbers of heads: `scripts/search_s2aformer.py` found the family closest to the published numbers
  among regular ones; others fit as well;
- keys and values reduced 8, 4, 2 and 1 times a side, an MLP of four times the width, as in CMT and PVT;
- convolution, GELU, batch norm in the stem, 2 x 2 convolution with stride 2 and layer norm as patch embedding (CMT);
- the head: layer norm, mean, a linear layer to 1280 features, GELU, the classifier (close to CMT's);
- inside of the block, what `nn.HybridPerceptionBlock` says.

The paper's accuracies and speeds are therefore not those of these networks, and no foreign weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.depthwise_conv import channels_last
from vitkernels.nn.strip_attention import HybridPerceptionBlock


class PatchEmbed(nn.Module):
    """A map `[B, C, H, W]` to tokens `[B, H / 2, W / 2, dim]`, sizes rounded down."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """A patch embedding and blocks: a map `[B, C, H, W]` to tokens `[B, H / 2, W / 2, dim]`."""

    def __init__(self, patch_embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.patch_embed(x))


class S2AFormer(nn.Module):
    """A network of S2AFormer's shape; what of it is inferred says the head of this file.

    Args:
        embed_dims, depths, num_heads, sr_ratios: one value a stage.
        mlp_ratio: hidden channels of the MLPs over a stage's.
        stem_dim: channels of the stem; default: the first stage's.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the features in front of it.
        projection: channels of these features.
        drop_path_rate: drop-path of the last block, rising linearly from 0 at the first.
        features_only: the backbone of detectors and segmenters: no `norm`, `proj` and `head`; the model returns the
            map of each stage after a LayerNorm of its own, `outnorm0` to `outnorm3`.
        scale: of the attention's scores, see `nn.StripSelfAttention`; inferred, as in CMT and MetaSeg.
        **attention: its other arguments.
    """

    head: nn.Module

    def __init__(
        self,
        embed_dims: Sequence[int] = (32, 64, 128, 320),
        depths: Sequence[int] = (1, 2, 4, 3),
        num_heads: Sequence[int] = (1, 2, 4, 10),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        *,
        stem_dim: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        projection: int = 1280,
        drop_path_rate: float = 0.1,
        features_only: bool = False,
        scale: str | float = "value_dim",
        **attention: Any,
    ) -> None:
        super().__init__()
        for name, value in {"depths": depths, "num_heads": num_heads, "sr_ratios": sr_ratios}.items():
            if len(value) != len(embed_dims):
                fail(name, f"{len(embed_dims)} values, one a stage", tuple(value))
        self.features_only = features_only
        self.num_classes = 0 if features_only else num_classes
        self.num_features = embed_dims[-1] if features_only else projection
        self.stage_channels = tuple(embed_dims)
        self.stage_strides = tuple(4 << stage for stage in range(len(depths)))
        self.sr_ratios = tuple(sr_ratios)
        width = stem_dim or embed_dims[0]
        self.stem = _stem(in_chans, width)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, dim in enumerate(embed_dims):
            blocks = [
                HybridPerceptionBlock(
                    dim,
                    num_heads[stage],
                    sr_ratios[stage],
                    scale=scale,
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                    **attention,
                )
                for _ in range(depths[stage])
            ]
            self.layers.append(Stage(PatchEmbed(width, dim), blocks))
            width = dim
        if features_only:
            for stage, dim in enumerate(embed_dims):
                self.add_module(f"outnorm{stage}", nn.LayerNorm(dim))
        else:
            self.norm = nn.LayerNorm(width)
            self.proj = nn.Linear(width, projection)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _initialise(module)
        if not features_only:
            self.reset_classifier(num_classes)

    @property
    def minimum_size(self) -> int:
        """Smallest height and width of an image: every stage's map has at least one key."""
        # The stem rounds up, the patch embeddings down.
        return max(s * r for s, r in zip(self.stage_strides, self.sr_ratios, strict=True)) - 1

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        if self.features_only:
            fail("num_classes", "no call: a model built with features_only has no classifier", num_classes)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = _initialise(nn.Linear(self.num_features, num_classes)).to(self.norm.weight)
        self.head = head.train(self.training)

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The map after each stage, `[B, stage_channels[i], H / stage_strides[i], W / stage_strides[i]]`, of H and W
        rounded up to even numbers, rounded down, channels last in memory; with features_only normalised."""
        if min(x.shape[-2:]) < self.minimum_size:
            side = self.minimum_size
            fail("x", f"images of at least {side} x {side}, one key a stage", x, "Resize the images.")
        x = self.stem(channels_last(x))
        maps = []
        for stage, layer in enumerate(self.layers):
            tokens = layer(x)
            x = tokens.permute(0, 3, 1, 2)
            out = self.get_submodule(f"outnorm{stage}")(tokens) if self.features_only else tokens
            maps.append(out.permute(0, 3, 1, 2))
        return maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map after a layer norm, as in `forward_intermediates`."""
        x = self.forward_intermediates(x)[-1]
        return x if self.features_only else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooled features of a map, projected, then the classifier."""
        x = x.mean((2, 3))
        if self.features_only:
            return x
        x = F.gelu(self.proj(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits; with features_only the list of `forward_intermediates`."""
        return (
            self.forward_intermediates(x)
            if self.features_only
            else self.forward_head(self.forward_features(x))
        )


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, stride in ((in_chans, 2), (dim, 1), (dim, 1)):
        layers += [nn.Conv2d(before, dim, 3, stride=stride, padding=1), nn.GELU(), nn.BatchNorm2d(dim)]
    return nn.Sequential(*layers)


def _initialise(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


# Found by scripts/search_s2aformer.py: embed_dims, depths, num_heads.
CONFIGS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "s2aformer_mini": ((24, 48, 120, 288), (1, 2, 3, 3), (1, 2, 5, 12)),
    "s2aformer_t": ((32, 64, 128, 320), (1, 2, 4, 3), (1, 2, 4, 10)),
    "s2aformer_xs": ((32, 64, 128, 320), (2, 2, 7, 3), (1, 2, 4, 10)),
    "s2aformer_s": ((32, 96, 192, 384), (1, 2, 10, 3), (1, 3, 6, 12)),
    "s2aformer_m": ((64, 128, 320, 512), (1, 4, 10, 4), (1, 2, 5, 8)),
}


def _build(name: str, **kwargs: Any) -> S2AFormer:
    embed_dims, depths, num_heads = CONFIGS[name]
    return S2AFormer(**{"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, **kwargs})


@register_model
def s2aformer_mini(**kwargs: Any) -> S2AFormer:
    """4.90 M parameters, 0.434 G MACs; published 5.02 and 0.43. Keyword arguments: those of `S2AFormer`."""
    return _build("s2aformer_mini", **kwargs)


@register_model
def s2aformer_t(**kwargs: Any) -> S2AFormer:
    """5.85 M parameters, 0.663 G MACs; published 5.80 and 0.655. Keyword arguments: those of `S2AFormer`."""
    return _build("s2aformer_t", **kwargs)


@register_model
def s2aformer_xs(**kwargs: Any) -> S2AFormer:
    """6.38 M parameters, 0.795 G MACs; published 6.54 and 0.786. Keyword arguments: those of `S2AFormer`."""
    return _build("s2aformer_xs", **kwargs)


@register_model
def s2aformer_s(**kwargs: Any) -> S2AFormer:
    """10.71 M parameters, 1.4 G MACs; published 10.69 and 1.38. Keyword arguments: those of `S2AFormer`."""
    return _build("s2aformer_s", **kwargs)


@register_model
def s2aformer_m(**kwargs: Any) -> S2AFormer:
    """24.67 M parameters, 4.15 G MACs; published 24.87 and 4.12. Keyword arguments: those of `S2AFormer`."""
    return _build("s2aformer_m", **kwargs)
