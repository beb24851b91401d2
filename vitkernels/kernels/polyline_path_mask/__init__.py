"""The polyline path mask as a matrix: decays of all pairs of tokens of a grid."""

from __future__ import annotations

from typing import Any

import torch

from vitkernels.core.backends import FLOAT_DTYPES, Backend
from vitkernels.core.checks import check_device, check_dtype, check_tensor, fail
from vitkernels.core.operator import Operator
from vitkernels.kernels.polyline_path_mask import reference

_LAYOUT = "[batch, height, width, heads]"


def polyline_path_mask(
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    *,
    log: bool = True,
    transpose: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The mask of polyline path attention, [tokens, tokens] for each image and head, for inspection and other uses.

    On a grid of H x W tokens in row-major order, M[(i, k), (j, l)] is the sum of the decays on the way from key
    (j, l) to query (i, k), which goes down the key's column and then along the query's row::

        M[(i, k), (j, l)] = sum of log_decay_w[i, t] over min(k, l) < t <= max(k, l)
                          + sum of log_decay_h[t, l] over min(i, j) < t <= max(i, j)

    so the first entry of each row of log_decay_w and of each column of log_decay_h plays no part, and the diagonal is
    0. The attention itself (`polyline_path_attention`) and the product with exp(M) (`polyline_path_scan`) never make
    this matrix, which has (H * W)^2 entries an image and head.

    Sums are in float32 (float64 for float64). Deterministic, forward and backward. The gradient with respect to the
    decays follows the order of the indices, so it does not vanish where a decay is 0. Under autocast nothing is cast.

    Args:
        log_decay_w: logarithms (<= 0, finite) of the decays between neighbors within a row, [batch, height, width,
            heads], any strides; float16, bfloat16, float32 or float64.
        log_decay_h: the same within a column.
        log: M when True, exp(M) when False.
        transpose: the transposed matrix: the way from key to query first along the key's row, then down the query's
            column.
        backend: "cuda", "triton", "cpu", "reference" or "auto". Default: the choice of the enclosing
            ``vitkernels.backend`` scope, else of ``VITKERNELS_BACKEND``, else the fastest that fits.

    Returns:
        [batch, heads, height * width, height * width], contiguous, in the decays' dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or backend name; a forced backend that cannot run the call.

    Paper: Polyline Path Masked Attention for Vision Transformer (Zhao et al., NeurIPS 2025).

    Example:
        >>> decays = -torch.rand(2, 2, 7, 7, 4)
        >>> polyline_path_mask(*decays).shape
        torch.Size([2, 4, 49, 49])
    """
    return operator((log_decay_w, log_decay_h), (log, transpose), backend)[0]


def _check(log_decay_w: Any, log_decay_h: Any, log: Any, transpose: Any) -> tuple[Any, ...]:
    check_tensor("log_decay_w", log_decay_w, (None,) * 4, _LAYOUT)
    check_tensor("log_decay_h", log_decay_h, log_decay_w.shape, _LAYOUT)
    check_device("log_decay_h", log_decay_h, log_decay_w.device, "log_decay_w")
    for name, value in (("log", log), ("transpose", transpose)):
        if not isinstance(value, bool):
            fail(name, "True or False", value, kind=TypeError)
    check_dtype("log_decay_w", log_decay_w, FLOAT_DTYPES, "Cast it with log_decay_w.float().")
    check_dtype("log_decay_h", log_decay_h, (log_decay_w.dtype,), "Give both decays one dtype.")
    return log_decay_w, log_decay_h, log, transpose


def _allocate(log_decay_w: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, height, width, heads = log_decay_w.shape
    return log_decay_w.new_empty((batch, heads, height * width, height * width))


def _flops(*_: Any, mask: list[bool] | None) -> int:
    """None: nothing here is a product of matrices."""
    return 0


_NATIVE = "vitkernels.kernels.polyline_path_mask.native"

operator = Operator(
    "polyline_path_mask",
    tensors=("log_decay_w", "log_decay_h"),
    params="bool log, bool transpose",
    outputs=("mask",),
    check=_check,
    allocate=(_allocate,),
    reference=reference.forward,
    backends=(
        Backend("cuda", _NATIVE),
        Backend(
            "triton",
            "vitkernels.kernels.polyline_path_mask.triton",
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
        ),
        Backend("cpu", _NATIVE),
    ),
    order={"cuda": ("cuda", "triton"), "cpu": ("cpu",)},
    flops=_flops,
    reads_result=False,
)
