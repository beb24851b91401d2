"""ViTs with learnable token merging (Wang and Yang, TPAMI 2025).

Published are the results, with the FLOPs, at a compression of 0.8. Which blocks merge is not: the choice here is the
one that meets the FLOPs. ViT-S merges in its first block (3.7 G), ViT-B in its first and seventh (12.9 G). See
`nn.LTMBlock` for what else is inferred. Official weights do not exist; parameter names are timm's, the masks apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.core.checks import fail
from vitkernels.models.deit import Block, PatchEmbed
from vitkernels.models.registry import register_model
from vitkernels.nn.ltm_block import LTMBlock


class LTMViT(nn.Module):
    """A ViT of which some blocks merge tokens by a learned mask; the sequence stays short after them.

    Args:
        embed_dim, depth, num_heads: width, blocks and heads of a block; the hidden width is 4 * embed_dim.
        compression: share of the patch tokens that is left by each block that merges, rounded up.
        merge_blocks: which blocks merge.
        img_size, patch_size: of the image, (height, width) or one number.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the features of the class token.
        drop_path_rate: drop-path of the last block, rising linearly from 0 at the first.
        backend: of the merging, as in `ops.learnable_token_merge`.
    """

    classifiers = ("head",)
    head: nn.Module

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        compression: float = 0.8,
        merge_blocks: tuple[int, ...] = (0,),
        img_size: tuple[int, int] | int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("num_heads", f"a divisor of embed_dim={embed_dim}", num_heads)
        if any(type(index) is not int or not 0 <= index < depth for index in merge_blocks):
            fail("merge_blocks", f"blocks from 0 to {depth - 1}", merge_blocks)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = (height // patch_size, width // patch_size)
        tokens = grid[0] * grid[1]
        self.num_features = embed_dim
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, embed_dim))
        self.blocks = nn.ModuleList()
        carry = False
        for index, rate in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()):
            block: nn.Module
            if index in merge_blocks:
                block = LTMBlock(
                    embed_dim,
                    num_heads,
                    tokens=tokens,
                    compression=compression,
                    drop_path=rate,
                    carry=carry,
                    backend=backend,
                )
                carry = block.merged_tokens == tokens  # or the next mask is of another shape
                tokens = block.merged_tokens
            else:
                block = Block(embed_dim, num_heads, 4 * embed_dim, rate, nn.Linear)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.num_features, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(self.pos_embed).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are trained without weight decay."""
        return {"cls_token", "pos_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, 1 + tokens left, embed_dim]`, normalised. The class token's is what the loss takes."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        mask = None
        for block in self.blocks:
            if isinstance(block, LTMBlock):
                x, mask = block(x, mask)
            else:
                x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]`."""
        return self.head(self.forward_features(x)[:, 0])

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as this model takes them. A plain ViT's, or DeiT's, leave the masks as they are."""
        own = {name: tensor for name, tensor in self.state_dict().items() if ".mask." in name}
        return {**own, **state_dict}


@register_model
def ltm_vit_small(**kwargs: Any) -> LTMViT:
    """3.7 G multiply-adds, where ViT-S has 4.6. Keyword arguments: those of `LTMViT`."""
    return LTMViT(**{"embed_dim": 384, "num_heads": 6, "merge_blocks": (0,), **kwargs})


@register_model
def ltm_vit_base(**kwargs: Any) -> LTMViT:
    """12.9 G multiply-adds, where ViT-B has 17.6. Keyword arguments: those of `LTMViT`."""
    return LTMViT(**{"embed_dim": 768, "num_heads": 12, "merge_blocks": (0, 6), **kwargs})
