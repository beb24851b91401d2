"""Launches the Triton kernels of window attention: which kernel, which tiles, how many programs.

The configuration follows from window, head dims and dtype alone: no autotuning, and a new batch size never
recompiles. Windows of at most 64 tokens take the single-tile kernels, others the tiled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.core.triton_window_bias import reduce_bias_gradient
from vitkernels.kernels.window_attention.triton_tiled import (
    backward_bias_tiled,
    backward_key_tiled,
    backward_query_tiled,
    forward_tiled,
)
from vitkernels.kernels.window_attention.triton_whole import backward_whole, forward_whole

# Most tokens a single tile holds.
WHOLE_WINDOW = 64
# Programs of 128 threads that fill a large GPU about twice over; windows beyond are looped over.
FORWARD_PROGRAMS = 1024
# Fewer in the backward, where each program also writes an N x N partial of the bias gradient.
BACKWARD_PROGRAMS = 512
PARTIAL_BYTES = 64 << 20
# Elements of a window in q (read twice) and v up to which the backward prefetches within 99 KB of shared
# memory, the least a supported GPU has.
PREFETCH_ELEMENTS = 64 * 144


@cache
def whole_configuration(
    tokens: int, head_dim: int, value_dim: int, itemsize: int, dense: bool, backward: bool
) -> dict[str, int]:
    """Tiles of the single-tile kernels, which walk through d and dv in slices of 16.

    `dense`: rows of q, k, v are dense, so that they can be prefetched by asynchronous copies.
    """
    block = padded(tokens)
    config = {"BLOCK": block, "BLOCK_D": 16, "BLOCK_V": 16, "UNROLL_D": 1, "UNROLL_V": 1}
    if itemsize == 4:
        # fp32 products run on the FMA units with both operands in registers: more threads, or they spill.
        config |= {"num_warps": block // 8, "num_stages": 1}
        # Left alone, ptxas squeezes this one into 80 registers and spills.
        return config if backward or block < 64 else {**config, "maxnreg": 128}
    config["num_warps"] = block // 16
    # Unrolled slices let the loop over windows prefetch a whole window, where two of them fit shared memory.
    # (Masks of ragged slices would cost the registers that prefetching leaves.)
    ragged = head_dim % 16 or value_dim % 16
    if not dense or ragged or block * (2 * head_dim + value_dim) > PREFETCH_ELEMENTS:
        return {**config, "num_stages": 1}
    return {**config, "UNROLL_D": -(-head_dim // 16), "UNROLL_V": -(-value_dim // 16), "num_stages": 2}


@cache
def tiled_configuration(head_dim: int, value_dim: int, itemsize: int, bias: bool = False) -> dict[str, int]:
    """Tiles of the tiled kernels, which hold all of d and dv. `bias`: for backward_bias_tiled."""
    config = {"BLOCK_N": 32, "BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim), "num_stages": 1}
    if itemsize == 4:
        # ptxas would fit the bias kernel into 128 registers, and spill.
        return {"BLOCK_M": 64, "num_warps": 8, **config, **({"maxnreg": 168} if bias else {})}
    return {"BLOCK_M": 64 if max(head_dim, value_dim) <= 64 else 32, "num_warps": 4, **config}


def window_chunks(batch: int, heads: int, programs: int, per_head: int = 1) -> int:
    """Into how many interleaved chunks the windows are split, evenly, so that programs loop over the rest."""
    limit = max(1, programs // (heads * per_head))
    rounds = -(-batch // limit)
    return -(-batch // rounds)


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _dense(*tensors: Tensor) -> bool:
    return all(tensor.stride(3) == 1 for tensor in tensors)


def forward(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    window_h: int,
    window_w: int,
    signed_bias: bool,
    scale: float,
) -> None:
    """Fills out and lse."""
    batch, heads, tokens, head_dim = q.shape
    value_dim = v.shape[3]
    strides = (*out.stride(), *lse.stride(), *q.stride(), *k.stride(), *v.stride(), *_strides(bias_table, 2))
    shape = (window_h, window_w, signed_bias, head_dim, value_dim)
    with device_of(q):
        if tokens <= WHOLE_WINDOW:
            size, dense = q.element_size(), _dense(q, k, v)
            config = whole_configuration(tokens, head_dim, value_dim, size, dense, False)
            chunks = window_chunks(batch, heads, FORWARD_PROGRAMS * 4 // config["num_warps"])
            forward_whole[(chunks * heads,)](
                out, lse, q, k, v, bias_table, *strides, batch, heads, chunks, scale, *shape, **config
            )
        else:
            config = tiled_configuration(head_dim, value_dim, q.element_size())
            tiles = -(-tokens // config["BLOCK_M"])
            forward_tiled[(batch * heads * tiles,)](
                out, lse, q, k, v, bias_table, *strides, heads, scale, *shape, **config
            )


def backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_bias_table: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    window_h: int,
    window_w: int,
    signed_bias: bool,
    scale: float,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero."""
    if grad_out is None:
        if grad_v is not None:
            grad_v.zero_()
            grad_v = None
        if grad_lse is None:
            for grad in (grad_q, grad_k, grad_bias_table):
                if grad is not None:
                    grad.zero_()
            return
    if grad_q is None and grad_k is None and grad_v is None and grad_bias_table is None:
        return
    with device_of(q):
        fill = _backward_whole if window_h * window_w <= WHOLE_WINDOW else _backward_tiled
        partials = fill(
            grad_q, grad_k, grad_v, grad_bias_table is not None, grad_out, grad_lse, out, lse, q, k, v,
            bias_table, window_h, window_w, signed_bias, scale,
        )  # fmt: skip
        if grad_bias_table is not None:
            chunks, heads, tokens, _ = partials.shape
            block_t = padded(tokens)
            reduce_bias_gradient[(heads * grad_bias_table.shape[1],)](
                grad_bias_table, partials, *grad_bias_table.stride(), heads, chunks, window_h, window_w,
                signed_bias, BLOCK_C=max(1, 1024 // block_t), BLOCK_T=block_t, num_warps=4,
            )  # fmt: skip


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _backward_whole(
    grad_q, grad_k, grad_v, bias_gradient, grad_out, grad_lse, out, lse, q, k, v,
    bias_table, window_h, window_w, signed_bias, scale,
):  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    value_dim = v.shape[3]
    config = whole_configuration(tokens, head_dim, value_dim, q.element_size(), _dense(q, k, v), True)
    chunks = window_chunks(batch, heads, BACKWARD_PROGRAMS * 4 // config["num_warps"])
    partials = _scratch(q, chunks, heads, tokens, tokens) if bias_gradient else None
    backward_whole[(chunks * heads,)](
        grad_q, grad_k, grad_v, partials, grad_out, grad_lse, lse, q, k, v, bias_table,
        *_strides(grad_q, 4), *_strides(grad_k, 4), *_strides(grad_v, 4), *_strides(grad_out, 4),
        *_strides(grad_lse, 3), *lse.stride(), *q.stride(), *k.stride(), *v.stride(),
        *_strides(bias_table, 2), batch, heads, chunks, scale, window_h, window_w, signed_bias, head_dim,
        value_dim, **config,
    )  # fmt: skip
    return partials


def _backward_tiled(
    grad_q, grad_k, grad_v, bias_gradient, grad_out, grad_lse, out, lse, q, k, v,
    bias_table, window_h, window_w, signed_bias, scale,
):  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    value_dim = v.shape[3]
    config = tiled_configuration(head_dim, value_dim, q.element_size())
    tiles_m, tiles_n = -(-tokens // config["BLOCK_M"]), -(-tokens // config["BLOCK_N"])
    delta = _scratch(q, batch, heads, tokens)
    incoming = _strides(grad_out, 4)
    inputs = (*lse.stride(), *q.stride(), *k.stride(), *v.stride(), *_strides(bias_table, 2))
    shape = (window_h, window_w, signed_bias, head_dim, value_dim)
    backward_query_tiled[(batch * heads * tiles_m,)](
        grad_q, delta, grad_out, grad_lse, out, lse, q, k, v, bias_table, *_strides(grad_q, 4), *incoming,
        *_strides(grad_lse, 3), *out.stride(), *inputs, heads, scale, *shape, **config,
    )  # fmt: skip
    if grad_k is not None or grad_v is not None:
        backward_key_tiled[(batch * heads * tiles_n,)](
            grad_k, grad_v, grad_out, lse, delta, q, k, v, bias_table, *_strides(grad_k, 4),
            *_strides(grad_v, 4), *incoming, *inputs, heads, scale, *shape, **config,
        )  # fmt: skip
    if not bias_gradient:
        return None
    programs = min(BACKWARD_PROGRAMS, PARTIAL_BYTES * tiles_m * tiles_n // (4 * tokens * tokens))
    chunks = window_chunks(batch, heads, programs, tiles_m * tiles_n)
    partials = _scratch(q, chunks, heads, tokens, tokens)
    config = tiled_configuration(head_dim, value_dim, q.element_size(), bias=True)
    backward_bias_tiled[(chunks * heads * tiles_m * tiles_n,)](
        partials, grad_out, lse, delta, q, k, v, bias_table, *incoming, *inputs, batch, heads, chunks, scale,
        *shape, **config,
    )  # fmt: skip
    return partials


# (window, head_dim, value_dim, signed, tokens dense as in views of NCHW maps): EfficientViT at its narrowest
# and widest, Swin at 224 and 384 px.
EXAMPLES = (
    ((7, 7), 16, 16, False, True),
    ((7, 7), 16, 96, False, True),
    ((4, 4), 16, 112, False, True),
    ((7, 7), 32, 32, True, False),
    ((12, 12), 32, 32, True, False),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for window, head_dim, value_dim, signed, tokens_dense in EXAMPLES:
        tokens = window[0] * window[1]
        entries = (2 * window[0] - 1) * (2 * window[1] - 1) if signed else tokens
        heads = 1 if tokens_dense else 2
        q, k, v, out = (
            torch.empty(4, heads, width, tokens, dtype=dtype).transpose(2, 3)
            if tokens_dense
            else torch.empty(4, heads, tokens, width, dtype=dtype)
            for width in (head_dim, head_dim, value_dim, value_dim)
        )
        lse, table = torch.empty(4, heads, tokens), torch.empty(heads, entries)
        inputs = (q, k, v, table, *window, signed, head_dim**-0.5)

        def call(out=out, lse=lse, q=q, k=k, v=v, table=table, inputs=inputs):
            forward(out, lse, *inputs)
            backward(q, k, v, table, out, lse, out, lse, *inputs)

        layout = " tokens dense" if tokens_dense else ""
        yield f"{window[0]}x{window[1]} d={head_dim} dv={value_dim}{layout}", call
