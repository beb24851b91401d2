"""Launches the Triton kernels of strip attention: which kernels, which tiles, how many programs.

The configuration follows from tokens, widths and dtype alone: no autotuning, and a new batch size never recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.strip_attention.native import fold, logit_gradient, spread
from vitkernels.kernels.strip_attention.triton_backward import backward_keys, backward_queries, sum_shares
from vitkernels.kernels.strip_attention.triton_forward import forward_queries

# Programs of 128 threads that fill a large GPU about twice over.
BACKWARD_PROGRAMS = 512
# Fewest tiles of queries for which a program's partial gradients of keys and values are worth their traffic.
TILES_A_SHARE = 4


@cache
def configuration(
    kernel: str, queries: int, keys: int, width: int, value_dim: int, itemsize: int, biased: bool
) -> dict[str, int]:
    """Tiles and warps of a kernel, "forward", "queries" or "keys", as large as registers allow without spills.

    A tile of a bias takes a 64-bit address and a mask an element.
    """
    wide = biased or width > 16 or value_dim > 64
    rows, columns = padded(queries), padded(keys)
    config = {"OUTER": outer(width, itemsize), "BLOCK_R": padded(width), "BLOCK_V": padded(value_dim)}
    config |= {"num_stages": 1}
    if itemsize == 4:
        # fp32 products run on the FMA units with both operands in registers: more threads, or they spill.
        config["num_warps"] = 8
        if kernel == "forward":
            return {"BLOCK_M": min(rows, 64), "BLOCK_N": min(columns, 32), **config}
        if wide:
            return {"BLOCK_M": 16, "BLOCK_N": 16, **config}
        config = {"BLOCK_M": min(rows, 32), "BLOCK_N": min(columns, 32), **config}
        # Left alone, ptxas squeezes this one into 64 registers and spills.
        return {**config, "maxnreg": 128} if kernel == "keys" and config["OUTER"] else config
    block_m, block_n = min(rows, 64), min(columns, 64)
    if kernel == "keys" and not wide and block_m == block_n == 64 and keys <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, **config}
    if kernel != "forward" or biased:
        block_n = min(columns, 32)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": block_m // 16, **config}


def outer(width: int, itemsize: int) -> bool:
    """Whether logits are outer products on the FMA units; see triton_logits.py."""
    return width == 1 and itemsize == 4


def query_shares(tiles: int, programs: int) -> tuple[int, int]:
    """(shares, tiles a share) that split the queries of `programs` tiles of keys, evenly."""
    wanted = min(BACKWARD_PROGRAMS // programs, tiles // TILES_A_SHARE)
    each = -(-tiles // max(1, wanted))
    return -(-tiles // each), each


def _strides(tensor: Tensor | None, dims: int = 4) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    scale: float,
) -> None:
    """Fills out, and lse unless it is None."""
    batch, heads, queries, width = q.shape
    keys, value_dim = v.shape[2:]
    bias = spread(attn_bias, q, k)
    config = configuration("forward", queries, keys, width, value_dim, q.element_size(), bias is not None)
    with device_of(q):
        forward_queries[(batch * heads * -(-queries // config["BLOCK_M"]),)](
            out, lse, q, k, v, bias, *out.stride(), *_strides(lse, 3), *q.stride(), *k.stride(), *v.stride(),
            *_strides(bias), heads, queries, keys, scale, WIDTH=width, VALUE_DIM=value_dim,
            CLOSED=width == 1 and bias is None, BLOCK_K=min(1024, triton.next_power_of_2(keys)), **config,
        )  # fmt: skip


def backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_attn_bias: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    scale: float,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero."""
    if grad_out is None:
        if grad_v is not None:
            grad_v.zero_()
            grad_v = None
        if grad_lse is None:
            for grad in (grad_q, grad_k, grad_attn_bias):
                if grad is not None:
                    grad.zero_()
            return
    if grad_q is None and grad_k is None and grad_v is None and grad_attn_bias is None:
        return
    batch, heads, queries, width = q.shape
    keys, value_dim = v.shape[2:]
    bias, grad_bias = spread(attn_bias, q, k), logit_gradient(grad_attn_bias, q, k)
    shape = (queries, keys, width, value_dim, q.element_size(), bias is not None)
    config = configuration("keys", *shape)
    tiles = -(-keys // config["BLOCK_N"])
    inputs = (*lse.stride(), *q.stride(), *k.stride(), *v.stride(), *_strides(bias))
    widths = {"WIDTH": width, "VALUE_DIM": value_dim}
    with device_of(q):
        delta, factors, query_results = None, None, (grad_q, grad_bias)
        if tiles > 1:
            delta, query_results = _scratch(q, batch, heads, queries), (None, None)
            factors = _scratch(q, batch, heads, queries) if q.dtype is torch.float32 else None
            mine = configuration("queries", *shape)
            backward_queries[(batch * heads * -(-queries // mine["BLOCK_M"]),)](
                grad_q, grad_bias, delta, factors, grad_out, grad_lse, out, lse, q, k, v, bias,
                *_strides(grad_q), *_strides(grad_bias), *_strides(grad_out), *_strides(grad_lse, 3),
                *out.stride(), *inputs, heads, queries, keys, scale, **widths, **mine,
            )  # fmt: skip
        if tiles == 1 or grad_k is not None or grad_v is not None:
            shares, each = query_shares(-(-queries // config["BLOCK_M"]), batch * heads * tiles)
            partials = [
                None if grad is None or shares == 1 else _scratch(q, batch * heads, shares, *grad.shape[2:])
                for grad in (grad_k, grad_v)
            ]
            backward_keys[(batch * heads * tiles * shares,)](
                query_results[0], grad_k, grad_v, query_results[1], *partials, delta, factors, grad_out,
                grad_lse, lse, q, k, v, bias, *_strides(query_results[0]), *_strides(grad_k), *_strides(grad_v),
                *_strides(query_results[1]), *_strides(grad_out), *_strides(grad_lse, 3), *inputs,
                heads, queries, keys, shares, each, scale, **widths, **config,
            )  # fmt: skip
            for grad, partial in zip((grad_k, grad_v), partials, strict=True):
                if grad is not None and partial is not None:
                    _sum_shares(grad, partial)
        fold(grad_attn_bias, grad_bias)


def _sum_shares(grad: Tensor, partial: Tensor) -> None:
    batch, heads, keys, width = grad.shape
    block_w = triton.next_power_of_2(width)
    block_n = max(1, min(triton.next_power_of_2(keys), 1024 // block_w))
    sum_shares[(batch * heads * -(-keys // block_n),)](
        grad, partial, *grad.stride(), heads, keys, partial.shape[1], WIDTH=width, BLOCK_N=block_n,
        BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip


# (queries, keys, r, dv, biased): S2AFormer's first and last stage at 224 px and first at 512; biased and wider heads;
# several channels.
EXAMPLES = (
    (3136, 49, 1, 64, False),
    (49, 49, 1, 64, False),
    (16384, 256, 1, 64, False),
    (784, 196, 1, 96, True),
    (3136, 49, 4, 64, False),
    (784, 196, 64, 128, True),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for queries, keys, width, value_dim, biased in EXAMPLES:
        heads = 2

        def tokens(count: int, channels: int, heads: int = heads) -> Tensor:
            return torch.empty(1, count, heads, channels, dtype=dtype).transpose(1, 2)

        q, k, v, out = (
            tokens(queries, width), tokens(keys, width), tokens(keys, value_dim), tokens(queries, value_dim)
        )  # fmt: skip
        lse = torch.empty(1, heads, queries)
        bias = torch.empty(heads, queries, keys) if biased else None
        inputs = (q, k, v, bias, width**-0.5)

        def call(out=out, lse=lse, q=q, k=k, v=v, bias=bias, inputs=inputs):
            forward(out, lse, *inputs)
            backward(q, k, v, bias, out, lse, out, lse, *inputs)

        yield f"{queries}x{keys} r={width} dv={value_dim}{' bias' if biased else ''}", call
