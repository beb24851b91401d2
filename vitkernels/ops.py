"""The public operators."""

from vitkernels.kernels.cascaded_group_attention import cascaded_group_attention
from vitkernels.kernels.window_attention import window_attention

__all__ = ["cascaded_group_attention", "window_attention"]
