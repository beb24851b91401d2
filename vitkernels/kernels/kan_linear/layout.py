"""What every backend of kan_linear takes: matrices with dense rows, small vectors, all but the
CUDA kernels in the accumulate type."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(tensor: Tensor) -> Tensor:
    """[..., columns] as a matrix [rows, columns] with dense rows; a copy only where no view is one."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def vector(tensor: Tensor, like: Tensor) -> Tensor:
    """A small parameter, dense, in the type that sums over `like` have."""
    return tensor.to(accumulate_dtype(like)).contiguous()


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class Results:
    """Gradients as kernels can write them, copied afterwards where those are not the tensors asked for."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def matrix(self, tensor: Tensor | None) -> Tensor | None:
        """Where to write a gradient of the shape [..., columns]."""
        if tensor is None:
            return None
        if tensor.is_contiguous():
            return tensor.view(-1, tensor.shape[-1])
        return self._instead(tensor, tensor.dtype).view(-1, tensor.shape[-1])

    def vector(self, tensor: Tensor | None, like: Tensor) -> Tensor | None:
        """Where to write the gradient of a small parameter, in the accumulate type."""
        if tensor is None or (tensor.is_contiguous() and tensor.dtype is accumulate_dtype(like)):
            return tensor
        return self._instead(tensor, accumulate_dtype(like))

    def _instead(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        place = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        self._copies.append((tensor, place))
        return place

    def deliver(self) -> None:
        for tensor, place in self._copies:
            tensor.copy_(place)
