"""Calls of kan_linear for its tests: inputs, plain PyTorch's results, and the house rule on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels.kan_linear import reference

NAMES = ("x", "weight", "ln_weight", "ln_bias", "grid")
PARAMS = (1 / 0.33, 1e-5)
Inputs = dict[str, torch.Tensor]


def inputs(
    rows: int,
    channels: int,
    outputs: int,
    grids: int = 8,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    spread: float = 1.0,
) -> Inputs:
    """`spread` scales the norm, so that u reaches beyond the grid."""
    small = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        "x": (2 * torch.randn(rows, channels, dtype=small) + 0.5).to(dtype),
        "weight": (torch.randn(outputs, channels * grids, dtype=small) / (channels * grids) ** 0.5).to(
            weight_dtype or dtype
        ),
        "ln_weight": spread * (1 + 0.2 * torch.randn(channels, dtype=small)),
        "ln_bias": 0.2 * torch.randn(channels, dtype=small),
        "grid": torch.linspace(-2, 2, grids, dtype=small) if grids > 1 else torch.zeros(1, dtype=small),
    }


def results(
    function: Callable[..., Any], tensors: Inputs, grad_y: torch.Tensor, params: tuple[float, float] = PARAMS
) -> dict[str, torch.Tensor]:
    """y and all gradients of function(*tensors, *params) -> y or (y, ...)."""
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    y = function(*leaves, *params)
    y = y[0] if isinstance(y, tuple) else y
    return {
        "y": y.detach(),
        **dict(zip(NAMES, torch.autograd.grad(y, leaves, grad_y.to(y.dtype)), strict=True)),
    }


def launch(
    module: Any,
    tensors: Inputs,
    grad_y: torch.Tensor,
    params: tuple[float, float] = PARAMS,
    /,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The same from a backend's module, which fills outputs that hold NaN."""
    x, weight = tensors["x"], tensors["weight"]
    accumulate = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = torch.full((*x.shape[:-1], weight.shape[0]), float("nan"), dtype=weight.dtype)
    mean, rstd = (torch.full(x.shape[:-1], float("nan"), dtype=accumulate) for _ in range(2))
    module.forward(y, mean, rstd, *tensors.values(), *params, **options)
    grads = {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}
    module.backward(
        *grads.values(),
        *(grad_y.to(y.dtype), None, None, y, mean, rstd),
        *tensors.values(),
        *params,
        **options,
    )
    return {"y": y, **grads}


def check(
    got: dict[str, torch.Tensor],
    tensors: Inputs,
    grad_y: torch.Tensor,
    params: tuple[float, float] = PARAMS,
    fixed: str | None = None,
) -> None:
    """Holds y and every gradient but that of `fixed` to the rule. Only those of the norm and the grid sum over rows
    beyond the products."""
    baseline = results(reference.forward, tensors, grad_y, params)
    wide = {name: t.double() for name, t in tensors.items()}
    truth = results(reference.forward, wide, grad_y.to(tensors["weight"].dtype).double(), params)
    rows = tensors["x"][..., 0].numel()
    reduced = {"ln_weight": rows, "ln_bias": rows, "grid": rows * tensors["x"].shape[-1]}
    assert got.keys() == truth.keys() - {fixed}
    for name in got:
        assert_close_to_truth(
            name if name == "y" else f"grad {name}",
            got[name],
            baseline[name],
            truth[name],
            factor=FORWARD if name == "y" else GRADIENT,
            reduced=reduced.get(name, 1),
            dtype=tensors["weight"].dtype,
        )


def check_rows_of_one_value(function: Callable[[Inputs], dict[str, torch.Tensor]]) -> None:
    """A row's mean is its value to the last bit, or 1 / sqrt(eps) multiplies what is left: y as of a row of zeros.

    So is the gradient of x, where there is one, but for the rounding of a variance that is none.
    """
    for channels in (7, 24, 100):
        tensors = {**inputs(3, channels, 5), "x": torch.zeros(3, channels)}
        want = function(tensors)
        for value in (0.1, 100.3, -10000.3):
            got = function({**tensors, "x": torch.full((3, channels), value)})
            assert torch.equal(got["y"], want["y"]), f"{channels} channels of {value}"
            if "x" in got:
                torch.testing.assert_close(got["x"], want["x"], rtol=1e-3, atol=1e-3)
