"""Polyline path masked attention as a layer: the token mixer of PPMA (Zhao et al., NeurIPS 2025).

Parameters and `state_dict` are those of the official code. The layer computes what the released models were trained
with: the mask is added to the logits before the softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import fail
from vitkernels.nn.conv_norm import has_hooks
from vitkernels.nn.depthwise_conv import DepthwiseConv
from vitkernels.nn.kept import KEPT, Kept, drop, keep, transformed

_MODES = ("whole", "criss_cross")


class _Table(Kept):
    def __init__(self, table: torch.Tensor) -> None:
        self.table = table


class RasterRotation(nn.Module):
    """The rotary position embedding of a stage: one angle for each pair of channels, times the raster index.

    A token's position is `row * width + column`, so the table follows from the map's size; it is kept until the
    size changes. It is computed in float64 and the angles stay in float32 when the model becomes half: at position
    4000 a rounded angle would be whole turns off.

    Args:
        head_dim: channels of a head, even.

    Attributes:
        angle: `[head_dim]`, every angle twice, as in the official checkpoints.
    """

    angle: torch.Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("angle", _angles(head_dim))

    def forward(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Cosine and sine for each token and pair of channels, `[height, width, 1, head_dim / 2, 2]`.

        Args:
            dtype: float32 or float64.
        """
        if transformed():
            return _rotation_table(self.angle, height, width, dtype)
        kept = keep(
            self,
            (self.angle,),
            (height, width, dtype),
            lambda: _Table(_rotation_table(self.angle, height, width, dtype)),
        )
        return kept.table

    def _apply(self, *args: Any, **kwargs: Any) -> RasterRotation:
        drop(self)
        angle = self.angle
        super()._apply(*args, **kwargs)
        if self.angle.dtype in (torch.float16, torch.bfloat16):
            self.angle = angle.to(self.angle.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != KEPT}


def _angles(head_dim: int) -> torch.Tensor:
    if head_dim < 2 or head_dim % 2:
        fail("head_dim", "an even number: channels are rotated in pairs", head_dim)
    angle = 10000 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float32)
    return angle.repeat_interleave(2)


def _rotation_table(angle: torch.Tensor, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    position = torch.arange(height * width, device=angle.device, dtype=torch.float64)
    phase = position[:, None] * angle[::2].double()
    return torch.stack((phase.cos(), phase.sin()), -1).to(dtype).view(height, width, 1, -1, 2)


def rotation_of(
    rel_pos: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None, x: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """The table of a map `[B, H, W, C]`: given, made from the official (sin, cos) `[H, W, head_dim]`, or new."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if rel_pos is None:
        return _rotation_table(_angles(head_dim).to(x.device), x.shape[1], x.shape[2], dtype)
    if isinstance(rel_pos, torch.Tensor):
        table = rel_pos
    else:
        sin, cos = (part[..., None, ::2] for part in rel_pos)
        table = torch.stack((cos, sin), -1).to(dtype)
    if table.shape != (*x.shape[1:3], 1, head_dim // 2, 2):  # a row of angles would broadcast over all
        wanted = f"the rotation of a map {x.shape[1]} x {x.shape[2]} by heads of {head_dim} channels"
        fail("rel_pos", wanted, table, "RasterRotation(head_dim)(height, width) makes one.")
    return table


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighboring channels of `[B, H, W, heads, head_dim]`, in the table's dtype, back to x's."""
    pairs = x.to(table.dtype).contiguous().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses this, and does not fuse complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:  # one pass over the tokens
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


class PathEmbed(nn.Module):
    """The parameters of the decays: from each token's share of a head to two steps, one rate and bias a head."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dt_linear = nn.Linear(embed_dim // num_heads, 2, bias=False)
        low, high = math.log(0.001), math.log(0.1)
        step = (low + (high - low) * torch.rand(num_heads)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # softplus(dt_bias) = step
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 1.1).log())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of the decays along rows and along columns, `[B, H, W, num_heads]` each, of `[B, H, W, C]`."""
        return log_decays(self, x, self.num_heads)


def log_decays(path_embed: Any, x: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `PathEmbed` computes, from a module with its parameters; in float32 at least."""
    width, linear = x.shape[2], path_embed.dt_linear
    heads = x.unflatten(-1, (num_heads, -1))
    # An adapted or a quantized layer is more than its weight.
    if has_hooks(linear) or type(linear).forward is not nn.Linear.forward:
        steps = linear(heads).movedim(-1, 0)
    else:  # each decay in a piece, which costs less than both for every token, and their views
        steps = (linear.weight @ heads.flatten(0, 3).t()).unflatten(-1, heads.shape[:-1])
    steps = steps if steps.dtype is torch.float64 else steps.float()

    # Over a row at a time: broadcasting over the few heads alone takes as long as the exponentials.
    def rowwise(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(steps.dtype).expand(width, num_heads).flatten()

    rows = F.softplus(steps.flatten(-2) + rowwise(path_embed.dt_bias)) * -rowwise(path_embed.A_log).exp()
    log_decay_w, log_decay_h = rows.unflatten(-1, (width, num_heads)).unbind(0)
    return log_decay_w, log_decay_h


class PolylinePathAttention(nn.Module):
    """Attention with a mask of learned, content-dependent decays along the paths between two tokens of a map.

    Args:
        embed_dim: channels, a multiple of num_heads; the channels of a head must be an even number.
        num_heads: number of heads.
        mode: "whole", every token attends to every token, or "criss_cross", along rows and columns. The official
            code has a class for each.

    Shape: `[B, H, W, embed_dim]`, channels last, to the same.

    Raises:
        ValueError: bad values; in forward, an input or rel_pos of another shape.

    Paper: Polyline Path Masked Attention for Vision Transformer (Zhao et al., NeurIPS 2025).
    """

    def __init__(self, embed_dim: int, num_heads: int, *, mode: str = "whole") -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            fail("embed_dim", f"a multiple of num_heads = {num_heads}", embed_dim)
        if embed_dim // num_heads % 2:
            fail("embed_dim", "an even number of channels a head: they are rotated in pairs", embed_dim)
        if mode not in _MODES:
            fail("mode", "'whole' or 'criss_cross'", mode)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.mode = mode
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.lepe = DepthwiseConv(embed_dim, 5)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.path_embed = PathEmbed(embed_dim, num_heads)
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_normal_(linear.weight, gain=2**-2.5)
        nn.init.xavier_normal_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: torch.Tensor, rel_pos: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        Args:
            rel_pos: what `RasterRotation` returns for the map, shared by the layers of a stage, or the official
                code's pair (sin, cos), `[H, W, head_dim]` each. Default: made anew in every call.
        """
        if x.ndim != 4 or x.shape[-1] != self.embed_dim:
            fail("x", f"shape [batch, H, W, {self.embed_dim}], channels last", x)
        return attend(self, x, rel_pos, mode=self.mode)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, mode={self.mode!r}"


def attend(
    module: Any,
    x: torch.Tensor,
    rel_pos: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    *,
    mode: str,
    backend: str | None = None,
) -> torch.Tensor:
    """The layer, from a module with the official attributes."""
    q, k, values = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    local = module.lepe(values)
    q, k, v = (tokens.unflatten(-1, (module.num_heads, -1)) for tokens in (q, k, values))
    table = rotation_of(rel_pos, x, q.shape[-1])
    log_decay_w, log_decay_h = log_decays(module.path_embed, x, module.num_heads)
    # The official code scales k, bias included, before it rotates: rotations are linear, so the logits may be.
    out: Any = ops.polyline_path_attention(
        rotate(q, table),
        rotate(k, table),
        v,
        log_decay_w,
        log_decay_h,
        mode=mode,
        scale=module.scaling,
        backend=backend,
    )
    return module.out_proj(out.flatten(-2) + local)
