"""Learnable token merging: the merged tokens are combinations of all tokens, by the columns of a mask."""

from __future__ import annotations

from typing import Any, overload

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.learnable_token_merge import reference

NORMALIZATIONS = (None, "sum", "softmax", "softmax_rows")


@overload
def learnable_token_merge(
    z: torch.Tensor, g: torch.Tensor, *, normalize: str | None = None, backend: str | None = None
) -> torch.Tensor: ...
@overload
def learnable_token_merge(
    z: torch.Tensor,
    g: torch.Tensor,
    other: torch.Tensor,
    /,
    *others: torch.Tensor,
    normalize: str | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]: ...
@overload
def learnable_token_merge(
    z: torch.Tensor,
    g: torch.Tensor,
    *others: torch.Tensor,
    normalize: str | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]: ...
def learnable_token_merge(
    z: torch.Tensor,
    g: torch.Tensor,
    *others: torch.Tensor,
    normalize: str | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Merges N tokens into P by a mask: y = G^T z, with the mask G normalised on the fly.

    ::

        G[n, p] = g[n, p]                            normalize None
                  g[n, p] / sum_n g[n, p]            "sum": a column's weights add up to 1
                  exp(g[n, p]) / sum_n exp(g[n, p])  "softmax": over the tokens, per merged token
                  exp(g[n, p]) / sum_p exp(g[n, p])  "softmax_rows": a token hands itself out

    The normalised mask is computed in float32 (float64 for float64), multiplies in z's dtype, and is not kept. Sums
    are in float32 (float64). With "sum" a column whose sum is exactly 0 is divided by 1. Gradients reach z, g and
    others; that of a shared mask sums over the batch. Deterministic, forward and backward. Under autocast z and others
    are cast to autocast's dtype, and g is left as it is.

    Args:
        z: tokens, [batch, N, D], any strides; float16, bfloat16, float32 or float64.
        g: the mask, [N, P] for all or [batch, N, P] for each image, in z's dtype or float32. N, P >= 1.
        others: further tokens [batch, N, D'] that the same mask merges, each of any width, in z's dtype.
        normalize: None, "sum", "softmax" or "softmax_rows".
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        y, [batch, P, D], in z's dtype, contiguous; with others a tuple of it and of theirs, [batch, P, D'].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or name; a forced backend that cannot run the call.

    Paper: Efficient Visual Transformer by Learnable Token Merging (Wang and Yang, TPAMI 2025). Its merging is
    X~ = G^T Z; which normalisation it uses is not published, so all are offered.

    Example:
        >>> z, x, g = torch.randn(2, 197, 384), torch.randn(2, 197, 384), torch.randn(2, 197, 158)
        >>> merged, residual = learnable_token_merge(z, g, x, normalize="softmax")
        >>> merged.shape
        torch.Size([2, 158, 384])
    """
    for i, other in enumerate(others):
        if other is None:
            fail(f"others[{i}]", "a tensor [batch, N, D]", other, kind=TypeError)
    y, second, _ = operator((z, g, others[0] if others else None), (normalize,), backend)
    if not others:
        return y
    for i, other in enumerate(others[1:], 1):  # the calls below would take it for their z
        check_tensor(f"others[{i}]", other, (*z.shape[:2], None), "[batch, N, D]")
        check_device(f"others[{i}]", other, z.device, "z")
        check_dtype(f"others[{i}]", autocast(other)[0], (y.dtype,), "Cast it to z.dtype.")
        if other.shape[2] == 0:
            fail(f"others[{i}]", "at least one channel", other)
    merged = [y, second]
    for i in range(1, len(others), 2):  # a pair in a call, which reads and normalises the mask once
        pair = others[i : i + 2]
        results = operator((pair[0], g, pair[1] if len(pair) == 2 else None), (normalize,), backend)
        merged += results[: len(pair)]
    return tuple(merged)


def _check(z: Any, g: Any, other: Any, normalize: Any) -> tuple[Any, ...]:
    check_tensor("z", z, (None, None, None), "[batch, N, D]")
    batch, tokens = z.shape[:2]
    if isinstance(g, torch.Tensor) and g.ndim == 2:
        check_tensor("g", g, (tokens, None), "[N, P]")
    else:
        check_tensor("g", g, (batch, tokens, None), "[batch, N, P] or [N, P]")
    if tokens == 0 or g.shape[-1] == 0:
        fail("z" if tokens == 0 else "g", "at least one token and one merged token", z if tokens == 0 else g)
    check_device("g", g, z.device, "z")
    if other is not None:
        check_tensor("others", other, (batch, tokens, None), "[batch, N, D]")
        check_device("others", other, z.device, "z")
    for name, tensor in (("z", z), ("others", other)):
        if tensor is not None and tensor.shape[2] == 0:
            fail(name, "at least one channel", tensor)
    if normalize not in NORMALIZATIONS:
        fail("normalize", "None, 'sum', 'softmax' or 'softmax_rows'", normalize)

    (z,) = autocast(z)
    check_dtype("z", z, FLOAT_DTYPES, "Cast it with z.float().")
    allowed = (z.dtype,) if z.dtype is torch.float64 else tuple({z.dtype, torch.float32})
    check_dtype("g", g, allowed, "Cast it with g.to(z.dtype).")
    if other is not None:
        (other,) = autocast(other)
        check_dtype("others", other, (z.dtype,), "Cast them to z.dtype.")
    return z, g, other, normalize or "none"


def _allocate_y(z: torch.Tensor, g: torch.Tensor, *_: Any) -> torch.Tensor:
    return z.new_empty((z.shape[0], g.shape[-1], z.shape[2]))


def _allocate_other(z: torch.Tensor, g: torch.Tensor, other: torch.Tensor | None, *_: Any) -> torch.Tensor:
    return z.new_empty(0) if other is None else z.new_empty((z.shape[0], g.shape[-1], other.shape[2]))


def _allocate_divisors(z: torch.Tensor, g: torch.Tensor, other: Any, normalize: str) -> torch.Tensor:
    dtype = torch.float64 if z.dtype is torch.float64 else torch.float32
    if normalize == "none":
        return z.new_empty(0, dtype=dtype)
    return z.new_empty(
        g.shape[:-1] if normalize == "softmax_rows" else (*g.shape[:-2], g.shape[-1]), dtype=dtype
    )


def _flops(z: Any, g: Any, other: Any, normalize: str, mask: list[bool] | None) -> int:
    """2 x MACs of the products with the mask, or of the products of the wanted gradients."""
    pairs = 2 * z[0] * z[1] * g[-1]
    first, second = pairs * z[2], 0 if other is None else pairs * other[2]
    if mask is None:
        return first + second
    return first * (mask[0] + mask[1]) + second * (mask[1] + mask[2])


_ROOM = "vitkernels.kernels.learnable_token_merge"

operator = Operator(
    "learnable_token_merge",
    tensors=("z", "g", "other?"),
    params="str normalize",
    outputs=("y", "y_other", "divisors"),
    check=_check,
    allocate=(_allocate_y, _allocate_other, _allocate_divisors),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native"),
        Backend("triton", f"{_ROOM}.triton", dtypes=(torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", f"{_ROOM}.native"),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
