"""The public operators."""

from vitkernels.kernels.window_attention import window_attention

__all__ = ["window_attention"]
