"""Window attention with a learned relative position bias."""

from __future__ import annotations

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
from vitkernels.kernels.window_attention import reference

_LAYOUT = "[batch, heads, tokens, head_dim]"
_ONE_DTYPE = "Cast q, k and v to one dtype, or run under torch.autocast."


@overload
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias_table: torch.Tensor | None = None,
    bias_index: Literal["absolute", "signed"] = "absolute",
    window: int | tuple[int, int],
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias_table: torch.Tensor | None = None,
    bias_index: Literal["absolute", "signed"] = "absolute",
    window: int | tuple[int, int],
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias_table: torch.Tensor | None = None,
    bias_index: Literal["absolute", "signed"] = "absolute",
    window: int | tuple[int, int],
    scale: float | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias_table: torch.Tensor | None = None,
    bias_index: Literal["absolute", "signed"] = "absolute",
    window: int | tuple[int, int],
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention inside windows of tokens, with a bias looked up by the offset between query and key.

    Every window is one batch entry. With token ``n = y * Ww + x`` of a window of ``Wh`` rows and ``Ww`` columns::

        logits[n, m] = scale * <q[n], k[m]> + bias_table[head, index(n, m)]
        out[n]       = sum_m softmax_m(logits[n, m]) * v[m]
        lse[n]       = log sum_m exp(logits[n, m])

    The index is computed inside the kernels; no ``[tokens, tokens]`` tensor of indices, biases or scores exists
    in memory. Accumulation and softmax are in float32 (float64 for float64 inputs). Deterministic, forward and
    backward. Under autocast q, k and v are cast to autocast's dtype and the table is left as it is.

    Args:
        q: queries, [batch, heads, tokens, head_dim], any strides; float16, bfloat16, float32 or float64.
        k: keys, as q.
        v: values, [batch, heads, tokens, value_dim]; value_dim may differ from head_dim.
        bias_table: learned biases, or None. ``[heads, Wh * Ww]`` for "absolute" and
            ``[heads, (2 * Wh - 1) * (2 * Ww - 1)]`` for "signed"; in q's dtype or float32.
        bias_index: how the table is indexed. "absolute" by ``|dy| * Ww + |dx|`` (EfficientViT, TinyViT, LeViT);
            "signed" by ``(dy + Wh - 1) * (2 * Ww - 1) + dx + Ww - 1`` with ``dy = y_query - y_key`` (Swin).
        window: (Wh, Ww), or one int for a square window; tokens = Wh * Ww.
        scale: factor on the dot products. Default: ``head_dim ** -0.5``.
        return_lse: also return the logarithm of the softmax denominators.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        out, [batch, heads, tokens, value_dim], in v's dtype and memory format (the reference's is contiguous); with
        ``return_lse`` also lse, [batch, heads, tokens], float32 (float64 for float64), natural logarithm,
        differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, window or backend name; a forced backend that cannot run the call.

    Papers: EfficientViT (Liu et al., CVPR 2023), Swin Transformer (Liu et al., ICCV 2021).

    Example:
        >>> q = k = torch.randn(64, 4, 49, 16)
        >>> v = torch.randn(64, 4, 49, 32)
        >>> table = torch.zeros(4, 49, requires_grad=True)
        >>> window_attention(q, k, v, bias_table=table, window=(7, 7)).shape
        torch.Size([64, 4, 49, 32])
    """
    out, lse = operator((q, k, v, bias_table), (bias_index, window, scale), backend, return_lse)
    return (out, lse) if return_lse else out


def _check(
    q: Any, k: Any, v: Any, bias_table: Any, bias_index: Any, window: Any, scale: Any
) -> tuple[Any, ...]:
    window_h, window_w = check_positive_ints("window", window, 2)
    tokens = window_h * window_w
    check_tensor("q", q, (None, None, None, None), _LAYOUT)
    if q.shape[2] != tokens:
        fail(
            "q",
            f"{tokens} tokens, as window = ({window_h}, {window_w}) has",
            q,
            "Partition the map into windows first, or pass the window's own sides.",
        )
    batch, heads, _, head_dim = q.shape
    check_tensor("k", k, (batch, heads, tokens, head_dim), _LAYOUT)
    check_tensor("v", v, (batch, heads, tokens, None), "[batch, heads, tokens, value_dim]")
    if head_dim == 0 or v.shape[3] == 0:
        fail("q" if head_dim == 0 else "v", "a last dimension of at least 1", q if head_dim == 0 else v)
    check_device("k", k, q.device, "q")
    check_device("v", v, q.device, "q")
    if bias_index not in ("absolute", "signed"):
        fail("bias_index", "'absolute' or 'signed'", bias_index)
    signed = bias_index == "signed"
    scale = check_scale(scale, head_dim**-0.5)

    q, k, v = autocast(q, k, v)
    dtype = q.dtype
    check_dtype("q", q, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("k", k, (dtype,), _ONE_DTYPE)
    check_dtype("v", v, (dtype,), _ONE_DTYPE)
    if bias_table is not None:
        entries = (2 * window_h - 1) * (2 * window_w - 1) if signed else tokens
        check_tensor(
            "bias_table", bias_table, (heads, entries), f"[heads, entries] for {bias_index!r} indices"
        )
        check_device("bias_table", bias_table, q.device, "q")
        allowed = (dtype,) if dtype is torch.float64 else (dtype, torch.float32)
        check_dtype("bias_table", bias_table, allowed, "Cast it with bias_table.to(q.dtype).")
    return q, k, v, bias_table, window_h, window_w, signed, scale


def _allocate_lse(q: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _flops(q: Any, k: Any, v: Any, bias_table: Any, *params: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the two products, or of the products of the wanted gradients."""
    batch, heads, tokens, head_dim = q
    qk, pv = (2 * batch * heads * tokens * tokens * width for width in (head_dim, v[3]))
    if mask is None:
        return qk + pv
    grad_q, grad_k, grad_v, grad_table = mask
    return qk * (grad_q + grad_k) + pv * (grad_v + (grad_q or grad_k or grad_table))


def _triton_limits(q: Any, k: Any, v: Any, *_: Any) -> list[str]:
    tokens, width = q.shape[2], max(q.shape[3], v.shape[3])
    if tokens > 64 and width > 128:  # the tiled kernels would spill
        return [f"windows of more than 64 tokens take head_dim and value_dim up to 128, got {width}"]
    return []


def _cuda_limits(q: Any, k: Any, v: Any, bias_table: Any, window_h: int, window_w: int, *_: Any) -> list[str]:
    reasons = []
    width, entries = max(q.shape[3], v.shape[3]), (2 * window_h - 1) * (2 * window_w - 1)
    most = 128 if q.dtype is torch.float64 else 256
    if width > most:
        reasons.append(f"takes head_dim and value_dim up to {most} in {q.dtype}, got {width}")
    if bias_table is not None and entries > 1089:  # what fits into shared memory beside the widest tiles
        reasons.append(f"takes windows of up to 1089 relative positions (17x17) with a bias, got {entries}")
    return reasons


_NATIVE = "vitkernels.kernels.window_attention.native"

operator = Operator(
    "window_attention",
    tensors=("q", "k", "v", "bias_table?"),
    params="int window_h, int window_w, bool signed_bias, float scale",
    outputs=("out", "lse"),
    check=_check,
    allocate=("v", _allocate_lse),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_cuda_limits, skips_by_products=True),
        Backend(
            "triton",
            "vitkernels.kernels.window_attention.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
        ),
        Backend("cpu", _NATIVE, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
