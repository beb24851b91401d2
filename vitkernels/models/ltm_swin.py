"""A Swin Transformer with learnable token merging (Wang and Yang, TPAMI 2025).

Published is its result, 3.8 G multiply-adds at a compression of 0.8, where Swin-T has 4.5; how merging meets windows
is not. Inferred here, as what meets those FLOPs: every block merges the tokens of each window for its MLP, by a mask
of the window's own, and hands the MLP's result back to all of them, so that the map keeps its form. A window of 7 x 7
merges into 6 x 6, its sides by the root of the compression, rounded down (rounded up nothing would merge). The mask
module is `nn.MergingMask`, half as wide as elsewhere; as windows shift, no block takes the mask of the one before.

No official weights exist; parameter names are timm's, the masks apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.core.checks import fail
from vitkernels.models.registry import register_model
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.ltm_block import MergingMask, Mlp

WINDOW = 7


def windows_of(x: Tensor) -> Tensor:
    """A map `[B, H, W, C]` to its windows `[B * windows, 49, C]`."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.transpose(2, 3).reshape(-1, WINDOW * WINDOW, channels)


def map_of(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `windows_of`."""
    x = windows.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


class ShiftedWindowAttention(nn.Module):
    """Swin's attention within windows of 7 x 7, on a map `[B, H, W, dim]` whose sides they divide.

    For maps of `sides` the regions that shifted windows are masked by are made once; others make them in each call.
    """

    position_index: Tensor
    regions: Tensor

    def __init__(
        self, dim: int, num_heads: int, shift: int, sides: tuple[int, int], backend: str | None
    ) -> None:
        super().__init__()
        self.num_heads, self.shift, self.sides, self.backend = num_heads, shift, sides, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, num_heads))
        if shift:
            self._make_constants()

    def _make_constants(self) -> None:
        device = self.relative_position_bias_table.device
        position = torch.arange(WINDOW * WINDOW, device=device)
        row, column = position // WINDOW, position % WINDOW
        dy, dx = row[:, None] - row, column[:, None] - column
        index = (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1
        self.register_buffer("position_index", index, persistent=False)
        self.register_buffer("regions", self._regions(*self.sides).to(device), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.shift:  # built on the meta device, they have no values, and no file brings them
            self._make_constants()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        q, k, v = self.qkv(windows_of(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.shift:
            announced = (height, width) == self.sides
            regions = self.regions if announced else self._regions(height, width).to(x.device)
            out = self._masked(q, k, v, regions)
        else:
            table = self.relative_position_bias_table.mT
            out = ops.window_attention(
                q, k, v, bias_table=table, bias_index="signed", window=WINDOW, backend=self.backend
            )
        x = map_of(self.proj(out.transpose(1, 2).flatten(2)), height, width)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x

    def _regions(self, height: int, width: int) -> Tensor:
        """`[windows, 49]`: the region of the unshifted map that a token lies in.

        Numbers, not the mask that follows from them: PyTorch averages buffers by subtraction, which bools have not.
        """
        sides = [
            torch.arange(side).ge(side - WINDOW).int() + torch.arange(side).ge(side - self.shift).int()
            for side in (height, width)
        ]
        return windows_of((3 * sides[0][:, None] + sides[1])[None, :, :, None])[..., 0]

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, regions: Tensor) -> Tensor:
        bias = self.relative_position_bias_table[self.position_index].permute(2, 0, 1).to(q.dtype)
        windows = len(regions)
        apart = (regions[:, :, None] != regions[:, None, :]).unsqueeze(1)
        q, k, v = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (q, k, v))
        mask = bias.masked_fill(apart, -torch.inf).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.unflatten(1, (windows, -1)).flatten(0, 1)


class LTMSwinBlock(nn.Module):
    """Attention within windows, then an MLP on each window's merged tokens.

    ::

        Z = x + attention(norm1(x))                  [B, H, W, dim]
        for the 49 tokens z of each window, and their mask's logits `[49, P]`:
        y = z + R mlp(norm2(G^T z)), G = softmax of the logits over the tokens, R = over the merged tokens
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shift: int,
        sides: tuple[int, int],
        merged_tokens: int,
        drop_path: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ShiftedWindowAttention(dim, num_heads, shift, sides, backend)
        self.mask = MergingMask(dim, merged_tokens, dim // 8, carry=False) if merged_tokens else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.mask is None:
            return x + self.drop_path(self.mlp(self.norm2(x)))
        z = windows_of(x)
        logits = self.mask(z)
        change = self._merge(self.mlp(self.norm2(self._merge(z, logits))), logits.mT)
        return x + self.drop_path(map_of(change, *x.shape[1:3]))

    def _merge(self, z: Tensor, logits: Tensor) -> Tensor:
        y = ops.learnable_token_merge(z, logits, normalize="softmax", backend=self.backend)
        return y.to(z.dtype)  # autocast's product is not the residual stream's dtype


class PatchMerging(nn.Module):
    """Four tokens of 2 x 2 to one of twice the width: `[B, H, W, dim]` to `[B, H / 2, W / 2, 2 dim]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Rows lie side by side within a column of the four, as in the official weights.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    def __init__(self, downsample: nn.Module, blocks: list[LTMSwinBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ClassifierHead(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))


class LTMSwin(nn.Module):
    """A Swin Transformer whose blocks merge the tokens of each window before the MLP.

    Args:
        embed_dim: width of the first stage; each later one is twice as wide.
        depths, num_heads: blocks and heads of each stage.
        compression: share of a window's tokens that is left, its sides rounded down; 1 merges nothing.
        img_size: sides of the images that the model will see, (height, width) or one number, multiples of 32 * 7.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 returns the mean of the features.
        drop_path_rate: drop-path of the last block, rising linearly from 0 at the first.
        backend: of the attention and the merging.
    """

    classifiers = ("head.fc",)

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        *,
        compression: float = 0.8,
        img_size: tuple[int, int] | int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1 or int(WINDOW * compression**0.5) < 1:
            fail("compression", f"a share above {WINDOW**-2:.3f}, at most 1", compression)
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.multiple = 4 * WINDOW * 2 ** (len(depths) - 1)
        if any(side < 1 or side % self.multiple for side in sides):
            fail("img_size", f"multiples of {self.multiple}", img_size)
        merged = 0 if compression == 1 else int(WINDOW * compression**0.5) ** 2
        self.num_features = embed_dim << (len(depths) - 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim << i
            height, width = sides[0] // (4 << i), sides[1] // (4 << i)
            shift = (
                0 if min(height, width) <= WINDOW else WINDOW // 2
            )  # one window along a side: nowhere to shift
            blocks = [
                LTMSwinBlock(dim, heads, j % 2 * shift, (height, width), merged, next(rates), backend)
                for j in range(depth)
            ]
            self.layers.append(Stage(PatchMerging(dim // 2) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(self.num_features)
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShiftedWindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one of that width; 0 removes it."""
        self.num_classes = num_classes
        head = ClassifierHead(self.num_features, num_classes)
        if isinstance(head.fc, nn.Linear):
            nn.init.trunc_normal_(head.fc.weight, std=0.02)
            nn.init.zeros_(head.fc.bias)
        self.head = head.to(self.norm.weight).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are trained without weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, H / 32, W / 32, features]`, normalised."""
        if x.ndim != 4 or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            fail("x", f"images [B, C, H, W] with sides that are multiples of {self.multiple}", x)
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]`."""
        return self.head(self.forward_features(x))

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as this model takes them. A plain Swin's leave the masks as they are."""
        own = {name: tensor for name, tensor in self.state_dict().items() if ".mask." in name}
        kept = {name: t for name, t in state_dict.items() if not name.endswith(("_index", "attn_mask"))}
        return {**own, **kept}


@register_model
def ltm_swin_tiny(**kwargs: Any) -> LTMSwin:
    """3.9 G multiply-adds, where Swin-T has 4.5; published 3.8. Keyword arguments: those of `LTMSwin`."""
    return LTMSwin(**kwargs)
