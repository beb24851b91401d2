"""DeiT (Touvron et al., 2021) with block-sparse linear layers, as LPViT (Xu et al., ECCV 2024) prunes it.

Parameter names are timm's, those of its `deit_*_patch16_224` and `deit_*_distilled_patch16_224`; a block-sparse layer
has `values`, `crow_indices` and `col_indices` in the place of `weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.block_sparse_linear import BlockSparseLinear
from vitkernels.nn.drop_path import DropPath
from vitkernels.sparsity import sparsify

_Linear = Callable[[int, int], nn.Module]


class PatchEmbed(nn.Module):
    """An image `[B, C, H, W]`, of `grid` patches, to tokens `[B, H W / patch^2, dim]`."""

    def __init__(self, in_chans: int, dim: int, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape[-2] // self.patch, x.shape[-1] // self.patch) != self.grid:
            height, width = self.grid[0] * self.patch, self.grid[1] * self.patch
            fail(
                "x",
                f"images of {height} x {width}, the size that the network was built for",
                x,
                f"Build it for others with create_model(..., img_size={(x.shape[-2], x.shape[-1])}).",
            )
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, linear: _Linear) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The GELU runs inside the kernel of a block-sparse fc1."""

    def __init__(self, dim: int, hidden: int, linear: _Linear) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1 = self.fc1
        return self.fc2(fc1(x, "gelu") if isinstance(fc1, BlockSparseLinear) else F.gelu(fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path: float, linear: _Linear) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, linear)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden, linear)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(nn.Module):
    """A DeiT whose layers of the blocks, `qkv`, `proj`, `fc1` and `fc2`, are block-sparse.

    Args:
        embed_dim, depth, num_heads: width, blocks and heads of a block; the hidden width is 4 * embed_dim.
        density: share of the blocks' weights that is stored; 1 makes dense layers. A fresh model's pattern is drawn at
            random. One from a dense file keeps the weights of the largest magnitude: to choose by their effect on
            data, build it with density=1 and call `vitkernels.sparsify`. A block-sparse file brings its own pattern.
        block_shape: of the stored blocks, (bh, bw) or one number.
        img_size, patch_size: of the image, (height, width) or one number.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the features of the class token.
        distilled: with the distillation token and its classifier `head_dist`. In train mode the model returns the
            pair of logits, in eval mode their mean.
        drop_path_rate: drop-path of the last block, rising linearly from 0 at the first.
        backend: of the block-sparse layers, as in `ops.block_sparse_linear`.
    """

    classifiers = ("head", "head_dist")
    head: nn.Module
    head_dist: nn.Module

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        density: float = 0.5,
        block_shape: tuple[int, int] | int = 32,
        img_size: tuple[int, int] | int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        distilled: bool = False,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("num_heads", f"a divisor of embed_dim={embed_dim}", num_heads)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = (height // patch_size, width // patch_size)
        self.density, self.block_shape, self.backend = density, block_shape, backend
        self.num_features, self.distilled = embed_dim, distilled
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, self.grid)
        tokens = self.grid[0] * self.grid[1] + 1 + distilled
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, 4 * embed_dim, rate, self._linear) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def _linear(self, inputs: int, outputs: int) -> nn.Module:
        if self.density == 1:
            return _initialise(nn.Linear(inputs, outputs))
        layer = BlockSparseLinear(
            inputs, outputs, self.block_shape, density=self.density, backend=self.backend
        )
        nn.init.trunc_normal_(layer.values, std=0.02 * max(layer.density, 1e-3) ** -0.5)
        layer.clear_padding()
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        return layer

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifiers by fresh ones of that width; 0 removes them."""
        self.num_classes = num_classes
        for name in self.classifiers[: 1 + self.distilled]:
            head: nn.Module = nn.Identity()
            if num_classes:
                head = _initialise(nn.Linear(self.num_features, num_classes))
            setattr(self, name, head.to(self.pos_embed).train(self.training))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are trained without weight decay."""
        return {
            name for name, _ in self.named_parameters() if name in ("cls_token", "dist_token", "pos_embed")
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, 1 + distilled + patches, embed_dim]`, normalised."""
        x = self.patch_embed(x)
        first = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in first), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, num_classes]`; of a distilled model in train mode both classifiers'."""
        x = self.forward_features(x)
        if not self.distilled:
            return self.head(x[:, 0])
        logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a dense or a block-sparse DeiT, as this model takes them.

        Of a block-sparse file this model takes over which layers are block-sparse, and their patterns; a dense one
        is pruned to the model's density by magnitude. Position embeddings of another image size are resized.
        """
        loaded = dict(state_dict)
        position = loaded.get("pos_embed")
        if position is not None and position.shape[1] != self.pos_embed.shape[1]:
            loaded["pos_embed"] = _resized(position, self.grid, 1 + self.distilled)
        modules = {
            name: module
            for name, module in self.named_modules()
            if name.startswith("blocks.") and isinstance(module, (nn.Linear, BlockSparseLinear))
        }
        sparse = {name: f"{name}.crow_indices" in loaded for name in modules}
        if not any(sparse.values()):
            self._prune(loaded, modules)
            return loaded
        for name, module in modules.items():
            if sparse[name] and isinstance(module, nn.Linear):
                self.set_submodule(name, BlockSparseLinear.from_linear(module, self.block_shape, density=0))
            elif not sparse[name] and isinstance(module, BlockSparseLinear):
                self.set_submodule(name, module.to_linear())
            if sparse[name]:
                adopt(self.get_submodule(name), loaded, name)
        return loaded

    def _prune(self, loaded: dict[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        """Makes the block-sparse state_dict of a dense one: this model's dense layers get the file's weights first."""
        dense = {
            name: module.to_linear()
            for name, module in modules.items()
            if isinstance(module, BlockSparseLinear)
        }
        shapes = {name: getattr(loaded.get(f"{name}.weight"), "shape", None) for name in dense}
        if not dense or any(linear.weight.shape != shapes[name] for name, linear in dense.items()):
            return  # another model's file, which load_state_dict lists the differences of
        for name, linear in dense.items():
            linear.weight.data.copy_(loaded[f"{name}.weight"])
            self.set_submodule(name, linear)
        sparsify(
            self,
            self.block_shape,
            density=self.density,
            criterion="magnitude",
            include=list(dense),
            backend=self.backend,
            verbose=False,
        )
        for name in dense:
            module = self.get_submodule(name)
            if isinstance(module, BlockSparseLinear):
                del loaded[f"{name}.weight"]
                for part in ("values", "crow_indices", "col_indices"):
                    loaded[f"{name}.{part}"] = (
                        module.get_buffer(part) if part != "values" else module.values.data
                    )


def adopt(module: nn.Module, loaded: Mapping[str, Tensor], name: str) -> None:
    """Gives a block-sparse layer the sizes that its entries in a file have; what is wrong, its loading says."""
    values = loaded.get(f"{name}.values")
    if isinstance(module, BlockSparseLinear) and values is not None and values.shape != module.values.shape:
        module.values.data = module.values.data.new_empty(values.shape)
        for part in ("crow_indices", "col_indices"):
            tensor = loaded.get(f"{name}.{part}", module.get_buffer(part))
            module.register_buffer(
                part, torch.zeros(tensor.shape, dtype=torch.int32, device=module.values.device)
            )


def _initialise(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _resized(position: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Position embeddings `[1, prefix + side^2, dim]` for another grid of patches, bicubic as timm's."""
    side = round((position.shape[1] - prefix) ** 0.5)
    if side * side != position.shape[1] - prefix:
        return position
    patches = position[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:, :prefix], patches.flatten(2).mT.to(position)], 1)


def _arguments_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    depth = 1 + max((int(m[1]) for key in state_dict if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    return {"distilled": "dist_token" in state_dict, **({"depth": depth} if depth else {})}


@register_model(arguments_of=_arguments_of)
def deit_small_bsr(**kwargs: Any) -> DeiT:
    """22.1 M parameters if dense; half of the weights in its blocks are stored. Keyword arguments: those of `DeiT`."""
    return DeiT(**{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model(arguments_of=_arguments_of)
def deit_base_bsr(**kwargs: Any) -> DeiT:
    """86.6 M parameters if dense; half of the weights in its blocks are stored. Keyword arguments: those of `DeiT`."""
    return DeiT(**{"embed_dim": 768, "num_heads": 12, **kwargs})
