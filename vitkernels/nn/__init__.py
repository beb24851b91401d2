"""Modules whose arguments, parameter names and `state_dict` are those of the official code."""

from vitkernels.nn.cascaded_group_attention import (
    CascadedGroupAttention,
    LocalWindowAttention,
    resize_attention_biases,
)
from vitkernels.nn.conv_norm import ConvNorm, NormLinear

__all__ = [
    "CascadedGroupAttention",
    "ConvNorm",
    "LocalWindowAttention",
    "NormLinear",
    "resize_attention_biases",
]
