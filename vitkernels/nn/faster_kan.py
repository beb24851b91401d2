"""FasterKAN, the multi-layer KAN that MedViTV2 (Manzari et al., 2025) has in the place of its MLPs.

Layers, arguments, parameter names and initial values are those of the version inside MedViTV2, whose layers have
neither a base branch nor a bias; each layer is one call of `ops.kan_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from vitkernels import ops
from vitkernels.core.checks import check_positive_ints, fail
from vitkernels.nn.conv_norm import has_hooks


class ReflectionalSwitch(nn.Module):
    """Holds the grid of the basis functions ``1 - tanh((u - grid) / denominator) ** 2``.

    Parameters: `grid` [num_grids], which is in the state_dict but is not trained.
    """

    def __init__(self, grid_min: float, grid_max: float, num_grids: int, denominator: float) -> None:
        super().__init__()
        (num_grids,) = check_positive_ints("num_grids", num_grids, 1)
        if not denominator > 0:
            fail("denominator", "a number above 0, the width of the basis functions", denominator)
        self.grid = nn.Parameter(torch.linspace(grid_min, grid_max, num_grids), requires_grad=False)
        self.inv_denominator = 1 / denominator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., num_grids] basis values, in plain PyTorch; the layers above compute them inside the product."""
        return 1 - torch.tanh((x[..., None] - self.grid) * self.inv_denominator).square()


class FasterKANLayer(nn.Module):
    """Layer norm, basis functions and a bias-free linear map of all of them.

    Parameters: `layernorm.weight`, `layernorm.bias` [input_dim], `rbf.grid` [num_grids] and `spline_linear.weight`
    [output_dim, input_dim * num_grids], the grid fastest.

    Args:
        input_dim, output_dim: channels.
        grid_min, grid_max, num_grids: ends and number of the evenly spaced centres of the basis functions.
        exponent, base_activation, spline_weight_init_scale: accepted for the original's sake; as there, they change
            nothing.
        denominator: width of the basis functions.
        backend: as in `ops.kan_linear`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        num_grids: int = 8,
        exponent: float = 2,
        denominator: float = 0.33,
        base_activation: object = None,
        spline_weight_init_scale: float = 0.667,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(input_dim)
        self.rbf = ReflectionalSwitch(grid_min, grid_max, num_grids, denominator)
        self.spline_linear = nn.Linear(input_dim * num_grids, output_dim, bias=False)
        nn.init.xavier_uniform_(self.spline_linear.weight)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., input_dim] to [..., output_dim]."""
        parts = (
            (self.layernorm, nn.LayerNorm),
            (self.rbf, ReflectionalSwitch),
            (self.spline_linear, nn.Linear),
        )
        # Pruned, adapted or quantized, a layer is more than its weight.
        if any(has_hooks(part) or type(part).forward is not cls.forward for part, cls in parts):
            return self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))
        return ops.kan_linear(
            x,
            self.spline_linear.weight,
            self.layernorm.weight,
            self.layernorm.bias,
            self.rbf.grid,
            inv_denominator=self.rbf.inv_denominator,
            eps=self.layernorm.eps,
            backend=self.backend,
        )


class FasterKAN(nn.Module):
    """FasterKAN layers one after another; MedViTV2 has ``FasterKAN([C, 2 * C, C])``.

    Args:
        layers_hidden: channels before, between and after the layers.
        grid_min, grid_max, num_grids, exponent, denominator, base_activation, spline_weight_init_scale, backend: as
            in `FasterKANLayer`.
    """

    def __init__(
        self,
        layers_hidden: Sequence[int],
        grid_min: float = -2.0,
        grid_max: float = 2.0,
        num_grids: int = 8,
        exponent: float = 2,
        denominator: float = 0.33,
        base_activation: object = None,
        spline_weight_init_scale: float = 0.667,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        layers_hidden = list(layers_hidden)
        if not layers_hidden:
            fail("layers_hidden", "channels before, between and after the layers", layers_hidden)
        self.layers = nn.ModuleList(
            FasterKANLayer(
                input_dim,
                output_dim,
                grid_min,
                grid_max,
                num_grids,
                exponent,
                denominator,
                base_activation,
                spline_weight_init_scale,
                backend=backend,
            )
            for input_dim, output_dim in pairwise(layers_hidden)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
