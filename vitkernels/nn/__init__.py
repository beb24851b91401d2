"""Modules whose arguments, parameter names and `state_dict` are those of the official code, where there is one."""

from vitkernels.nn.block_sparse_linear import BlockSparseLinear
from vitkernels.nn.cascaded_group_attention import (
    CascadedGroupAttention,
    LocalWindowAttention,
    resize_attention_biases,
)
from vitkernels.nn.conv_norm import ConvNorm, NormLinear
from vitkernels.nn.drop_path import DropPath
from vitkernels.nn.faster_kan import FasterKAN, FasterKANLayer
from vitkernels.nn.information_bottleneck import InformationBottleneckLoss
from vitkernels.nn.ltm_block import LTMBlock, MergingMask
from vitkernels.nn.neighborhood_attention import NeighborhoodAttention1D, NeighborhoodAttention2D
from vitkernels.nn.polyline_path_attention import PolylinePathAttention, RasterRotation
from vitkernels.nn.strip_attention import LIM, HybridPerceptionBlock, StripSelfAttention

__all__ = [
    "LIM",
    "BlockSparseLinear",
    "CascadedGroupAttention",
    "ConvNorm",
    "DropPath",
    "FasterKAN",
    "FasterKANLayer",
    "HybridPerceptionBlock",
    "InformationBottleneckLoss",
    "LTMBlock",
    "LocalWindowAttention",
    "MergingMask",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NormLinear",
    "PolylinePathAttention",
    "RasterRotation",
    "StripSelfAttention",
    "resize_attention_biases",
]
