"""The public operators."""

from vitkernels.kernels.neighborhood_attention import neighborhood_attention
from vitkernels.kernels.window_attention import window_attention

__all__ = ["neighborhood_attention", "window_attention"]
