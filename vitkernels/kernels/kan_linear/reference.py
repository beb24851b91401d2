"""The FasterKAN layer in plain PyTorch: the contract that every kernel is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def basis(u: torch.Tensor, grid: torch.Tensor, inv_denominator: float) -> torch.Tensor:
    """phi [..., I * G] = 1 - tanh^2((u - g) * inv_denominator), the grid fastest."""
    t = torch.tanh((u[..., None] - grid) * inv_denominator)
    return (1 - t * t).flatten(-2)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    grid: torch.Tensor,
    inv_denominator: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [..., J] in weight's dtype, and the mean and rstd [...] of each row in fp32 (fp64 for fp64).

    Norm and basis are computed in fp32 whatever the inputs hold, the basis is rounded to weight's dtype.
    """
    accumulate = torch.float64 if x.dtype is torch.float64 else torch.float32
    x, ln_weight, ln_bias, grid = (t.to(accumulate) for t in (x, ln_weight, ln_bias, grid))
    u = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    y = F.linear(basis(u, grid, inv_denominator).to(weight.dtype), weight)
    with torch.no_grad():
        mean = x.mean(-1)
        rstd = torch.rsqrt((x - mean[..., None]).square().mean(-1) + eps)
    return y, mean, rstd
