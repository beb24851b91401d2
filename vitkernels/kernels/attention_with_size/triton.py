"""Launches the Triton kernels of proportional attention: which tiles, how many programs.

The configuration follows from head dims and dtype alone: no autotuning, and neither a new batch size nor the shorter
sequence of the next layer recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.attention_with_size.triton_backward import backward_keys, backward_queries
from vitkernels.kernels.attention_with_size.triton_forward import forward_queries


@cache
def configuration(kernel: str, head_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Tiles and warps of a kernel, "forward", "queries" or "keys", as large as registers allow without spills."""
    config = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    config |= {"BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim)}
    wide = max(head_dim, value_dim) > 64
    if itemsize == 4:
        # fp32 products run on the FMA units with both operands in registers: more threads, or they spill.
        block = 16 if wide else 32
        tile = {"BLOCK_M": 2 * block if kernel == "forward" else block, "BLOCK_N": block}
        return {**tile, **config, "num_warps": 8, "num_stages": 1}
    if kernel == "forward":
        return {"BLOCK_M": 64, "BLOCK_N": 64, **config, "num_warps": 4, "num_stages": 2}
    # The kernel's own tile is 64 long, the one that it walks with shorter where registers are scarce.
    if kernel == "queries":
        return {"BLOCK_M": 64, "BLOCK_N": 32 if wide else 64, **config, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 64, **config, "num_warps": 8 if wide else 4, "num_stages": 2}


def _strides(tensor: Tensor | None, dims: int = 4) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float
) -> None:
    """Fills out, and lse unless it is None."""
    batch, heads, queries, head_dim = q.shape
    keys, value_dim = v.shape[2:]
    config = configuration("forward", head_dim, value_dim, q.element_size())
    with device_of(q):
        forward_queries[(batch * heads * triton.cdiv(queries, config["BLOCK_M"]),)](
            out, lse, q, k, v, size, *out.stride(), *_strides(lse, 3), *q.stride(), *k.stride(), *v.stride(),
            *size.stride(), heads, queries, keys, scale, **config,
        )  # fmt: skip


def backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_size: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor,
    scale: float,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero, as is that of size."""
    if grad_size is not None:
        grad_size.zero_()
    if grad_out is None:
        absent = (grad_v,) if grad_lse is not None else (grad_q, grad_k, grad_v)
        for grad in absent:
            if grad is not None:
                grad.zero_()
        grad_v = None
        if grad_lse is None:
            return
    if grad_q is None and grad_k is None and grad_v is None:
        return
    batch, heads, queries, head_dim = q.shape
    keys, value_dim = v.shape[2:]
    shape = (head_dim, value_dim, q.element_size())
    inputs = (*q.stride(), *k.stride(), *v.stride(), *size.stride(), heads, queries, keys, scale)
    delta = factors = None
    with device_of(q):
        if q.dtype is torch.float32:
            factors = _scratch(q, batch, heads, queries)
        if grad_q is not None or grad_k is not None or factors is not None:
            delta = _scratch(q, batch, heads, queries)
            config = configuration("queries", *shape)
            backward_queries[(batch * heads * triton.cdiv(queries, config["BLOCK_M"]),)](
                grad_q, delta, factors, grad_out, grad_lse, out, lse, q, k, v, size, *_strides(grad_q),
                *_strides(grad_out), *_strides(grad_lse, 3), *out.stride(), *lse.stride(), *inputs, **config,
            )  # fmt: skip
        if grad_k is not None or grad_v is not None:
            config = configuration("keys", *shape)
            backward_keys[(batch * heads * triton.cdiv(keys, config["BLOCK_N"]),)](
                grad_k, grad_v, delta, factors, grad_out, lse, q, k, v, size, *_strides(grad_k),
                *_strides(grad_v), *_strides(grad_out), *lse.stride(), *inputs, **config,
            )  # fmt: skip


# (tokens, head dim): ViT and DeiT at 224, and the widest.
EXAMPLES = ((181, 64), (1330, 128))


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for tokens, head_dim in EXAMPLES:
        q, k, v = torch.empty(1, tokens, 3, 2, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        out = torch.empty(1, tokens, 2, head_dim, dtype=dtype).transpose(1, 2)
        lse, inputs = torch.empty(1, 2, tokens), (q, k, v, torch.empty(1, tokens), head_dim**-0.5)

        def call(out=out, lse=lse, inputs=inputs):
            q, k, v = inputs[:3]
            forward(out, lse, *inputs)
            backward(q, k, v, None, out, None, out, lse, *inputs)

        yield f"{tokens} tokens, d={head_dim}", call
