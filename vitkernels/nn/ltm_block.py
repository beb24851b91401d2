"""Transformer blocks that merge their tokens by a learned mask.

What is published of learnable token merging (LTM) is its algebra, X~ = G^T Z between attention and MLP, the figure of
its block, the loss it trains the mask with (`InformationBottleneckLoss`), and its models' results. The mask module
and its normalisation are not: those here are this package's design, marked "inferred", and no official weights fit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import ops
from vitkernels.core.checks import check_positive_ints, fail
from vitkernels.nn.drop_path import DropPath


class MergingMask(nn.Module):
    """The mask module: from tokens `[B, N, dim]` and the mask before to logits `[B, N, P]`.

    Inferred: that it is a two-layer MLP with GELU over each token, as wide as a quarter of the tokens; that it adds
    a learned share of the last block's logits, where these are of the same shape (the figure hands the mask on from
    block to block); and that it needs no labels. The paper's step down the gradient of its loss needs them, so it has
    no counterpart here: the loss trains the MLP instead.

    Args:
        dim: width of the tokens.
        merged_tokens: P.
        hidden: width between the layers. Default: dim // 4.
        carry: whether it has that share of the mask before.
    """

    carry: nn.Parameter | None

    def __init__(self, dim: int, merged_tokens: int, hidden: int | None = None, carry: bool = True) -> None:
        super().__init__()
        (merged_tokens,) = check_positive_ints("merged_tokens", merged_tokens, 1)
        self.fc1 = nn.Linear(dim, hidden or max(dim // 4, 1))
        self.fc2 = nn.Linear(self.fc1.out_features, merged_tokens)
        # Of one dimension: FSDP's fully_shard takes no scalars.
        self.register_parameter("carry", nn.Parameter(torch.zeros(1)) if carry else None)

    def forward(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        logits = self.fc2(F.gelu(self.fc1(z)))
        if self.carry is not None and before is not None and before.shape == logits.shape:
            logits = logits + self.carry * before
        return logits


class SelfAttention(nn.Module):
    """Multi-head attention with timm's parameter names."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A GELU between two linear layers, with timm's parameter names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LTMBlock(nn.Module):
    """A pre-norm transformer block that merges its tokens between attention and MLP: x' = Z + MLP-of(G^T Z).

    ::

        Z  = x + attention(norm1(x))              [B, N, dim]
        G  = softmax over the N tokens of mask(Z, mask before), one column for each merged token
        X~ = G^T Z                                [B, P, dim], `ops.learnable_token_merge`
        y  = X~ + mlp(norm2(X~))

    With `restore` the sequence keeps its length: y = Z + R mlp(norm2(X~)), each token taking from the merged ones by
    a softmax over the same logits, for models that need their tokens in place.

    Published: that attention sees all tokens, the MLP the merged ones, and X~ = G^T Z. Inferred: the mask module (see
    `MergingMask`), softmax as the normalisation, that the class token stays out of the merging, and `restore`.

    Args:
        dim: width, a multiple of num_heads.
        num_heads: heads of the attention.
        tokens: N without the tokens that stay out; the block takes that many.
        compression: r; P = ceil(r N) tokens are left.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        drop_path: rate of skipping a branch while training.
        prefix_tokens: how many first tokens, such as the class token, stay out of the merging.
        restore: keep the length.
        carry: whether the mask takes a share of the one before. False for a block that is given none, or one of
            another shape: the share would be a parameter without a gradient, which DistributedDataParallel refuses.
        backend: of the merging, as in `ops.learnable_token_merge`.

    Shape: `[B, prefix_tokens + N, dim]` to `[B, prefix_tokens + P, dim]` (with `restore`, to the same), and the
    mask's logits `[B, N, P]`, which the next block takes.

    Raises:
        ValueError: bad values; in forward, another number of tokens.

    Paper: Efficient Visual Transformer by Learnable Token Merging (Wang and Yang, TPAMI 2025).

    Example:
        >>> block = LTMBlock(384, 6, tokens=196, compression=0.8)
        >>> y, mask = block(torch.randn(2, 197, 384))
        >>> y.shape, mask.shape
        (torch.Size([2, 158, 384]), torch.Size([2, 196, 157]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        tokens: int,
        compression: float = 0.8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        prefix_tokens: int = 1,
        restore: bool = False,
        carry: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            fail("dim", f"a multiple of num_heads = {num_heads}", dim)
        if not 0 < compression <= 1:
            fail("compression", "a share above 0, at most 1", compression)
        if type(tokens) is not int or tokens < 1:
            fail("tokens", "a positive int", tokens)
        if type(prefix_tokens) is not int or prefix_tokens < 0:
            fail("prefix_tokens", "an int of at least 0", prefix_tokens)
        self.tokens, self.prefix_tokens = tokens, prefix_tokens
        # A hair less, lest a share that gives a whole number rounds to one more: 0.55 * 20 is above 11.
        self.merged_tokens = max(1, math.ceil(compression * tokens - 1e-6))
        self.restore, self.backend = restore, backend
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, qkv_bias)
        self.mask = MergingMask(dim, self.merged_tokens, carry=carry)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            mask: the logits that the last such block returned, or None.
        """
        if x.ndim != 3 or x.shape[1] != self.prefix_tokens + self.tokens:
            fail("x", f"{self.prefix_tokens} + {self.tokens} tokens, [batch, tokens, dim]", x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        prefix, z = x.split((self.prefix_tokens, self.tokens), 1)
        logits = self.mask(z, mask)
        merged = self._merge(z, logits)
        if self.restore:
            prefix_change, change = self.mlp(self.norm2(torch.cat((prefix, merged), 1))).split(
                (self.prefix_tokens, self.merged_tokens), 1
            )
            change = torch.cat((prefix_change, self._merge(change, logits.mT)), 1)
            return x + self.drop_path(change), logits
        y = torch.cat((prefix, merged), 1)
        return y + self.drop_path(self.mlp(self.norm2(y))), logits

    def _merge(self, z: Tensor, logits: Tensor) -> Tensor:
        y = ops.learnable_token_merge(z, logits, normalize="softmax", backend=self.backend)
        return y.to(z.dtype)  # autocast's product is not the residual stream's dtype

    def extra_repr(self) -> str:
        kept = ", restored" if self.restore else ""
        return f"{self.prefix_tokens} + {self.tokens} tokens, {self.merged_tokens} merged{kept}"
