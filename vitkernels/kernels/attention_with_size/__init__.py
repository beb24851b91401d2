"""Proportional attention: a key that stands for several tokens counts as that many."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_scale, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.attention_with_size import reference

_ONE_DTYPE = "Cast q, k and v to one dtype, or run under torch.autocast."


def attention_with_size(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention in which key m counts size[m] times: softmax(scale * q k^T + log(size)) v.

    For merged tokens that were equal this is the attention of the sequence before. The logarithm is taken inside the
    kernel, and no tensor of scores exists in memory. Accumulation and softmax are in float32 (float64 for float64
    inputs). Deterministic, forward and backward. Under autocast q, k and v are cast to autocast's dtype.

    Args:
        q: queries, [batch, heads, N, d]; float16, bfloat16, float32 or float64. Views of a packed projection are
            read in place, as are those of k and v.
        k: keys, [batch, heads, M, d]; M >= 1.
        v: values, [batch, heads, M, dv].
        size: how many tokens a key stands for, [batch, M], float32 (float64 for float64 q), positive and without a
            gradient. A key of size 0 is hidden; a query that sees no key at all is NaN.
        scale: factor on the dot products. Default: ``d ** -0.5``.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        out, [batch, heads, N, dv], in memory [batch, N, heads, dv]: ``out.transpose(1, 2).flatten(2)`` copies
        nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; size requires a gradient; a forced backend that cannot
            run the call.

    Paper: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023).

    Example:
        >>> q, k, v = torch.randn(3, 2, 6, 184, 64)
        >>> size = torch.randint(1, 4, (2, 184)).float()
        >>> attention_with_size(q, k, v, size).shape
        torch.Size([2, 6, 184, 64])
    """
    if isinstance(size, torch.Tensor) and size.requires_grad:
        fail("size", "a tensor without a gradient", size, "Sizes are constants: call size.detach().")
    return operator((q, k, v, size), (scale,), backend, False)[0]


def _check(q: Any, k: Any, v: Any, size: Any, scale: Any) -> tuple[Any, ...]:
    check_tensor("q", q, (None, None, None, None), "[batch, heads, N, d]")
    batch, heads, _, width = q.shape
    check_tensor("k", k, (batch, heads, None, width), "[batch, heads, M, d]")
    keys = k.shape[2]
    check_tensor("v", v, (batch, heads, keys, None), "[batch, heads, M, dv]")
    check_tensor("size", size, (batch, keys), "[batch, M]")
    if width == 0 or v.shape[3] == 0:
        fail("q" if width == 0 else "v", "a last dimension of at least 1", q if width == 0 else v)
    if keys == 0:
        fail("k", "at least one key", k, "A softmax over no keys is not defined.")
    for name, tensor in (("k", k), ("v", v), ("size", size)):
        check_device(name, tensor, q.device, "q")
    scale = check_scale(scale, width**-0.5)

    q, k, v = autocast(q, k, v)
    check_dtype("q", q, FLOAT_DTYPES, _ONE_DTYPE)
    check_dtype("k", k, (q.dtype,), _ONE_DTYPE)
    check_dtype("v", v, (q.dtype,), _ONE_DTYPE)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    check_dtype("size", size, (wide,), f"Cast it with size.to({wide}): half precision holds no large counts.")
    return q, k, v, size, scale


def _allocate_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, queries, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    row = heads * width  # what a projection of all heads reads, side by side
    return v.new_empty_strided((batch, heads, queries, width), (queries * row, width, row, 1))


def _allocate_lse(q: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _flops(q: Any, k: Any, v: Any, size: Any, scale: float, mask: list[bool] | None) -> int:
    """2 x MACs of the two products, or of the products of the wanted gradients."""
    pairs = 2 * q[0] * q[1] * q[2] * k[2]
    qk, pv = pairs * q[3], pairs * v[3]
    if mask is None:
        return qk + pv
    grad_q, grad_k, grad_v, _ = mask
    return qk * (grad_q + grad_k) + pv * (grad_v + (grad_q or grad_k))


def _most(width: int, doubles: int) -> Any:
    def limits(q: Any, k: Any, v: Any, *_: Any) -> list[str]:
        most = doubles if q.dtype is torch.float64 else width
        got = max(q.shape[3], v.shape[3])
        return [f"takes head dims up to {most} in {q.dtype}, got {got}"] if got > most else []

    return limits


_ROOM = "vitkernels.kernels.attention_with_size"

operator = Operator(
    "attention_with_size",
    tensors=("q", "k", "v", "size"),
    params="float scale",
    outputs=("out", "lse"),
    check=_check,
    allocate=(_allocate_out, _allocate_lse),
    reference=reference.forward,
    backends=(
        Backend("cuda", f"{_ROOM}.native", limits=_most(256, 128), skips_by_products=True),
        Backend(
            "triton",
            f"{_ROOM}.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_most(128, 128),
            skips_by_products=True,
        ),
        Backend("cpu", f"{_ROOM}.native", skips_by_products=True),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
)
