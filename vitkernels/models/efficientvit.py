"""EfficientViT M0 to M5 (Liu et al., CVPR 2023), with the parameter names of the official code.

MIT's networks of the same name are others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from vitkernels.models.registry import register_model
from vitkernels.nn.cascaded_group_attention import LocalWindowAttention
from vitkernels.nn.conv_norm import ConvNorm, NormLinear


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.m, LocalWindowAttention):
            return self.m.residual(x)
        return x + self.m(x)


class FFN(nn.Module):
    """Two pointwise convolutions with a ReLU between; the second starts at zero."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden, dim, norm_weight=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """Scales the channels by a gate computed from their means."""

    def __init__(self, dim: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class PatchMerging(nn.Module):
    """Halves the map through an inverted bottleneck of four times the width."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, padding=1, groups=hidden)
        self.se = SqueezeExcite(hidden, (dim + 7) // 8 * 8)
        self.conv3 = ConvNorm(hidden, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.conv3(self.se(x))


def _depthwise(dim: int, norm_weight: float) -> Residual:
    return Residual(ConvNorm(dim, dim, 3, padding=1, groups=dim, norm_weight=norm_weight))


class EfficientViTBlock(nn.Module):
    """The sandwich: depthwise convolution and FFN, the token mixer, depthwise convolution and FFN."""

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        attn_ratio: float,
        resolution: int,
        window_resolution: int,
        kernels: Sequence[int],
    ) -> None:
        super().__init__()
        self.dw0 = _depthwise(dim, norm_weight=0.0)
        self.ffn0 = Residual(FFN(dim, 2 * dim))
        self.mixer = Residual(
            LocalWindowAttention(dim, key_dim, num_heads, attn_ratio, resolution, window_resolution, kernels)
        )
        self.dw1 = _depthwise(dim, norm_weight=0.0)
        self.ffn1 = Residual(FFN(dim, 2 * dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class EfficientViT(nn.Module):
    """EfficientViT for images of any size.

    Args:
        img_size: size of the images expected; bounds the windows, R = min(window_size, map side), so that
            the bias tables have the shapes of a checkpoint made at that size. Images of other sizes run:
            their maps are cut into windows of the same R, zero-padded right and bottom.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the pooled features.
        embed_dim, key_dim, depth, num_heads, window_size: one value a stage; one int of window_size for all.
        kernels: depthwise kernel size of each head's query.
        distillation: a second classifier `head_dist`; in eval mode the mean of the two is returned.
    """

    head: nn.Module
    head_dist: nn.Module

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 192),
        key_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        window_size: int | Sequence[int] = (7, 7, 7),
        kernels: Sequence[int] = (5, 5, 5, 5),
        distillation: bool = False,
    ) -> None:
        super().__init__()
        windows = (window_size,) * len(depth) if isinstance(window_size, int) else tuple(window_size)
        self.num_classes = num_classes
        self.num_features = embed_dim[-1]
        self.stage_channels = tuple(embed_dim)
        self.stage_strides = tuple(16 << stage for stage in range(len(depth)))
        self.patch_embed = _stem(in_chans, embed_dim[0])
        resolution = img_size // 16
        width = embed_dim[0]
        for stage, dim in enumerate(embed_dim):
            layers: list[nn.Module] = []
            if stage:
                layers += _downsample(width, dim)
                resolution = (resolution - 1) // 2 + 1
            ratio = dim / (key_dim[stage] * num_heads[stage])
            layers += [
                EfficientViTBlock(
                    dim, key_dim[stage], num_heads[stage], ratio, resolution, windows[stage], kernels
                )
                for _ in range(depth[stage])
            ]
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*layers))
            width = dim
        self.distillation = distillation
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        weight = next(self.patch_embed.parameters())
        self.num_classes = num_classes
        for name in ("head", "head_dist") if self.distillation else ("head",):
            head = NormLinear(self.num_features, num_classes) if num_classes else nn.Identity()
            self.add_module(name, head.to(weight).train(self.training))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official recipe trains without weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The map after each stage, `[B, stage_channels[i], H / stage_strides[i], W / stage_strides[i]]`,
        sizes rounded up."""
        x = self.patch_embed(x)
        maps = []
        for stage in range(len(self.stage_channels)):
            x = getattr(self, f"blocks{stage + 1}")(x)
            maps.append(x)
        return maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's map, `[B, num_features, H / 64, W / 64]`, sizes rounded up."""
        return self.forward_intermediates(x)[-1]

    def forward_head(
        self, x: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pooled features of a map, then the classifier; the pair of them when training with distillation."""
        x = x.mean((2, 3))
        if pre_logits or not self.num_classes:
            return x
        if not self.distillation:
            return self.head(x)
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.forward_head(self.forward_features(x))


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    widths = (in_chans, dim // 8, dim // 4, dim // 2, dim)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [ConvNorm(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _downsample(dim: int, out_dim: int) -> list[nn.Module]:
    return [
        nn.Sequential(_depthwise(dim, norm_weight=1.0), Residual(FFN(dim, 2 * dim))),
        PatchMerging(dim, out_dim),
        nn.Sequential(_depthwise(out_dim, norm_weight=1.0), Residual(FFN(out_dim, 2 * out_dim))),
    ]


_CONFIGS = {
    "efficientvit_m0": ((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "efficientvit_m1": ((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "efficientvit_m2": ((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "efficientvit_m3": ((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "efficientvit_m4": ((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "efficientvit_m5": ((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}


def _build(name: str, **kwargs: object) -> EfficientViT:
    embed_dim, depth, num_heads, kernels = _CONFIGS[name]
    arguments = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "kernels": kernels}
    return EfficientViT(**{**arguments, **kwargs})  # type: ignore[arg-type]


@register_model
def efficientvit_m0(**kwargs: object) -> EfficientViT:
    """2.3 M parameters, 79 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m0", **kwargs)


@register_model
def efficientvit_m1(**kwargs: object) -> EfficientViT:
    """3.0 M parameters, 167 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m1", **kwargs)


@register_model
def efficientvit_m2(**kwargs: object) -> EfficientViT:
    """4.2 M parameters, 201 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m2", **kwargs)


@register_model
def efficientvit_m3(**kwargs: object) -> EfficientViT:
    """6.9 M parameters, 263 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m3", **kwargs)


@register_model
def efficientvit_m4(**kwargs: object) -> EfficientViT:
    """8.8 M parameters, 299 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m4", **kwargs)


@register_model
def efficientvit_m5(**kwargs: object) -> EfficientViT:
    """12.5 M parameters, 522 M MACs. Keyword arguments: those of `EfficientViT`."""
    return _build("efficientvit_m5", **kwargs)
