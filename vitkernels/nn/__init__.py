"""Modules whose arguments, parameter names and `state_dict` are those of the official code."""

from vitkernels.nn.cascaded_group_attention import (
    CascadedGroupAttention,
    LocalWindowAttention,
    resize_attention_biases,
)
from vitkernels.nn.conv_norm import ConvNorm, NormLinear
from vitkernels.nn.faster_kan import FasterKAN, FasterKANLayer

__all__ = [
    "CascadedGroupAttention",
    "ConvNorm",
    "FasterKAN",
    "FasterKANLayer",
    "LocalWindowAttention",
    "NormLinear",
    "resize_attention_biases",
]
