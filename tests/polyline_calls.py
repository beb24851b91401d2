"""Calls of polyline_path_mask and polyline_path_scan for their tests: inputs, plain PyTorch's results, explicit sums
over paths, and the house rule on all results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from guarded import drawn
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels import polyline_path_mask, polyline_path_scan

DECAYS = ("log_decay_w", "log_decay_h")
Inputs = dict[str, torch.Tensor]
GRIDS = [(1, 1), (1, 9), (9, 1), (3, 4), (7, 7), (4, 17)]
LARGER = [(14, 14), (25, 42), (5, 67)]


def decays(
    batch: int, height: int, width: int, heads: int, dtype: torch.dtype = torch.float32, rate: float = 0.3
) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    return {name: (-rate * torch.rand(batch, height, width, heads, dtype=wide)).to(dtype) for name in DECAYS}


def scan_inputs(
    batch: int,
    height: int,
    width: int,
    heads: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    decay_dtype: torch.dtype | None = None,
    rate: float = 0.3,
) -> Inputs:
    x = drawn(batch, height, width, heads, d, dtype=dtype)
    return {"x": x, **decays(batch, height, width, heads, decay_dtype or dtype, rate)}


def reference_of(tensors: Inputs) -> Callable[..., Any]:
    return (polyline_path_scan if "x" in tensors else polyline_path_mask).reference.forward


def output_shape(tensors: Inputs) -> tuple[int, ...]:
    if "x" in tensors:
        return tuple(tensors["x"].shape)
    batch, height, width, heads = tensors["log_decay_w"].shape
    return (batch, heads, height * width, height * width)


def gradient_like(tensors: Inputs) -> torch.Tensor:
    first = next(iter(tensors.values()))
    return drawn(*output_shape(tensors), dtype=first.dtype)


def results(
    function: Callable[..., Any], tensors: Inputs, grad: torch.Tensor, *params: bool
) -> dict[str, torch.Tensor]:
    """out and all gradients of function(*tensors, *params) -> (out,)."""
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    (out,) = function(*leaves, *params)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))
    return {"out": out.detach(), **dict(zip(tensors, zeros, strict=True))}


def launch(
    backend: Any, tensors: Inputs, grad: torch.Tensor, /, *params: bool, **options: Any
) -> dict[str, torch.Tensor]:
    """The same from a backend's module, which fills outputs that hold NaN."""
    first = next(iter(tensors.values()))
    out = torch.full(output_shape(tensors), float("nan"), dtype=first.dtype)
    backend.forward(out, *tensors.values(), *params, **options)
    grads = {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}
    backend.backward(*grads.values(), grad.to(out.dtype), out, *tensors.values(), *params, **options)
    return {"out": out, **grads}


def check(got: dict[str, torch.Tensor], tensors: Inputs, grad: torch.Tensor, *params: bool) -> None:
    """Holds out and every gradient to the rule, and the gradients that nothing can reach to exactly 0."""
    reference, first = reference_of(tensors), next(iter(tensors.values()))
    baseline = results(reference, tensors, grad, *params)
    wide = {name: t.double() for name, t in tensors.items()}
    truth = results(reference, wide, grad.to(first.dtype).double(), *params)
    height, width = tensors["log_decay_w"].shape[1:3]
    # Pairs of tokens (mask), or channels and tokens (scan) whose terms meet in the gradient of a decay.
    terms = height * width * max(height, width) if "x" not in tensors else height * width * first.shape[-1]
    assert not got["log_decay_w"][:, :, 0].any()
    assert not got["log_decay_h"][:, 0].any()
    for name, want in truth.items():
        small = name in DECAYS and (width if name == "log_decay_w" else height) == 1
        if small or not want.any():
            assert not got[name].any()
            continue
        assert_close_to_truth(
            name if name == "out" else f"grad {name}",
            got[name],
            baseline[name],
            want,
            factor=FORWARD if name == "out" else GRADIENT,
            reduced=terms if name in DECAYS else 1,
            dtype=first.dtype if name in ("out", "x") else None,
        )


def strided(tensors: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The same values in the memory layouts that models produce, and in some that they do not."""
    layouts = {
        "heads first": {n: t.movedim(3, 1).contiguous().movedim(1, 3) for n, t in tensors.items()},
        "columns first": {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in tensors.items()},
        "offset": {n: torch.nn.functional.pad(t, (3, 2))[..., 3:-2] for n, t in tensors.items()},
        "strided": {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in tensors.items()},
    }
    yield from layouts.items()
    yield "each another", {n: views[n] for n, views in zip(tensors, layouts.values(), strict=False)}


def path_sums(log_decay_w: torch.Tensor, log_decay_h: torch.Tensor) -> torch.Tensor:
    """M by walking every path: [B, heads, H, W, H, W]."""
    batch, height, width, heads = log_decay_w.shape
    mask = log_decay_w.new_zeros(batch, heads, height, width, height, width)
    for i in range(height):
        for k in range(width):
            for j in range(height):
                for x in range(width):
                    low, high = sorted((i, j))
                    down = log_decay_h[:, low + 1 : high + 1, x].sum(1)
                    low, high = sorted((k, x))
                    along = log_decay_w[:, i, low + 1 : high + 1].sum(1)
                    mask[:, :, i, k, j, x] = down + along
    return mask
