"""The public operators."""

from vitkernels.kernels.attention_with_size import attention_with_size
from vitkernels.kernels.bipartite_match import bipartite_match
from vitkernels.kernels.block_sparse_linear import block_sparse_linear, block_sparse_matmul
from vitkernels.kernels.cascaded_group_attention import cascaded_group_attention
from vitkernels.kernels.kan_linear import kan_linear
from vitkernels.kernels.learnable_token_merge import learnable_token_merge
from vitkernels.kernels.neighborhood_attention import neighborhood_attention
from vitkernels.kernels.polyline_path_attention import polyline_path_attention
from vitkernels.kernels.polyline_path_mask import polyline_path_mask
from vitkernels.kernels.polyline_path_scan import polyline_path_scan
from vitkernels.kernels.residual_ffn import residual_ffn
from vitkernels.kernels.strip_attention import strip_attention
from vitkernels.kernels.token_merge import token_merge
from vitkernels.kernels.token_unmerge import token_unmerge
from vitkernels.kernels.window_attention import window_attention

__all__ = [
    "attention_with_size",
    "bipartite_match",
    "block_sparse_linear",
    "block_sparse_matmul",
    "cascaded_group_attention",
    "kan_linear",
    "learnable_token_merge",
    "neighborhood_attention",
    "polyline_path_attention",
    "polyline_path_mask",
    "polyline_path_scan",
    "residual_ffn",
    "strip_attention",
    "token_merge",
    "token_unmerge",
    "window_attention",
]
