"""Polyline path attention of the official PPMA code, and of copies of it, for `apply`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkernels.nn.polyline_path_attention import RasterRotation, attend
from vitkernels.patching.layers import Patched

_MODES = {"MambaAttentionChunkDouble": "criss_cross", "MambaAttentionAllDouble": "whole"}
_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "lepe", "path_embed")


class PolylinePath(Patched):
    """Polyline path attention through `ops.polyline_path_attention`: the mask is never made."""

    def forward(self: Any, x: torch.Tensor, rel_pos: Any = None) -> torch.Tensor:
        return attend(self, x, rel_pos, mode=_mode_of(self), backend=self.vitkernels_backend)

    @staticmethod
    def vitkernels_trial_inputs(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Inputs of the proof: a map that is not square, and the official code's sines and cosines."""
        dim, height, width = module.q_proj.in_features, 5, 7
        cos, sin = RasterRotation(dim // module.num_heads)(height, width).unbind(-1)
        rel_pos = tuple(table.repeat_interleave(2, -1).flatten(-2) for table in (sin, cos))
        return torch.randn(2, height, width, dim, generator=generator, dtype=torch.float32), rel_pos


def is_polyline(module: nn.Module) -> bool:
    """Whether it is one of the official classes, a subclass, ours, or a class of another name with its parameters."""
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & {*_MODES, "PolylinePathAttention"}:
        return True
    path_embed = module._modules.get("path_embed")
    return path_embed is not None and {"dt_bias", "A_log"} <= path_embed._parameters.keys()


def why_not_polyline(module: Any) -> str:
    """Why the operator cannot compute this layer, as far as its attributes tell."""
    if missing := [name for name in (*_PARTS, "num_heads", "scaling") if not hasattr(module, name)]:
        return f"has no attribute {', '.join(missing)}"
    if missing := [
        name for name in ("dt_linear", "dt_bias", "A_log") if not hasattr(module.path_embed, name)
    ]:
        return f"path_embed has no attribute {', '.join(missing)}"
    if type(module.q_proj) is not nn.Linear:
        return "q_proj is not a Linear"
    linear = module.path_embed.dt_linear
    if type(linear) is not nn.Linear or linear.bias is not None or linear.out_features != 2:
        return "path_embed.dt_linear is not a Linear to two decays without a bias"
    return "" if _mode_of(module) else "whether it is whole or criss-cross attention cannot be told"


def _mode_of(module: Any) -> str:
    """The layer's mode; empty where nothing tells it."""
    if (mode := getattr(module, "mode", "")) in _MODES.values():
        return str(mode)
    if (chunks := getattr(module.path_embed, "chunkwise_recurrent", None)) is not None:
        return "criss_cross" if chunks else "whole"
    return next((_MODES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _MODES), "")
