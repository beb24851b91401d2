"""Hands bipartite_match to csrc/bipartite_match: the CUDA kernels, or the CPU kernels for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vitkernels.core import native


def forward(
    rows: Tensor,
    starts: Tensor,
    members: Tensor,
    src: Tensor,
    dst: Tensor,
    metric: Tensor,
    r: int,
    class_token: bool,
    distill_token: bool,
    *,
    module: ModuleType | None = None,
    cuda: bool | None = None,
) -> None:
    """Fills the plan. `module` and `cuda` let the tests run the CUDA kernels on the host."""
    module = module or native.load()
    (tokens,) = native.dense(metric)  # named: a copy must outlive the call
    tensors = native.arguments(module, rows, starts, members, src, dst, tokens)
    params = (r, class_token, distill_token)
    workspace = None
    if metric.is_cuda if cuda is None else cuda:
        run = module.bipartite_match_forward_cuda
        size = module.bipartite_match_workspace_cuda(tensors[5], *params)
        workspace = torch.empty(size, dtype=torch.uint8, device=metric.device)
    else:
        run = module.bipartite_match_forward_cpu
    run(*native.place(metric), 0 if workspace is None else workspace.data_ptr(), *tensors, *params)


def backward(*_: Tensor | None) -> None:
    """Indices have no gradient; the public function detaches the metric."""
    raise RuntimeError("vitkernels: bipartite_match has no gradient. Pass it metric.detach().")
