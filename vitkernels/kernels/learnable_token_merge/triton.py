"""Launches the Triton kernels of learnable token merging: which tiles, how many programs.

The configuration follows from the dtype alone: no autotuning, and neither a new batch size nor another number of tokens
recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of
from vitkernels.kernels.learnable_token_merge.triton_mask import close_gradient, line_divisors
from vitkernels.kernels.learnable_token_merge.triton_products import mask_gradient, mask_product

# Programs that fill a large GPU about twice over, among which a shared mask's gradient splits the batch, and the most
# memory that its partial sums may take.
GRADIENT_PROGRAMS = 512
PARTIAL_BYTES = 64 << 20
LINES = {"BLOCK_L": 32, "BLOCK_K": 32, "num_warps": 4}


def configuration(itemsize: int) -> dict[str, int]:
    """Tiles of the products."""
    if itemsize == 4:  # on the FMA units
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _whole(g: Tensor) -> Tensor:
    """[masks, N, P], one mask where it is shared."""
    return g if g.ndim == 3 else g.unsqueeze(0)


def _batch_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _lines(g: Tensor, normalize: str) -> tuple[Tensor, tuple[int, ...]]:
    """The mask with its lines first, [masks, lines, places], and that shape."""
    whole = _whole(g) if normalize == "softmax_rows" else _whole(g).mT
    return whole, tuple(whole.shape)


class Norms(NamedTuple):
    """What the lines of a mask are normalised by, [masks, lines] each: a shift of exponents, and a divisor."""

    shifts: Tensor | None
    divisors: Tensor | None


def _norms(g: Tensor, dtype: torch.dtype, normalize: str, divisors: Tensor, write: bool) -> Norms:
    """Those of the mask for tokens of `dtype`. `write`: fills the divisors that the forward returns."""
    if normalize == "none":
        return Norms(None, None)
    softmax = normalize.startswith("softmax")
    exact = softmax and dtype is torch.float32
    mask, (masks, lines, places) = _lines(g, normalize)
    norms = Norms(divisors, None) if softmax else Norms(None, divisors)
    if exact:
        norms = Norms(_scratch(g, masks, lines), _scratch(g, masks, lines))
    if write or exact:
        line_divisors[(masks * triton.cdiv(lines, LINES["BLOCK_L"]),)](
            divisors if write else None, *(norms if exact else (None, None)), mask, *mask.stride(), lines, places,
            NORMALIZE=normalize, **LINES,
        )  # fmt: skip
    return norms


def _product(out: Tensor, g: Tensor, norms: Norms, x: Tensor, normalize: str, transposed: bool) -> None:
    """out = G^T x, or G x where transposed is False."""
    mask = _whole(g).mT if transposed else _whole(g)
    batch, depth, width = x.shape
    config = configuration(x.element_size())
    tiles = triton.cdiv(out.shape[1], config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_N"])
    some = norms.divisors if norms.shifts is None else norms.shifts
    # Of a shared mask the batch stride is 0; so is that of its norms.
    norm_b = 0 if mask.shape[0] == 1 or some is None else some.stride(0)
    mask_product[(batch * tiles,)](
        out, mask, *norms, x, *out.stride(), _batch_stride(mask), *mask.stride()[1:], norm_b, *x.stride(),
        out.shape[1], depth, width, NORMALIZE=normalize, BY_ROW=transposed != (normalize == "softmax_rows"), **config,
    )  # fmt: skip


def forward(
    y: Tensor, y_other: Tensor, divisors: Tensor, z: Tensor, g: Tensor, other: Tensor | None, normalize: str
) -> None:
    """Fills y and divisors, and y_other where there is another operand."""
    with device_of(z):
        norms = _norms(g, z.dtype, normalize, divisors, True)
        _product(y, g, norms, z, normalize, True)
        if other is not None:
            _product(y_other, g, norms, other, normalize, True)


def backward(
    grad_z: Tensor | None,
    grad_g: Tensor | None,
    grad_other: Tensor | None,
    grad_y: Tensor | None,
    grad_y_other: Tensor | None,
    grad_divisors: Tensor | None,
    y: Tensor,
    y_other: Tensor,
    divisors: Tensor,
    z: Tensor,
    g: Tensor,
    other: Tensor | None,
    normalize: str,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero. Divisors have none."""
    with device_of(z):
        norms = _norms(g, z.dtype, normalize, divisors, False)
        for grad, incoming in ((grad_z, grad_y), (grad_other, grad_y_other)):
            if grad is None:
                continue
            if incoming is None:
                grad.zero_()
            else:
                _product(grad, g, norms, incoming, normalize, False)
        if grad_g is not None:
            grad_y_other = None if other is None else grad_y_other
            if grad_y is None and grad_y_other is None:
                grad_g.zero_()
            else:
                _mask_gradient(grad_g, grad_y, grad_y_other, norms, z, g, other, normalize)


def _mask_gradient(
    grad_g: Tensor,
    grad_y: Tensor | None,
    grad_other: Tensor | None,
    norms: Norms,
    z: Tensor,
    g: Tensor,
    other: Tensor | None,
    normalize: str,
) -> None:
    batch, (tokens, merged), masks = z.shape[0], g.shape[-2:], _whole(g).shape[0]
    config = configuration(z.element_size())
    tiles = triton.cdiv(tokens, config["BLOCK_M"]) * triton.cdiv(merged, config["BLOCK_N"])
    shares = batch
    if g.ndim == 2:
        shares = max(1, min(batch, GRADIENT_PROGRAMS // tiles, PARTIAL_BYTES // (4 * tokens * merged)))
    grad = _whole(grad_g)
    direct = normalize == "none" and shares == masks
    target = grad if direct else _scratch(z, shares, tokens, merged)
    mask_gradient[(shares * tiles,)](
        target, z, grad_y, other, grad_other, *target.stride(), *z.stride(), *_strides(grad_y), *_strides(other),
        *_strides(grad_other), batch, tokens, merged, shares, z.shape[2], 0 if other is None else other.shape[2],
        **config,
    )  # fmt: skip
    if direct:
        return
    if shares != masks:
        target = target.sum(0, keepdim=True)
    if normalize == "none":
        grad.copy_(target)
        return
    mask, (_, lines, places) = _lines(g, normalize)
    strides = [tensor.stride()[1:] for tensor in (_lines(grad_g, normalize)[0], _lines(target, normalize)[0])]
    close_gradient[(masks * triton.cdiv(lines, LINES["BLOCK_L"]),)](
        grad, target, *norms, mask, grad.stride(0), *strides[0], *strides[1], *mask.stride(), lines, places,
        NORMALIZE=normalize, **LINES,
    )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


# (N, P, D, D', normalize, shared): the first block of LTM's ViT-S, and of MobileViT-S with a residual.
EXAMPLES = ((197, 158, 384, 384, "sum", False), (256, 205, 144, 0, "softmax_rows", True))


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for tokens, merged, width, other_width, normalize, shared in EXAMPLES:
        batch = 4
        g = torch.empty(*(() if shared else (batch,)), tokens, merged, dtype=dtype)
        z, y = (torch.empty(batch, n, width, dtype=dtype) for n in (tokens, merged))
        other, y_other = (
            torch.empty(batch, n, other_width, dtype=dtype) if other_width else None for n in (tokens, merged)
        )
        divisors = torch.empty(*g.shape[:-2], tokens if normalize == "softmax_rows" else merged)
        inputs = (z, g, other, normalize)

        def call(y=y, y_other=y_other, divisors=divisors, inputs=inputs):
            z, g, other, _ = inputs
            forward(y, y_other, divisors, *inputs)
            backward(z, g, other, y, y_other, None, y, y_other, divisors, *inputs)

        yield f"{tokens} to {merged}, {normalize}", call
