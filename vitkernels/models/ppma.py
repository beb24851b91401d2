"""PPMA (Zhao et al., NeurIPS 2025), with the parameter names of the official code, also as a backbone.

Tokens stay channels last, `[B, H, W, C]`, between the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.depthwise_conv import DepthwiseConv, channels_last
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.polyline_path_attention import PolylinePathAttention, RasterRotation


class PatchEmbed(nn.Module):
    """An image `[B, C, H, W]` to tokens `[B, H / 4, W / 4, dim]`, sizes rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        for i, stride in enumerate((2, 1, 2, 1)):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride=stride, padding=1))
            layers.append(nn.BatchNorm2d(widths[i + 1]))
            layers.append(nn.GELU())
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(channels_last(x)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Half the map, sizes rounded up, and another number of channels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dwconv = DepthwiseConv(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(self.dwconv(x) + x)


class Block(nn.Module):
    """A depthwise convolution, attention and a feed-forward, each added to its input.

    With layer scale the last two are multiplied by a learned vector.
    """

    def __init__(
        self, dim: int, num_heads: int, mode: str, hidden: int, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = PolylinePathAttention(dim, num_heads, mode=mode)
        self.drop_path = DropPath(drop_path)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, hidden)
        self.pos = DepthwiseConv(dim, 3)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor, rel_pos: torch.Tensor) -> torch.Tensor:
        x = x + self.pos(x)
        branch = self.retention(self.retention_layer_norm(x), rel_pos)
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class Stage(nn.Module):
    """Blocks of one width, and the step down to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], head_dim: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.Relpos = RasterRotation(head_dim)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rel_pos = self.Relpos(x.shape[1], x.shape[2], torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, rel_pos)
        return x


class PPMA(nn.Module):
    """PPMA for images of any size.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: one value a stage.
        modes: "criss_cross" or "whole", one a stage, see `nn.PolylinePathAttention`.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the pooled features.
        projection: channels of the pooled features.
        drop_path_rate: drop-path of the last block, rising linearly from 0 at the first.
        layer_scales: initial value of the learned factors on a stage's branches; None has none.
        features_only: the backbone of detectors and segmenters: no `proj`, `norm` and `head`; the model returns the
            map of each stage after a LayerNorm of its own, `outnorm0` to `outnorm3`.
    """

    head: nn.Module

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        modes: Sequence[str] = ("criss_cross", "criss_cross", "whole", "whole"),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        projection: int = 1024,
        drop_path_rate: float = 0.1,
        layer_scales: Sequence[float | None] = (None, None, None, None),
        features_only: bool = False,
    ) -> None:
        super().__init__()
        options = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "modes": modes}
        for name, value in {**options, "layer_scales": layer_scales}.items():
            if len(value) != len(embed_dims):
                fail(name, f"{len(embed_dims)} values, one a stage", tuple(value))
        self.features_only = features_only
        self.num_classes = 0 if features_only else num_classes
        self.num_features = embed_dims[-1] if features_only else projection
        self.stage_channels = tuple(embed_dims)
        self.stage_strides = tuple(4 << stage for stage in range(len(depths)))
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, dim in enumerate(embed_dims):
            heads, hidden = num_heads[stage], int(mlp_ratios[stage] * dim)
            blocks = [
                Block(dim, heads, modes[stage], hidden, next(rates), layer_scales[stage])
                for _ in range(depths[stage])
            ]
            last = stage == len(embed_dims) - 1
            downsample = None if last else PatchMerging(dim, embed_dims[stage + 1])
            self.layers.append(Stage(blocks, dim // heads, downsample))
        if features_only:
            for stage, dim in enumerate(embed_dims):
                self.add_module(f"outnorm{stage}", nn.LayerNorm(dim))
        else:
            self.proj = nn.Linear(embed_dims[-1], projection)
            self.norm = nn.BatchNorm2d(projection)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _initialise(module)
        if not features_only:
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        if self.features_only:
            fail("num_classes", "no call: a model built with features_only has no classifier", num_classes)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = _initialise(nn.Linear(self.num_features, num_classes)).to(self.norm.weight)
        self.head = head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official code marks to be trained without weight decay."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.endswith(("path_embed.dt_bias", "path_embed.A_log"))}

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The map after each stage, `[B, stage_channels[i], H / stage_strides[i], W / stage_strides[i]]`, sizes
        rounded up, channels last in memory; with features_only normalised."""
        x = self.patch_embed(x)
        maps = []
        for stage, layer in enumerate(self.layers):
            x = layer(x)
            out = self.get_submodule(f"outnorm{stage}")(x) if self.features_only else x
            maps.append(out.permute(0, 3, 1, 2))
            step: Any = layer.downsample
            if step is not None:
                x = step(x)
        return maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last map after projection, norm and SiLU, `[B, num_features, H / 32, W / 32]`, sizes rounded up; with
        features_only the last stage's."""
        x = self.forward_intermediates(x)[-1]
        if self.features_only:
            return x
        return F.silu(self.norm(self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooled features of a map, then the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits or self.features_only else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits; with features_only the list of `forward_intermediates`."""
        return (
            self.forward_intermediates(x)
            if self.features_only
            else self.forward_head(self.forward_features(x))
        )

    def convert_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of a classifier, detector or segmenter, as this model takes them.

        Of a detector's file the backbone is taken; a backbone takes the weights of a classifier, which has no
        `outnorm`s: these stay as they are.
        """
        backbone = {
            key.removeprefix("backbone."): v for key, v in state_dict.items() if key.startswith("backbone.")
        }
        loaded = backbone or dict(state_dict)
        if not self.features_only:
            return loaded
        loaded = {key: v for key, v in loaded.items() if not re.match(r"(proj|norm|head)\.", key)}
        if not any(key.startswith("outnorm") for key in loaded):
            loaded |= {key: v for key, v in self.state_dict().items() if key.startswith("outnorm")}
        return loaded


def _initialise(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


@register_model
def ppma_t(**kwargs: Any) -> PPMA:
    """14.3 M parameters, 2.7 G MACs. Keyword arguments: those of `PPMA`."""
    return PPMA(**kwargs)


_LARGER: dict[str, Any] = {
    "mlp_ratios": (4, 4, 3, 3),
    "modes": ("criss_cross", "criss_cross", "criss_cross", "whole"),
}


@register_model
def ppma_s(**kwargs: Any) -> PPMA:
    """27.0 M parameters, 4.9 G MACs. Keyword arguments: those of `PPMA`."""
    return PPMA(**{**_LARGER, "depths": (3, 4, 18, 4), "drop_path_rate": 0.15, **kwargs})


@register_model
def ppma_b(**kwargs: Any) -> PPMA:
    """54.2 M parameters, 10.6 G MACs, layer scale in the last two stages. Keyword arguments: those of `PPMA`."""
    arguments = {
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "drop_path_rate": 0.4,
        "layer_scales": (None, None, 1e-6, 1e-6),
    }
    return PPMA(**{**_LARGER, **arguments, **kwargs})
