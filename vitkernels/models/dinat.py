"""NAT and DiNAT (Hassani et al., CVPR 2023; Hassani and Shi, 2022), with the parameter names of the official code.

The two differ in nothing but the dilations of their neighborhood attention, which no checkpoint records.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.neighborhood_attention import NeighborhoodAttention2D


class ConvTokenizer(nn.Module):
    """An image `[B, C, H, W]` to tokens `[B, H / 4, W / 4, dim]`, sizes rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Half the map, twice the channels; channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class NATLayer(nn.Module):
    """x + NA(norm(x)), then x + MLP(norm(x)); with layer scale each branch is multiplied by a learned vector."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        layer_scale: float | None,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim, num_heads, kernel_size, dilation=dilation, rel_pos_bias=True, proj_drop=drop, **attention
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.attn(self.norm1(x))
        x = x + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


class NATLevel(nn.Module):
    """Layers of one width, and the step down to the next level."""

    def __init__(self, layers: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class NAT(nn.Module):
    """NAT, or DiNAT where dilations are given, for images of any size from `minimum_size` on.

    Args:
        embed_dim: channels of the first level; each level doubles them.
        mlp_ratio: hidden width of the MLPs, as a multiple of the level's.
        depths, num_heads: one value a level.
        kernel_size: side of every neighborhood.
        dilations: one int for each layer of each level; None means 1 everywhere.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the pooled features.
        drop_path_rate: drop-path of the last layer, rising linearly from 0 at the first.
        drop_rate: dropout on tokens, projections and MLPs.
        attn_drop_rate: accepted for inference only, see `nn.NeighborhoodAttention2D`.
        qkv_bias, qk_scale: see `nn.NeighborhoodAttention2D`.
        layer_scale: initial value of the learned factors on the branches; None has none.
    """

    head: nn.Module

    def __init__(
        self,
        embed_dim: int,
        mlp_ratio: float,
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.2,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        if [len(level) for level in dilations] != list(depths):
            fail("dilations", f"one int a layer, {list(depths)} of them", dilations)
        if len(num_heads) != len(depths):
            fail("num_heads", f"{len(depths)} ints, one a level", num_heads)
        widths = [embed_dim << level for level in range(len(depths))]
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.stage_channels = tuple(widths)
        self.stage_strides = tuple(4 << level for level in range(len(depths)))
        self._needs = tuple(kernel_size * max(level) for level in dilations)
        self.patch_embed = ConvTokenizer(in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            layers = [
                NATLayer(
                    width,
                    num_heads[level],
                    kernel_size,
                    dilation,
                    mlp_ratio,
                    drop_rate,
                    next(rates),
                    layer_scale,
                    attn_drop=attn_drop_rate,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                )
                for dilation in dilations[level]
            ]
            last = level == len(widths) - 1
            self.levels.append(NATLevel(layers, None if last else ConvDownsampler(width)))
        self.norm = nn.LayerNorm(self.num_features)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _initialise(module)
        self.reset_classifier(num_classes)

    @property
    def minimum_size(self) -> int:
        """Smallest height and width of an image: no map may be smaller than kernel_size * dilation."""
        return max(
            (need - 1) * stride + 1 for need, stride in zip(self._needs, self.stage_strides, strict=True)
        )

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = _initialise(nn.Linear(self.num_features, num_classes)).to(self.norm.weight)
        self.head = head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official recipe trains without weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The map after each level, `[B, stage_channels[i], H / stage_strides[i], W / stage_strides[i]]`,
        sizes rounded up, channels last in memory."""
        if min(x.shape[-2:]) < self.minimum_size:
            side = self.minimum_size
            fail(
                "x",
                f"images of at least {side} x {side}, so that no map is smaller than kernel_size * dilation",
                x,
                "Build the model with smaller dilations or a smaller kernel_size, or resize the images.",
            )
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x.permute(0, 3, 1, 2))
            step: Any = level.downsample
            if step is not None:
                x = step(x)
        return maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last level's map after the final norm, `[B, num_features, H / 32, W / 32]`, sizes rounded up."""
        return self.norm(self.forward_intermediates(x)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooled features of a map, then the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _initialise(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def dilations_for(img_size: int, depths: Sequence[int], kernel_size: int = 7) -> list[list[int]]:
    """DiNAT's dilations: every other layer of a level spreads its neighborhood over the whole map.

    At 224 pixels 8, 4, 2 and 1 for 7 x 7 neighborhoods; at 384 pixels 13, 6, 3 and 1, or 8, 4, 2 and 1 for
    11 x 11 ones: the values of all published DiNATs.

    Args:
        img_size: side of the images expected; larger ones run with the same dilations.
        depths: number of layers of each level.
        kernel_size: side of the neighborhoods.
    """
    widest = [max(1, -(-img_size // (4 << level)) // kernel_size) for level in range(len(depths))]
    return [
        [wide if layer % 2 else 1 for layer in range(depth)]
        for wide, depth in zip(widest, depths, strict=True)
    ]


# embed_dim, mlp_ratio, depths, num_heads, drop_path_rate
_CONFIGS: dict[str, tuple[int, float, tuple[int, ...], tuple[int, ...], float]] = {
    "mini": (64, 3, (3, 4, 6, 5), (2, 4, 8, 16), 0.2),
    "tiny": (64, 3, (3, 4, 18, 5), (2, 4, 8, 16), 0.2),
    "small": (96, 2, (3, 4, 18, 5), (3, 6, 12, 24), 0.3),
    "base": (128, 2, (3, 4, 18, 5), (4, 8, 16, 32), 0.5),
    "large": (192, 2, (3, 4, 18, 5), (6, 12, 24, 48), 0.35),
}


def _arguments_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Heads and kernel size of a checkpoint, from the shapes of its bias tables.

    An early revision of the official code gave DiNAT-large other head counts, and the 11 x 11 checkpoints have
    other tables.
    """
    tables = {}
    for key, value in state_dict.items():
        if (match := re.fullmatch(r"levels\.(\d+)\.blocks\.0\.attn\.rpb", key)) and value.ndim == 3:
            tables[int(match[1])] = value.shape
    if not tables or sorted(tables) != list(range(len(tables))):
        return {}
    heads = tuple(tables[level][0] for level in sorted(tables))
    return {"num_heads": heads, "kernel_size": (tables[0][1] + 1) // 2}


def _build(size: str, dilated: bool, kwargs: dict[str, Any], layer_scale: float | None = None) -> NAT:
    embed_dim, mlp_ratio, depths, num_heads, drop_path_rate = _CONFIGS[size]
    arguments: dict[str, Any] = {
        "embed_dim": embed_dim,
        "mlp_ratio": mlp_ratio,
        "depths": depths,
        "num_heads": num_heads,
        "drop_path_rate": drop_path_rate,
        "layer_scale": layer_scale,
        **kwargs,
    }
    img_size = arguments.pop("img_size", 224)
    if dilated and arguments.get("dilations") is None:
        depths = arguments["depths"]
        arguments["dilations"] = dilations_for(img_size, depths, arguments.get("kernel_size", 7))
    return NAT(**arguments)


@register_model(arguments_of=_arguments_of)
def nat_mini(**kwargs: Any) -> NAT:
    """20.0 M parameters, 2.7 G MACs. Keyword arguments: those of `NAT`."""
    return _build("mini", False, kwargs)


@register_model(arguments_of=_arguments_of)
def nat_tiny(**kwargs: Any) -> NAT:
    """27.9 M parameters, 4.3 G MACs. Keyword arguments: those of `NAT`."""
    return _build("tiny", False, kwargs)


@register_model(arguments_of=_arguments_of)
def nat_small(**kwargs: Any) -> NAT:
    """50.7 M parameters, 7.8 G MACs, layer scale. Keyword arguments: those of `NAT`."""
    return _build("small", False, kwargs, layer_scale=1e-5)


@register_model(arguments_of=_arguments_of)
def nat_base(**kwargs: Any) -> NAT:
    """89.8 M parameters, 13.7 G MACs, layer scale. Keyword arguments: those of `NAT`."""
    return _build("base", False, kwargs, layer_scale=1e-5)


@register_model(arguments_of=_arguments_of)
def dinat_mini(**kwargs: Any) -> NAT:
    """20.0 M parameters, 2.7 G MACs. Keyword arguments: `img_size` (see `dilations_for`) and those of `NAT`."""
    return _build("mini", True, kwargs)


@register_model(arguments_of=_arguments_of)
def dinat_tiny(**kwargs: Any) -> NAT:
    """27.9 M parameters, 4.3 G MACs. Keyword arguments: `img_size` (see `dilations_for`) and those of `NAT`."""
    return _build("tiny", True, kwargs)


@register_model(arguments_of=_arguments_of)
def dinat_small(**kwargs: Any) -> NAT:
    """50.7 M parameters, 7.8 G MACs. Keyword arguments: `img_size` (see `dilations_for`) and those of `NAT`."""
    return _build("small", True, kwargs)


@register_model(arguments_of=_arguments_of)
def dinat_base(**kwargs: Any) -> NAT:
    """89.8 M parameters, 13.7 G MACs, layer scale. Keyword arguments: `img_size` (see `dilations_for`) and
    those of `NAT`."""
    return _build("base", True, kwargs, layer_scale=1e-5)


@register_model(arguments_of=_arguments_of)
def dinat_large(**kwargs: Any) -> NAT:
    """200.9 M parameters, 30.5 G MACs. Keyword arguments: `img_size` (see `dilations_for`; 384 for the
    checkpoints fine-tuned there) and those of `NAT`."""
    return _build("large", True, kwargs)
