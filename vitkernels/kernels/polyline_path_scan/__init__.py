"""The product of a polyline path mask with values, in time and memory linear in the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import autocast, check_device, check_dtype, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.polyline_path_scan import reference

_LAYOUT = "[batch, height, width, heads, head_dim]"
_DECAYS = "[batch, height, width, heads]"


def polyline_path_scan(
    x: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    *,
    transpose: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """y = L x with the mask L = exp(`polyline_path_mask`) of a grid of tokens, without making L.

    L is the product of two masks that act within rows and within columns, so y takes two passes of recurrences
    (the paper's Theorem 2): x down and up each column, the result along each row and back; transposed, rows first.
    In one dimension, with decays a::

        f_i = x_i + a_i f_(i-1),   r_i = x_i + a_(i+1) r_(i+1),   y = f + r - x

    Accumulates in float32 (float64 for float64); what passes from one axis to the other is rounded to x's dtype.
    Memory beyond y: none forward, one tensor like x backward. Deterministic, forward and backward. Under autocast x
    is cast to autocast's dtype, the decays stay as they are.

    Args:
        x: [batch, height, width, heads, head_dim], any strides; float16, bfloat16, float32 or float64.
        log_decay_w: logarithms (<= 0, finite) of the decays between neighbors within a row, [batch, height, width,
            heads], any strides, in x's dtype or float32.
        log_decay_h: the same within a column, in log_decay_w's dtype.
        transpose: multiply with the transposed mask.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        y, [batch, height, width, heads, head_dim], contiguous, in x's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; a forced backend that cannot run the call.

    Paper: Polyline Path Masked Attention for Vision Transformer (Zhao et al., NeurIPS 2025).

    Example:
        >>> x, decays = torch.randn(2, 7, 9, 4, 16), -torch.rand(2, 2, 7, 9, 4)
        >>> polyline_path_scan(x, *decays).shape
        torch.Size([2, 7, 9, 4, 16])
    """
    return operator((x, log_decay_w, log_decay_h), (transpose,), backend)[0]


def _check(x: Any, log_decay_w: Any, log_decay_h: Any, transpose: Any) -> tuple[Any, ...]:
    check_tensor("x", x, (None,) * 5, _LAYOUT)
    check_tensor("log_decay_w", log_decay_w, x.shape[:-1], _DECAYS)
    check_tensor("log_decay_h", log_decay_h, x.shape[:-1], _DECAYS)
    for name, tensor in (("log_decay_w", log_decay_w), ("log_decay_h", log_decay_h)):
        check_device(name, tensor, x.device, "x")
    if not isinstance(transpose, bool):
        fail("transpose", "True or False", transpose, kind=TypeError)
    (x,) = autocast(x)
    check_dtype("x", x, FLOAT_DTYPES, "Cast it with x.float().")
    allowed = (x.dtype,) if x.dtype is torch.float64 else tuple({x.dtype, torch.float32})
    check_dtype("log_decay_w", log_decay_w, allowed, "Decays are best kept in float32.")
    check_dtype("log_decay_h", log_decay_h, (log_decay_w.dtype,), "Give both decays one dtype.")
    return x, log_decay_w, log_decay_h, transpose


def _allocate(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _flops(x: Any, *rest: Any, mask: list[bool] | None) -> int:
    """2 x MACs of the composed products with the masks of rows and columns, or of the wanted gradients."""
    height, width = x[1:3]
    along, down = (2 * math.prod(x) * size for size in (width, height))
    if mask is None:
        return along + down
    grad_x, grad_w, grad_h = mask
    first, second = (along, down) if rest[-1] else (down, along)
    grad_first, grad_second = (grad_w, grad_h) if rest[-1] else (grad_h, grad_w)
    return second * grad_second + second * (grad_x or grad_first) + first * grad_first + first * grad_x


_NATIVE = "vitkernels.kernels.polyline_path_scan.native"


def _longest(tokens: int) -> Callable[..., list[str]]:
    def limits(x: Any, *_: Any) -> list[str]:
        got = max(x.shape[1:3])
        return [f"takes rows and columns of up to {tokens} tokens, got {got}"] if got > tokens else []

    return limits


operator = Operator(
    "polyline_path_scan",
    tensors=("x", "log_decay_w", "log_decay_h"),
    params="bool transpose",
    outputs=("y",),
    check=_check,
    allocate=(_allocate,),
    reference=reference.forward,
    backends=(
        # By the shared memory of a warp, in double and of heads wider than it, on the devices that have least of it.
        Backend("cuda", _NATIVE, limits=_longest(1408)),
        Backend(
            "triton",
            "vitkernels.kernels.polyline_path_scan.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            limits=_longest(1024),
        ),
        Backend("cpu", _NATIVE),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
