"""Polyline path masked attention: softmax attention with a learned decay along two paths of a map."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend, interpreting
from vitkernels.core.checks import autocast, check_device, check_dtype, check_scale, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.polyline_path_attention import reference

_LAYOUT = "[batch, height, width, heads, head_dim]"
_DECAYS = "[batch, height, width, heads]"
_ONE_DTYPE = "Cast q, k and v to one dtype, or run under torch.autocast."


def polyline_path_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    *,
    mode: str = "whole",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention on a map whose logits decay along the two L-shaped paths between query and key.

    Every token has a decay towards its left neighbor and one towards its upper neighbor, given as logarithms. A path
    adds up the logarithms of the steps it takes: T_i[j, l] between columns j and l of row i, h_ir[l] between rows i
    and r of column l. Steps are counted by the order of positions alone, both directions alike::

        M[(i, j), (r, l)] = T_i[j, l] + h_ir[l]        vertically in the key's column, then along the query's row
        M^T                                            along the key's row, then vertically in the query's column

        whole:        out = 1/2 softmax(S + M) v + 1/2 softmax(S + M^T) v,    S = scale * q k^T over the whole map
        criss_cross:  out = 1/2 A_h (A_w v) + 1/2 A_w (A_h v),                A_w = softmax(S + T) within each row,
                                                                              A_h = softmax(S + h) within each column

    This is the released, normalised form. The masks come from two cumulative sums per token and head: no mask and no
    matrix of scores exists in memory, forward or backward. Accumulation, sums of decays and softmax are in float32
    (float64 for float64 inputs). Deterministic, forward and backward. Under autocast q, k and v are cast to
    autocast's dtype and the decays are left as they are.

    Args:
        q: queries, [batch, height, width, heads, head_dim]; float16, bfloat16, float32 or float64. Views of a packed
            projection are read in place.
        k: keys, as q.
        v: values, [batch, height, width, heads, value_dim]; value_dim may differ from head_dim.
        log_decay_w: [batch, height, width, heads], logarithm (<= 0 and finite, which is not checked) of the decay
            between a token and its left neighbor, before any cumulative sum; float32 or q's dtype. May be expanded.
            The first column's entries belong to no step: whatever they are, they have no influence, and gradient 0.
        log_decay_h: likewise of the decay between a token and its upper neighbor, in log_decay_w's dtype.
        mode: "whole" or "criss_cross".
        scale: factor on the dot products. Default: ``head_dim ** -0.5``. Only None asks for the default; 0.0 is 0.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        out, [batch, height, width, heads, value_dim], contiguous, in v's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, an unknown mode, a wrong backend name; a forced backend that cannot run
            the call.

    Paper: Polyline Path Masked Attention for Vision Transformer (Zhao et al., NeurIPS 2025). Constant decays give
    the Manhattan attention of RMT (Fan et al., CVPR 2024).

    Example:
        >>> q, k, v = torch.randn(2, 14, 14, 3, 8, 32).unbind(3)
        >>> decays = -torch.rand(2, 2, 14, 14, 8)
        >>> polyline_path_attention(q, k, v, *decays).shape
        torch.Size([2, 14, 14, 8, 32])
    """
    return operator((q, k, v, log_decay_w, log_decay_h), (mode, scale), backend, False)[0]


def check_inputs(
    q: Any, k: Any, v: Any, log_decay_w: Any, log_decay_h: Any, mode: Any, scale: Any
) -> tuple[Any, ...]:
    check_tensor("q", q, (None,) * 5, _LAYOUT)
    check_tensor("k", k, q.shape, _LAYOUT)
    check_tensor("v", v, (*q.shape[:-1], None), "[batch, height, width, heads, value_dim]")
    check_tensor("log_decay_w", log_decay_w, q.shape[:-1], _DECAYS)
    check_tensor("log_decay_h", log_decay_h, q.shape[:-1], _DECAYS)
    head_dim = q.shape[-1]
    if head_dim == 0 or v.shape[-1] == 0:
        fail("q" if head_dim == 0 else "v", "a last dimension of at least 1", q if head_dim == 0 else v)
    for name, tensor in (("k", k), ("v", v), ("log_decay_w", log_decay_w), ("log_decay_h", log_decay_h)):
        check_device(name, tensor, q.device, "q")
    if not isinstance(mode, str):
        fail("mode", "'whole' or 'criss_cross'", mode, kind=TypeError)
    if mode not in ("whole", "criss_cross"):
        fail("mode", "'whole' or 'criss_cross'", mode)
    scale = check_scale(scale, head_dim**-0.5)

    q, k, v = autocast(q, k, v)
    dtype = q.dtype
    check_dtype("q", q, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("k", k, (dtype,), _ONE_DTYPE)
    check_dtype("v", v, (dtype,), _ONE_DTYPE)
    allowed = (dtype,) if dtype is torch.float64 else (dtype, torch.float32)
    check_dtype("log_decay_w", log_decay_w, allowed, "Decays are best kept in float32.")
    check_dtype("log_decay_h", log_decay_h, (log_decay_w.dtype,), "Give both decays one dtype.")
    return q, k, v, log_decay_w, log_decay_h, mode == "criss_cross", scale


def saved_products(v: torch.Tensor, criss_cross: bool) -> int:
    """How many products with v the forward pass saves (see native.py)."""
    if v.device.type == "cpu" and not interpreting():
        small = v.shape[1] * v.shape[2] <= 256  # kSmallMap of csrc/polyline_path_attention/cpu_kernel.h
        return 0 if criss_cross or small else 1
    return 3 if criss_cross else 1


def _accumulate(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _allocate_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return v.new_empty(v.shape)


def _allocate_pair(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """lse, and cum."""
    batch, height, width, heads = q.shape[:-1]
    return q.new_empty((2, batch, heads, height, width), dtype=_accumulate(q))


def _allocate_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ldw: Any, ldh: Any, criss_cross: bool, *_: Any
) -> torch.Tensor:
    batch, height, width, heads, value_dim = v.shape
    count = saved_products(v, criss_cross)
    return v.new_empty((count, batch, height, width, heads * value_dim))


def _flops(
    q: Any, k: Any, v: Any, ldw: Any, ldh: Any, criss_cross: bool, scale: float, mask: list[bool] | None
) -> int:
    """2 x MACs of the composed operator's products, or of those that the wanted gradients take."""
    batch, height, width, heads, head_dim = q
    per_key = 2 * batch * height * width * heads
    keys = height + width if criss_cross else height * width
    products = 2 if criss_cross else 1  # with v, or with a product of it, per matrix of probabilities
    qk, pv = per_key * keys * head_dim, per_key * keys * v[-1] * products
    if mask is None:
        return qk + pv
    grad_q, grad_k, grad_v, grad_w, grad_h = mask
    logits = grad_q or grad_k or grad_w or grad_h
    # Both orders of the criss-cross pass a gradient through one product on its way to the other.
    through = pv // 2 if criss_cross and any(mask) else 0
    last = pv // 2 if criss_cross else pv
    return qk * (grad_q + grad_k) + pv * logits + through + last * grad_v


def _cuda_limits(q: Any, k: Any, v: Any, ldw: Any, ldh: Any, criss_cross: bool, *_: Any) -> list[str]:
    reasons = []
    height, width, head_dim, value_dim = q.shape[1], q.shape[2], q.shape[-1], v.shape[-1]
    if max(head_dim, value_dim) > 128:
        reasons.append(f"takes head_dim and value_dim up to 128, got {max(head_dim, value_dim)}")
    if max(height, width) >= 2**15 or height * width >= 2**30:
        reasons.append(
            f"takes maps of fewer than 2**15 rows and columns and 2**30 tokens, got {height}x{width}"
        )
    elif not criss_cross and _slab_bytes(q, v) > 101376:
        # what fits into shared memory beside the tiles
        reasons.append(f"takes narrower maps, or head_dim and value_dim, in whole mode, got {width} columns")
    return reasons


def _slab_bytes(q: torch.Tensor, v: torch.Tensor) -> int:
    """Shared memory of a tile of the backward pass, in its smallest form (backward.h, BackwardLayout)."""
    height, width, size = q.shape[1], q.shape[2], q.element_size()
    rows, sums = 64 if size == 2 else 16, max(size, 4)
    slab = min(height, (rows + width - 2) // width + 1) * width
    channels = sum((t.shape[-1] + 15) // 16 * 16 + 16 // size for t in (q, v))
    scratch = 0 if size == 2 else rows + 16 // size
    return rows * ((rows + 16) * sums + (scratch + 2 * channels) * size) + 6 * slab * sums + 48


def _triton_limits(q: Any, k: Any, v: Any, *_: Any) -> list[str]:
    reasons = []
    width = max(q.shape[-1], v.shape[-1])
    if width > 128:
        reasons.append(f"takes head_dim and value_dim up to 128, got {width}")
    if q.shape[1] * q.shape[2] > 2**30:
        reasons.append(f"takes maps of up to 2**30 tokens, got {q.shape[1]} x {q.shape[2]}")
    return reasons


_NATIVE = "vitkernels.kernels.polyline_path_attention.native"

operator = Operator(
    "polyline_path_attention",
    tensors=("q", "k", "v", "log_decay_w", "log_decay_h"),
    params="bool criss_cross, float scale",
    outputs=("out", "lse", "cum", "partial"),
    check=check_inputs,
    allocate=(_allocate_out, _allocate_pair, _allocate_pair, _allocate_partial),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE, limits=_cuda_limits),
        Backend(
            "triton",
            "vitkernels.kernels.polyline_path_attention.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_triton_limits,
        ),
        Backend("cpu", _NATIVE, skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
