"""Cascaded group attention, the token mixer of EfficientViT (Liu et al., CVPR 2023), in windows.

Each head sees its share of the channels plus the output of the head before it, so heads run one after
another. While the batch norms are in eval mode (frozen, in a module that trains) the whole mixer is one call of
`ops.cascaded_group_attention`; with the batch's statistics the convolutions run one by one, and
`ops.window_attention` computes each head's attention on views of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import check_positive_ints, check_tensor, fail
from vitkernels.nn.conv_norm import ConvNorm, has_hooks
from vitkernels.nn.folded_cascade import mix_folded
from vitkernels.nn.kept import KEPT, drop


def bias_side(attention_biases: torch.Tensor) -> int:
    """Side R of the window that a table `[heads, R * R]` of attention biases belongs to."""
    return math.isqrt(attention_biases.shape[-1])


def in_windows(x: torch.Tensor, side: int, mixer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Applies a mixer of `[windows, C, side, side]` maps to every window of a map of any size.

    The map is zero-padded right and bottom to whole windows; the mixer sees padded positions as tokens
    like any other, and they are cropped from the result, which has the memory format of the map.

    Args:
        x: `[B, C, H, W]`, NCHW or channels-last.
    """
    batch, _, height, width = x.shape
    if height == side and width == side:
        return mixer(x)
    pad_bottom, pad_right = -height % side, -width % side
    if pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    rows, columns = (height + pad_bottom) // side, (width + pad_right) // side
    # The copy into windows is the moment to make them channels-last, in which their convolutions are fastest.
    tiles = x.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # [B, C, rows, R, columns, R]
    tiles = tiles.permute(0, 2, 4, 3, 5, 1).flatten(0, 2)
    windows = mixer(tiles.permute(0, 3, 1, 2)).unflatten(0, (batch, rows, columns))
    if x.stride(1) == 1 and x.stride(3) != 1:  # channels-last
        y = windows.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    else:
        y = windows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return y[:, :, :height, :width] if pad_bottom or pad_right else y


def cascade(
    x: torch.Tensor,
    qkvs: Iterable[nn.Module],
    dws: Iterable[nn.Module],
    proj: nn.Module,
    attention_biases: torch.Tensor,
    *,
    key_dim: int,
    scale: float,
    backend: str | None = None,
) -> torch.Tensor:
    """The mixer on windows `[windows, C, R, R]`, from its parts; the convolutions may be folded or not."""
    side = bias_side(attention_biases)
    # One split rather than a slice per head: its backward is one cat instead of a zero-filled table a head.
    tables = attention_biases.split(1)
    chunks = x.chunk(len(tables), dim=1)
    features: list[torch.Tensor] = []
    for chunk, qkv, dw, table in zip(chunks, qkvs, dws, tables, strict=True):
        y = qkv(features[-1] + chunk if features else chunk)
        tokens = _tokens(y)
        out = ops.window_attention(
            _tokens(dw(y.narrow(1, 0, key_dim))),
            tokens.narrow(3, key_dim, key_dim),
            tokens.narrow(3, 2 * key_dim, y.shape[1] - 2 * key_dim),
            bias_table=table,
            bias_index="absolute",
            window=(side, side),
            scale=scale,
            backend=backend,
        )
        features.append(out.transpose(2, 3).reshape(-1, out.shape[3], side, side))
    return proj(torch.cat(features, dim=1))


def mix(module: Any, x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """The mixer of a module with the official attributes, on a map of any size: folded where that can be."""
    y = mix_folded(module, x, backend=backend)
    if y is not None:
        return y

    def one_by_one(windows: torch.Tensor) -> torch.Tensor:
        return cascade(
            windows,
            module.qkvs,
            module.dws,
            module.proj,
            module.attention_biases,
            key_dim=module.key_dim,
            scale=module.scale,
            backend=backend,
        )

    return in_windows(x, bias_side(module.attention_biases), one_by_one)


def mix_windows(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """A window partition around a mixer that cuts its map into windows itself; hooks on it still see windows."""
    if has_hooks(attn) or not isinstance(attn, CascadedGroupAttention):
        return in_windows(x, bias_side(attn.attention_biases), attn)
    return attn(x)


def _check_map(x: Any, channels: int) -> None:
    check_tensor("x", x, (None, channels, None, None), "[B, C, H, W]")


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """A map `[B, C, R, R]` as one head of tokens `[B, 1, R * R, C]`: a view in either memory format."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class CascadedGroupAttention(nn.Module):
    """Cascaded group attention: arguments, parameter names and `state_dict` of the official code.

    The checkpoint key `attention_bias_idxs` of the official code is accepted and dropped: the kernel
    computes the index. The weights folded with the batch norms are kept between calls, and made again as soon as a
    parameter or statistic changes by whatever means: on the CPU their contents tell. On a GPU autograd's version
    counters do, which miss an edit in place through `.data`; `train()`, `eval()`, `.to()` and the like always count.

    Args:
        dim: channels, a multiple of num_heads.
        key_dim: channels of a head's query and key.
        num_heads: number of heads.
        attn_ratio: value channels of a head, as a multiple of key_dim.
        resolution: side R of the window.
        kernels: size of the depthwise kernel on each head's query; the first num_heads count.

    Shape: `[B, C, H, W]` to the same. A map that is not R x R is mixed in windows, as by
    `LocalWindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        kernels: Sequence[int] = (5, 5, 5, 5),
    ) -> None:
        super().__init__()
        (num_heads,) = check_positive_ints("num_heads", num_heads, 1)
        (key_dim,) = check_positive_ints("key_dim", key_dim, 1)
        (resolution,) = check_positive_ints("resolution", resolution, 1)
        if dim % num_heads:
            fail("dim", f"a multiple of num_heads = {num_heads}", dim)
        if len(kernels) < num_heads:
            fail("kernels", f"one depthwise kernel size for each of {num_heads} heads", tuple(kernels))
        for size in check_positive_ints("kernels", tuple(kernels[:num_heads]), num_heads):
            if size % 2 == 0:
                fail("kernels", "odd sizes, whose convolutions keep the size of the map", tuple(kernels))
        self.dim = dim
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.key_dim = key_dim
        # A hair more, lest a ratio that divides to a whole width rounds to one less: 61 / 7 * 7 is below 61.
        self.d = int(attn_ratio * key_dim + 1e-6)
        self.attn_ratio = attn_ratio
        if num_heads > 1 and self.d != dim // num_heads:
            fail(
                "attn_ratio",
                f"dim / (key_dim * num_heads) = {dim / (key_dim * num_heads):g}, since a head's output is "
                "added to the next head's input",
                attn_ratio,
            )
        self.qkvs = nn.ModuleList(ConvNorm(dim // num_heads, 2 * key_dim + self.d) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            ConvNorm(key_dim, key_dim, size, padding=size // 2, groups=key_dim)
            for size in kernels[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(self.d * num_heads, dim, norm_weight=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution * resolution))

    @property
    def resolution(self) -> int:
        """Side of the window."""
        return bias_side(self.attention_biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_map(x, self.dim)
        return mix(self, x)

    def train(self, mode: bool = True) -> CascadedGroupAttention:
        drop(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> CascadedGroupAttention:
        drop(self)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != KEPT}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        state_dict.pop(prefix + "attention_bias_idxs", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LocalWindowAttention(nn.Module):
    """Cascaded group attention in non-overlapping windows, on maps of any size.

    The windows have the side R of the bias table; the map is zero-padded right and bottom to multiples
    of R, and padded positions take part as tokens (they are keys and enter batch statistics), as in the
    official code.

    Args:
        dim, key_dim, num_heads, attn_ratio, kernels: see `CascadedGroupAttention`.
        resolution: side of the map expected, which bounds the window.
        window_resolution: side of the window; R = min(window_resolution, resolution).

    Shape: `[B, C, H, W]` to the same.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
    ) -> None:
        super().__init__()
        if window_resolution < 1:
            fail("window_resolution", "a positive int", window_resolution)
        self.dim = dim
        self.num_heads = num_heads
        self.resolution = resolution
        self.window_resolution = window_resolution
        self.attn = CascadedGroupAttention(
            dim, key_dim, num_heads, attn_ratio, min(window_resolution, resolution), kernels
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_map(x, self.dim)
        return mix_windows(self.attn, x)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """x + self(x), in one kernel where the mixer is one and nobody hooked into it."""
        _check_map(x, self.dim)
        y = None
        if not (has_hooks(self) or has_hooks(self.attn)):
            backend = getattr(self.attn, "vitkernels_backend", None)  # given to a layer by `apply`
            y = mix_folded(self.attn, x, residual=True, backend=backend)
        return x + self(x) if y is None else y


def resize_attention_biases(table: torch.Tensor, resolution: int) -> torch.Tensor:
    """Resizes a table of attention biases `[heads, R * R]` to another window side by bicubic interpolation.

    Args:
        table: `[heads, R * R]`, any floating dtype.
        resolution: the new side.

    Returns:
        `[heads, resolution * resolution]` of table's dtype; table itself when the side is the same.

    Raises:
        TypeError: table is no tensor, or resolution no int.
        ValueError: a table that belongs to no square window, or a resolution below 1.
    """
    check_tensor("table", table, (None, None), "[heads, R * R]")
    (resolution,) = check_positive_ints("resolution", resolution, 1)
    side = bias_side(table)
    if side * side != table.shape[1]:
        fail("table", "shape [heads, R * R] with a whole R", table)
    if resolution == side:
        return table
    square = table.float().reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(resolution, resolution), mode="bicubic", align_corners=False)
    return resized.reshape(-1, resolution * resolution).to(table.dtype)
