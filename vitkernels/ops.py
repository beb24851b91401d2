"""The public operators."""

from vitkernels.kernels.kan_linear import kan_linear
from vitkernels.kernels.window_attention import window_attention

__all__ = ["kan_linear", "window_attention"]
