"""The block-sparse linear map in plain PyTorch, by the dense matrix: the contract of every kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor


def forward(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    out_features: int,
    in_features: int,
    activation: str,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., O] (transposed: [..., I]), and what goes into a GELU, in y's shape; otherwise [..., 0].

    Transposed, y = activation(x W + bias) for an x [..., O].
    """
    weight = BlockSparseTensor.wrap(values, index, (out_features, in_features)).to_dense()
    before = F.linear(x, weight.T if transposed else weight, bias)
    if activation == "gelu":
        return F.gelu(before), before
    return F.relu(before) if activation == "relu" else before, x.new_empty((*x.shape[:-1], 0))
