"""Strip attention: queries and keys far narrower than the values, few keys for many queries."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import (
    autocast,
    check_device,
    check_dtype,
    check_scale,
    check_tensor,
    fail,
)
from vitkernels.core.operator import Operator
from vitkernels.kernels.strip_attention import reference

_ONE_DTYPE = "Cast q, k and v to one dtype, or run under torch.autocast."


@overload
def strip_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_bias: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def strip_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_bias: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def strip_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_bias: torch.Tensor | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def strip_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of N queries to M keys, whose width r is not that of the values; r = 1 is strip self-attention.

    ::

        logits[n, m] = scale * <q[n], k[m]> + attn_bias[n, m]
        out[n]       = sum_m softmax_m(logits[n, m]) * v[m]
        lse[n]       = log sum_m exp(logits[n, m])

    With one channel per head the logits are an outer product, and the largest of a row follows from the sign of its
    query and the largest and smallest key: one pass, no running maximum. No tensor of scores exists in memory, save
    for the gradient of a bias. Accumulation and softmax are in float32 (float64 for float64 inputs). Deterministic,
    forward and backward. The CPU kernels take one channel's weights from polynomials that are exact to float32's
    rounding, where a head's logits spread little enough (about +-3) for that to cost less. Under autocast q, k and v
    are cast to autocast's dtype and the bias is left as it is.

    Args:
        q: queries, [batch, heads, N, r]; float16, bfloat16, float32 or float64. Views of a projection [batch, N,
            heads * r] are read in place, as are those of k and v. The kernels take r from 1 to 64.
        k: keys, [batch, heads, M, r]. M >= 1, and may be more or less than N.
        v: values, [batch, heads, M, dv]; dv is any width.
        scale: factor on the dot products. Default: ``r ** -0.5``, which is 1 for one channel per head; models that
            scale by the width of the values pass ``dv ** -0.5``. Negative factors and 0.0 are taken as they are.
        attn_bias: added to the logits, or None. Broadcasts to [batch, heads, N, M]; in q's dtype or float32;
            differentiable. An entry of -inf hides a key; a query that sees no key at all is NaN. The gradient of a
            bias smaller than [batch, heads, N, M] is summed from a temporary tensor of that size.
        return_lse: also return the logarithm of the softmax denominators.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        out, [batch, heads, N, dv], in memory [batch, N, heads, dv]: ``out.transpose(1, 2).flatten(2)`` copies
        nothing. With ``return_lse`` also lse, [batch, heads, N], float32 (float64 for float64), natural logarithm,
        differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; a forced backend that cannot run the call.

    Paper: S2AFormer (IEEE Transactions on Image Processing, 2025, arXiv 2505.22195).

    Example:
        >>> q, k = torch.randn(2, 3136, 4), torch.randn(2, 49, 4)  # one channel for each of four heads
        >>> v = torch.randn(2, 49, 4, 16)
        >>> q, k = q.mT.unsqueeze(-1), k.mT.unsqueeze(-1)
        >>> strip_attention(q, k, v.transpose(1, 2), scale=16**-0.5).shape
        torch.Size([2, 4, 3136, 16])
    """
    out, lse = operator((q, k, v, attn_bias), (scale,), backend, return_lse)
    return (out, lse) if return_lse else out


def _check(q: Any, k: Any, v: Any, attn_bias: Any, scale: Any) -> tuple[Any, ...]:
    check_tensor("q", q, (None, None, None, None), "[batch, heads, N, r]")
    batch, heads, queries, width = q.shape
    check_tensor("k", k, (batch, heads, None, width), "[batch, heads, M, r]")
    keys = k.shape[2]
    check_tensor("v", v, (batch, heads, keys, None), "[batch, heads, M, dv]")
    if width == 0 or v.shape[3] == 0:
        fail("q" if width == 0 else "v", "a last dimension of at least 1", q if width == 0 else v)
    if keys == 0:
        fail("k", "at least one key", k, "A softmax over no keys is not defined.")
    check_device("k", k, q.device, "q")
    check_device("v", v, q.device, "q")
    scale = check_scale(scale, width**-0.5)

    q, k, v = autocast(q, k, v)
    dtype = q.dtype
    check_dtype("q", q, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("k", k, (dtype,), _ONE_DTYPE)
    check_dtype("v", v, (dtype,), _ONE_DTYPE)
    if attn_bias is not None:
        _check_bias(attn_bias, (batch, heads, queries, keys))
        check_device("attn_bias", attn_bias, q.device, "q")
        allowed = (dtype,) if dtype is torch.float64 else (dtype, torch.float32)
        check_dtype("attn_bias", attn_bias, allowed, "Cast it with attn_bias.to(q.dtype).")
    return q, k, v, attn_bias, scale


def _check_bias(attn_bias: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(attn_bias, torch.Tensor):
        fail("attn_bias", "a tensor or None", attn_bias, kind=TypeError)
    check_tensor("attn_bias", attn_bias, (None,) * attn_bias.ndim, "that broadcasts")
    fits = attn_bias.ndim <= 4
    for size, wanted in zip(reversed(attn_bias.shape), reversed(shape)):  # noqa: B905 (fewer dimensions are fine)
        fits = fits and (size == 1 or size == wanted)  # not `in`, which Dynamo answers wrongly for symbols
    if not fits:
        sizes = ", ".join(str(size) for size in shape)
        fail("attn_bias", f"a shape that broadcasts to [batch, heads, N, M] = [{sizes}]", attn_bias)


def _allocate_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, queries = q.shape[:3]
    width = v.shape[3]
    row = heads * width  # what a projection of all heads reads, side by side
    return v.new_empty_strided((batch, heads, queries, width), (queries * row, width, row, 1))


def _allocate_lse(q: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _flops(q: Any, k: Any, v: Any, attn_bias: Any, scale: float, mask: list[bool] | None) -> int:
    """2 x MACs of the two products, or of the products of the wanted gradients."""
    pairs = 2 * q[0] * q[1] * q[2] * k[2]
    qk, pv = pairs * q[3], pairs * v[3]
    if mask is None:
        return qk + pv
    grad_q, grad_k, grad_v, grad_bias = mask
    return qk * (grad_q + grad_k) + pv * (grad_v + (grad_q or grad_k or grad_bias))


def _cpu_limits(q: Any, *_: Any) -> list[str]:
    return [] if q.shape[3] <= 64 else [f"takes r up to 64, got {q.shape[3]}"]


def _cuda_limits(q: Any, k: Any, v: Any, *_: Any) -> list[str]:
    reasons = _cpu_limits(q)
    most = 128 if q.dtype is torch.float64 else 256
    if v.shape[3] > most:
        reasons.append(f"takes dv up to {most} in {q.dtype}, got {v.shape[3]}")
    return reasons


def _triton_limits(q: Any, k: Any, v: Any, *_: Any) -> list[str]:
    reasons = _cpu_limits(q)
    if v.shape[3] > 128:
        reasons.append(f"takes dv up to 128, got {v.shape[3]}")
    return reasons


_NATIVE = "vitkernels.kernels.strip_attention.native"

operator = Operator(
    "strip_attention",
    tensors=("q", "k", "v", "attn_bias?"),
    params="float scale",
    outputs=("out", "lse"),
    check=_check,
    allocate=(_allocate_out, _allocate_lse),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_cuda_limits, skips_by_products=True),
        Backend(
            "triton",
            "vitkernels.kernels.strip_attention.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
            skips_by_products=True,
        ),
        Backend("cpu", _NATIVE, limits=_cpu_limits, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
