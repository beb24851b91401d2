"""Neighborhood attention, dilated and causal, with a learned relative position bias."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import (
    autocast,
    check_device,
    check_dtype,
    check_positive_ints,
    check_scale,
    check_tensor,
    fail,
)
from vitkernels.core.operator import Operator
from vitkernels.kernels.neighborhood_attention import reference

_LAYOUT = "[batch, *map, heads, head_dim]"
_ONE_DTYPE = "Cast q, k and v to one dtype, or run under torch.autocast."


@overload
def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every token of a map to the tokens around it.

    Along each axis a query sees ``kernel_size`` keys, ``dilation`` apart: itself, ``kernel_size // 2`` before it and
    ``(kernel_size - 1) // 2`` after it. At a border the window is shifted inward, so that it always has that many
    keys; nothing is padded. A dilated axis falls apart into ``dilation`` interleaved groups that never see each
    other, and a window is shifted inside its own group. A causal axis ends the window at the query instead, with
    fewer keys at its beginning. The neighborhood on a map is the product of those of its axes::

        logits[i, j] = scale * <q[i], k[j]> + rpb[head, (j - i) / dilation + kernel_size - 1]     j a neighbor of i
        out[i]       = sum_j softmax_j(logits[i, j]) * v[j]
        lse[i]       = log sum_j exp(logits[i, j])

    No gathered copy of keys, and no tensor of scores or indices, exists in memory. Accumulation and softmax are in
    float32 (float64 for float64 inputs). Deterministic, forward and backward. Under autocast q, k and v are cast to
    autocast's dtype and the bias is left as it is. A NaN or an infinity in k or v reaches on the CPU exactly the
    queries that see it, on GPUs also others of the same tiles, whose weights of 0 are multiplied with it.

    Args:
        q: queries, [batch, *map, heads, head_dim], a map of one or two axes; float16, bfloat16, float32 or float64.
            Views of a packed projection are read in place.
        k: keys, as q.
        v: values, [batch, *map, heads, value_dim]; value_dim may differ from head_dim.
        kernel_size: keys along each axis, or one int for all; even ones too.
        dilation: distance of neighboring keys along each axis, or one int for all; kernel_size * dilation must not
            exceed the axis.
        is_causal: whether an axis is causal, or one bool for all.
        scale: factor on the dot products. Default: ``head_dim ** -0.5``. Only None asks for the default; 0.0 is 0.
        rpb: learned relative position bias, [heads, 2 * kernel_size - 1, ...] with one axis per map axis, or None;
            in q's dtype or float32. Not defined for causal axes.
        return_lse: also return the logarithm of the softmax denominators.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        out, [batch, *map, heads, value_dim], contiguous; with ``return_lse`` also lse, [batch, *map, heads],
        float32 (float64 for float64), natural logarithm, differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, a window that does not fit the map, a bias on a causal axis, a wrong
            backend name; a forced backend that cannot run the call.

    Papers: Neighborhood Attention Transformer (Hassani et al., CVPR 2023), Dilated Neighborhood Attention
    Transformer (Hassani & Shi, 2022), MedViTV2 (Manzari et al., 2025).

    Example:
        >>> qkv = torch.randn(2, 28, 28, 3, 4, 32)
        >>> rpb = torch.zeros(4, 13, 13, requires_grad=True)
        >>> neighborhood_attention(*qkv.unbind(3), 7, dilation=4, rpb=rpb).shape
        torch.Size([2, 28, 28, 4, 32])
    """
    out, lse = operator((q, k, v, rpb), (kernel_size, dilation, is_causal, scale), backend, return_lse)
    return (out, lse) if return_lse else out


def _check(
    q: Any, k: Any, v: Any, rpb: Any, kernel_size: Any, dilation: Any, is_causal: Any, scale: Any
) -> tuple[Any, ...]:
    if not isinstance(q, torch.Tensor):
        fail("q", f"a tensor {_LAYOUT}", q, kind=TypeError)
    if q.ndim not in (4, 5):
        fail("q", f"a map of one or two axes, {_LAYOUT}", q)
    rank = q.ndim - 3
    check_tensor("q", q, (None,) * q.ndim, _LAYOUT)
    kernel_size = check_positive_ints("kernel_size", kernel_size, rank)
    dilation = check_positive_ints("dilation", 1 if dilation is None else dilation, rank)
    is_causal = _check_bools("is_causal", False if is_causal is None else is_causal, rank)
    sizes, (heads, head_dim) = q.shape[1 : 1 + rank], q.shape[1 + rank :]
    for axis in range(rank):
        if kernel_size[axis] * dilation[axis] > sizes[axis]:
            fail(
                "kernel_size",
                f"kernel_size * dilation <= {sizes[axis]}, the map's axis {axis}",
                f"{kernel_size[axis]} * {dilation[axis]}",
                "Lower one of them, or pad the map.",
            )
    check_tensor("k", k, q.shape, _LAYOUT)
    check_tensor("v", v, (*q.shape[:-1], None), "[batch, *map, heads, value_dim]")
    if head_dim == 0 or v.shape[-1] == 0:
        fail("q" if head_dim == 0 else "v", "a last dimension of at least 1", q if head_dim == 0 else v)
    check_device("k", k, q.device, "q")
    check_device("v", v, q.device, "q")
    scale = check_scale(scale, head_dim**-0.5)

    q, k, v = autocast(q, k, v)
    dtype = q.dtype
    check_dtype("q", q, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("k", k, (dtype,), _ONE_DTYPE)
    check_dtype("v", v, (dtype,), _ONE_DTYPE)
    if rpb is not None:
        entries = tuple(2 * kernel - 1 for kernel in kernel_size)
        check_tensor("rpb", rpb, (heads, *entries), "[heads, 2 * kernel_size - 1, ...]")
        if any(is_causal):
            fail("rpb", "None, for a causal axis has no relative position bias", rpb)
        check_device("rpb", rpb, q.device, "q")
        allowed = (dtype,) if dtype is torch.float64 else (dtype, torch.float32)
        check_dtype("rpb", rpb, allowed, "Cast it with rpb.to(q.dtype).")
    return q, k, v, rpb, kernel_size, (1,) * rank, dilation, is_causal, scale


def _check_bools(name: str, value: Any, count: int) -> tuple[bool, ...]:
    if isinstance(value, bool):
        return (value,) * count
    if (
        not isinstance(value, (tuple, list))
        or len(value) != count
        or not all(isinstance(b, bool) for b in value)
    ):
        fail(name, f"a bool or {count} bools", value, kind=TypeError)
    return tuple(value)


def _allocate_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return v.new_empty(v.shape)


def _allocate_lse(q: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=dtype)


def count_pairs(sizes: Any, kernel_size: Any, dilation: Any, is_causal: Any) -> int:
    """(query, key) pairs of one head of one map."""
    pairs = 1
    for size, kernel, step, causal in zip(sizes, kernel_size, dilation, is_causal, strict=True):
        # A causal group lacks kernel - 1 keys at its first query, one fewer at each next.
        pairs *= size * kernel - (step * (kernel * (kernel - 1) // 2) if causal else 0)
    return pairs


def _flops(
    q: Any,
    k: Any,
    v: Any,
    rpb: Any,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float,
    mask: list[bool] | None,
) -> int:
    """2 x MACs of the two products, or of the products of the wanted gradients; causal windows count as full."""
    pairs = q[0] * q[-2]
    for size, kernel in zip(q[1:-2], kernel_size, strict=True):
        pairs *= size * kernel
    qk, pv = 2 * pairs * q[-1], 2 * pairs * v[-1]
    if mask is None:
        return qk + pv
    grad_q, grad_k, grad_v, grad_rpb = mask
    return qk * (grad_q + grad_k) + pv * (grad_v + (grad_q or grad_k or grad_rpb))


def _cuda_limits(q: Any, k: Any, v: Any, rpb: Any, kernel_size: Any, *_: Any) -> list[str]:
    reasons = []
    width, sizes = max(q.shape[-1], v.shape[-1]), q.shape[1:-2]
    most = 128 if q.dtype is torch.float64 else 256
    if width > most:
        reasons.append(f"takes head_dim and value_dim up to {most} in {q.dtype}, got {width}")
    if rpb is not None and (entries := math.prod(rpb.shape[1:])) > 1089:
        # what fits into shared memory beside the widest tiles
        reasons.append(f"takes kernels of up to 1089 relative positions (17x17) with a bias, got {entries}")
    # What 32 bits hold of a token's coordinates, and of the keys that a tile of queries meets.
    met = [min(size, kernel + 63) for size, kernel in zip(sizes, kernel_size, strict=True)]
    if math.prod(sizes) > 2**26 or (math.prod(met) + 65) * met[-1] >= 2**32:
        reasons.append(f"takes maps of up to 2**26 tokens and kernels of fewer than 65000, got {kernel_size}")
    return reasons


def _triton_limits(q: Any, k: Any, v: Any, rpb: Any, kernel_size: Any, *_: Any) -> list[str]:
    reasons = []
    width, sizes = max(q.shape[-1], v.shape[-1]), q.shape[1:-2]
    if width > 256:
        reasons.append(f"takes head_dim and value_dim up to 256, got {width}")
    # What 32 bits hold of a token, and 24 of its slot in the box of queries that a tile of keys meets.
    met = [min(size, 2 * kernel + 64) for size, kernel in zip(sizes, kernel_size, strict=True)]
    if math.prod(sizes) > 2**30 or math.prod(met) > 2**20:
        reasons.append(f"takes maps of up to 2**30 tokens and kernels of up to 480 x 480, got {kernel_size}")
    return reasons


_NATIVE = "vitkernels.kernels.neighborhood_attention.native"

operator = Operator(
    "neighborhood_attention",
    tensors=("q", "k", "v", "rpb?"),
    # is_causal as ints: torch.jit.trace knows no list of bools.
    params="int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale",
    outputs=("out", "lse"),
    check=_check,
    allocate=(_allocate_out, _allocate_lse),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_cuda_limits, skips_by_products=True),
        Backend(
            "triton",
            "vitkernels.kernels.neighborhood_attention.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
            skips_by_products=True,
        ),
        Backend("cpu", _NATIVE, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
