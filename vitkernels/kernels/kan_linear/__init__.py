"""The FasterKAN layer: layer norm, reflectional-switch basis and linear map in one."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_finite, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.kan_linear import reference

_HALF_DTYPES = (torch.float16, torch.bfloat16)


def kan_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    grid: torch.Tensor,
    *,
    inv_denominator: float = 1 / 0.33,
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """One Kolmogorov-Arnold layer of FasterKAN, as MedViTV2 has it: layer norm, basis functions, linear map.

    With G grid points, for every row of x::

        u      = layer_norm(x) * ln_weight + ln_bias                     over the last dimension, biased variance
        phi_cm = 1 - tanh((u_c - grid_m) * inv_denominator) ** 2
        y_j    = sum over c, m of weight[j, c * G + m] * phi_cm

    phi, G times as large as x, exists in registers and caches only, forward and backward. Norm, basis and sums are
    in float32 (float64 for float64); the GPU's tensor cores take phi rounded to weight's dtype. Deterministic,
    forward and backward.

    Under autocast weight is cast to autocast's dtype, which is then y's; x, ln_weight, ln_bias and grid stay as they
    are, because the original's layer norm and basis are float32 there.

    Args:
        x: [..., I], any strides; float16, bfloat16, float32 or float64.
        weight: [J, I * G], the grid fastest; in x's dtype, or float16 or bfloat16 for a float32 x.
        ln_weight: scale of the norm, [I], in x's dtype or float32.
        ln_bias: shift of the norm, as ln_weight.
        grid: centres of the basis functions, [G], any order and spacing, as ln_weight. The original never trains it,
            but its gradient is computed when asked for.
        inv_denominator: 1 / width of the basis functions.
        eps: of the layer norm.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        y, [..., J], in weight's dtype, contiguous.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, number or backend name; a forced backend that cannot run the call.

    Papers: KAN (Liu et al., 2024), MedViTV2 (Manzari et al., 2025).

    Example:
        >>> x = torch.randn(2, 49, 64)
        >>> grid = torch.linspace(-2, 2, 8)
        >>> weight = torch.randn(128, 64 * 8) / 512**0.5
        >>> kan_linear(x, weight, torch.ones(64), torch.zeros(64), grid).shape
        torch.Size([2, 49, 128])
    """
    return operator((x, weight, ln_weight, ln_bias, grid), (inv_denominator, eps), backend, False)[0]


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(name, "a number", value, kind=TypeError)
    if not 0 < value < math.inf:
        fail(name, "a finite number above 0", value)
    return check_finite(name, value)


def _check(
    x: Any, weight: Any, ln_weight: Any, ln_bias: Any, grid: Any, inv_denominator: Any, eps: Any
) -> tuple[Any, ...]:
    check_tensor("x", x, (..., None), "[..., channels]")
    channels = x.shape[-1]
    if channels == 0:
        fail("x", "a last dimension of at least 1", x)
    check_tensor("grid", grid, (None,), "[grid points]")
    if grid.shape[0] == 0:
        fail("grid", "at least 1 grid point", grid)
    check_tensor("weight", weight, (None, channels * grid.shape[0]), "[out_channels, channels * grid points]")
    if weight.shape[0] == 0:
        fail("weight", "a first dimension of at least 1", weight)
    check_tensor("ln_weight", ln_weight, (channels,), "[channels]")
    check_tensor("ln_bias", ln_bias, (channels,), "[channels]")
    inv_denominator, eps = _check_number("inv_denominator", inv_denominator), _check_number("eps", eps)
    others = (("weight", weight), ("ln_weight", ln_weight), ("ln_bias", ln_bias), ("grid", grid))
    for name, tensor in others:
        check_device(name, tensor, x.device, "x")

    (weight,) = autocast(weight)
    check_dtype("x", x, FLOAT_DTYPES, "Cast it with x.float().")
    mixed = (*_HALF_DTYPES, torch.float32) if x.dtype is torch.float32 else (x.dtype,)
    check_dtype("weight", weight, mixed, "Cast x to weight's dtype, or run under torch.autocast.")
    small = tuple({torch.float32, x.dtype})
    for name, tensor in others[1:]:
        check_dtype(name, tensor, small, f"Cast it with {name}.float().")
    return x, weight, ln_weight, ln_bias, grid, inv_denominator, eps


def _allocate_y(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _allocate_row(x: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return torch.empty(x.shape[:-1], dtype=dtype, device=x.device)


def _flops(x: Any, weight: Any, *_: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the product, or of the products of the wanted gradients; norm and basis count nothing."""
    product = 2 * math.prod(x[:-1]) * weight[0] * weight[1]
    if mask is None:
        return product
    grad_x, grad_weight, *grad_others = mask
    return product * ((grad_x or any(grad_others)) + grad_weight)


def _grid_limits(x: Any, weight: Any, ln_weight: Any, ln_bias: Any, grid: Any, *_: Any) -> list[str]:
    points = grid.shape[0]
    return [f"takes grids of up to 64 points, got {points}"] if points > 64 else []


_NATIVE = "vitkernels.kernels.kan_linear.native"

operator = Operator(
    "kan_linear",
    tensors=("x", "weight", "ln_weight", "ln_bias", "grid"),
    params="float inv_denominator, float eps",
    outputs=("y", "mean", "rstd"),
    check=_check,
    allocate=(_allocate_y, _allocate_row, _allocate_row),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_grid_limits, skips_by_products=True),
        Backend(
            "triton",
            "vitkernels.kernels.kan_linear.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_grid_limits,
        ),
        Backend("cpu", _NATIVE, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
