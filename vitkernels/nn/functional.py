"""Functions of models that compose operators and have no kernel of their own."""

from __future__ import annotations

import torch

from vitkernels import ops
from vitkernels.core.checks import fail
from vitkernels.kernels.polyline_path_attention import check_inputs


def polyline_path_attention_unnormalized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay_w: torch.Tensor,
    log_decay_h: torch.Tensor,
    *,
    kind: str = "softmax",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Polyline path attention as the paper writes it: the mask multiplies the weights, which are not normalised again.

    With the mask L = exp(`ops.polyline_path_mask`), over all pairs of tokens::

        "softmax":  out = (softmax(scale * q k^T) * (L + L^T)) v
        "linear":   out = ((scale * q k^T) * (L + L^T)) v

    The released models add the logarithm of the mask to the scores instead, before a softmax of each of L and L^T:
    that is `ops.polyline_path_attention`, which is the one to train with. This one is for comparison and composed
    of operators. "softmax" makes the [tokens, tokens] matrices. "linear" takes time and memory linear in the tokens,
    by two products of L with the outer products of k and v (the paper's Theorem 3), which are head_dim times as large
    as v.

    Args:
        q: [batch, height, width, heads, head_dim].
        k: as q.
        v: [batch, height, width, heads, value_dim].
        log_decay_w: logarithms (<= 0) of the decays between neighbors within a row, [batch, height, width, heads].
        log_decay_h: the same within a column.
        kind: "softmax" or "linear".
        scale: of the scores; default head_dim ** -0.5.
        backend: of the operators; see `ops.polyline_path_scan`.

    Returns:
        [batch, height, width, heads, value_dim].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, kind, device or backend name.

    Paper: Polyline Path Masked Attention for Vision Transformer (Zhao et al., NeurIPS 2025).

    Example:
        >>> q, k, v = torch.randn(3, 2, 7, 9, 4, 16)
        >>> decays = -torch.rand(2, 2, 7, 9, 4)
        >>> polyline_path_attention_unnormalized(q, k, v, *decays, kind="linear").shape
        torch.Size([2, 7, 9, 4, 16])
    """
    # Not left to the operators: a mask knows the number of tokens alone, not the sides of their map.
    *_, scale = check_inputs(q, k, v, log_decay_w, log_decay_h, "whole", scale)
    if kind not in ("softmax", "linear"):
        fail("kind", "'softmax' or 'linear'", kind)
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    decays = (log_decay_w, log_decay_h)
    if kind == "linear":
        outer = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)
        states = ops.polyline_path_scan(outer, *decays, backend=backend) + ops.polyline_path_scan(
            outer, *decays, transpose=True, backend=backend
        )
        return torch.einsum("...d,...de->...e", q * scale, states.unflatten(-1, (head_dim, value_dim)))
    q, k, values = (t.movedim(3, 1).flatten(2, 3) for t in (q, k, v))
    mask = ops.polyline_path_mask(*decays, log=False, backend=backend)
    mask = mask + ops.polyline_path_mask(*decays, log=False, transpose=True, backend=backend)
    weights = torch.softmax(q @ k.mT * scale, -1) * mask
    out = weights.to(values.dtype) @ values
    return out.unflatten(2, v.shape[1:3]).movedim(1, 3)
