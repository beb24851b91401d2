"""Launches the Triton kernels of neighborhood attention: which tiles, how many programs.

The configuration follows from map, kernel, head dims and dtype alone: no autotuning, and a new batch size never
recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.neighborhood_attention.triton_backward import backward_key_map, backward_query_map
from vitkernels.kernels.neighborhood_attention.triton_forward import forward_map
from vitkernels.kernels.neighborhood_attention.triton_rpb import backward_rpb_map, reduce_rpb_map

# Programs that fill a large GPU a few times over; the rpb gradient sums further maps in registers.
RPB_PROGRAMS = 2048
# Of partial sums, beyond the one chunk that there must be.
PARTIAL_BYTES = 64 << 20


@cache
def tile_shape(rows: int, columns: int, groups: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    """Height and width of tiles of up to `rows` tokens, of groups of the given size, that make the least work.

    The work of a tile is the blocks of `columns` slots in the box that it meets; a tile costs one more to begin.
    Equal tiles, so that none is nearly empty.
    """
    best, least = (1, 1), None
    for most in range(1, min(rows, groups[0]) + 1):
        tiles_y, tiles_x = -(-groups[0] // most), -(-groups[1] // min(rows // most, groups[1]))
        tile = -(-groups[0] // tiles_y), -(-groups[1] // tiles_x)
        met = [min(t + k - 1, n) for t, k, n in zip(tile, kernel, groups, strict=True)]
        work = tiles_y * tiles_x * (1 + -(-met[0] * met[1] // columns))
        if least is None or work < least:
            best, least = tile, work
    return best


@cache
def configuration(
    sizes: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    head_dim: int,
    value_dim: int,
    itemsize: int,
) -> tuple[tuple[int, ...], dict[str, int], int]:
    """The kernels' `size`, their constants, and the tiles of a map."""
    groups = tuple(-(-n // d) for n, d in zip(sizes, dilation, strict=True))
    width, tokens = max(head_dim, value_dim), padded(groups[0] * groups[1])
    # Of fp32 products both operands lie in registers.
    narrow, wide = (64, 128) if itemsize == 2 else (32, 128)
    block_m = min(tokens, 64 if width <= narrow else 32 if width <= wide or itemsize == 2 else 16)
    block_n = min(block_m, 32)
    tile = tile_shape(block_m, block_n, groups, kernel)
    tiles = tuple(-(-n // t) for n, t in zip(groups, tile, strict=True))
    constants = {
        "TILE_Y": tile[0], "TILE_X": tile[1], "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim),
        "num_warps": 8 if itemsize == 4 or width > 128 else 4, "num_stages": 1,
    }  # fmt: skip
    return (*sizes, *dilation, *tiles), constants, tiles[0] * tiles[1] * dilation[0] * dilation[1]


def _on_map(values: Sequence[Any], before: Any) -> tuple[Any, Any]:
    """A value for each of two axes: a sequence is a map of height 1."""
    return (before, values[0]) if len(values) == 1 else (values[0], values[1])


def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """(batch, y, x, head, and if there are any, channel)."""
    if tensor is None:
        return (0,) * 5
    strides = tensor.stride()
    return strides if axes == 2 else (strides[0], 0, *strides[1:])


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
    ) -> None:
        self.axes = len(kernel_size)
        self.batch, self.heads, head_dim, value_dim = q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1]
        kernel, causal = _on_map(kernel_size, 1), _on_map([bool(causal) for causal in is_causal], False)
        sizes, dilations = _on_map(q.shape[1 : 1 + self.axes], 1), _on_map(dilation, 1)
        self.size, constants, self.tiles = configuration(
            sizes, kernel, dilations, head_dim, value_dim, q.element_size()
        )
        self.constants = {
            "KERNEL_Y": kernel[0], "KERNEL_X": kernel[1], "CAUSAL_Y": causal[0], "CAUSAL_X": causal[1],
            "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, **constants,
        }  # fmt: skip

    def strides(self, *tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
        return tuple(_strides(tensor, self.axes) for tensor in tensors)


def forward(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> None:
    """Fills out, and lse unless it is None."""
    call = _Call(q, v, kernel_size, dilation, is_causal)
    if q.dtype is torch.float32:
        call.constants["maxnreg"] = 128  # left alone, ptxas squeezes it into 80 registers and spills
    with device_of(q):
        forward_map[(call.batch * call.tiles * call.heads,)](
            out, lse, q, k, v, None if rpb is None else rpb.contiguous(), *call.strides(out, lse, q, k, v),
            call.size, call.heads, scale, **call.constants,
        )  # fmt: skip


def batch_chunks(batch: int, per_chunk: int, chunk_bytes: int) -> int:
    """Into how many chunks the maps are split, evenly, for enough programs and not too many bytes."""
    limit = max(1, min(RPB_PROGRAMS // per_chunk, PARTIAL_BYTES // chunk_bytes))
    rounds = -(-batch // limit)
    return -(-batch // rounds)


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_rpb: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> None:
    """Fills the gradients that are not None; an absent incoming gradient is zero."""
    if grad_out is None:
        if grad_v is not None:
            grad_v.zero_()
            grad_v = None
        if grad_lse is None:
            for grad in (grad_q, grad_k, grad_rpb):
                if grad is not None:
                    grad.zero_()
            return
    if grad_q is None and grad_k is None and grad_v is None and grad_rpb is None:
        return
    call = _Call(q, v, kernel_size, dilation, is_causal)
    rpb = None if rpb is None else rpb.contiguous()
    programs = (call.batch * call.tiles * call.heads,)
    delta = _scratch(q, *q.shape[:-1])
    norm = _scratch(q, *q.shape[:-1]) if q.dtype is torch.float32 else None
    with device_of(q):
        backward_query_map[programs](
            grad_q, delta, norm, grad_out, grad_lse, out, lse, q, k, v, rpb,
            *call.strides(grad_q, grad_out, grad_lse, out, lse, q, k, v), call.size, call.heads, scale,
            **call.constants,
        )  # fmt: skip
        if grad_k is not None or grad_v is not None:
            backward_key_map[programs](
                grad_k, grad_v, grad_out, lse, delta, norm, q, k, v, rpb,
                *call.strides(grad_k, grad_v, grad_out, lse, q, k, v), call.size, call.heads, scale,
                **call.constants,
            )  # fmt: skip
        if grad_rpb is not None:
            _backward_rpb(call, grad_rpb, grad_out, lse, delta, norm, q, k, v, rpb, scale)


def _backward_rpb(
    call: _Call,
    grad_rpb: Tensor,
    grad_out: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    norm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    scale: float,
) -> None:
    (height, width, *dilation, _, _), constants = call.size, call.constants
    kernel = constants["KERNEL_Y"], constants["KERNEL_X"]
    tile = constants["TILE_Y"], constants["TILE_X"]
    met = [
        min(t + k - 1, -(-n // d)) for t, k, n, d in zip(tile, kernel, (height, width), dilation, strict=True)
    ]
    blocks = -(-met[0] * met[1] // constants["BLOCK_N"])
    window = kernel[0] * kernel[1]
    per_chunk = call.tiles * call.heads * blocks
    chunks = batch_chunks(call.batch, per_chunk, 4 * call.heads * window * height * width)
    if max(constants["HEAD_DIM"], constants["VALUE_DIM"]) > 64:
        constants = {**constants, "num_warps": 8}  # or it spills
    partials = _scratch(q, chunks, call.heads, window, height * width)
    backward_rpb_map[(chunks * per_chunk,)](
        partials, grad_out, lse, delta, norm, q, k, v, rpb, *call.strides(grad_out, lse, q, k, v), call.size,
        call.batch, call.heads, chunks, blocks, scale, **constants,
    )  # fmt: skip
    strides = grad_rpb.stride()
    reduce_rpb_map[(grad_rpb.numel(),)](
        grad_rpb, partials, strides[0], 0 if call.axes == 1 else strides[1], strides[-1], call.size, call.heads,
        chunks, KERNEL_Y=kernel[0], KERNEL_X=kernel[1], BLOCK=min(1024, padded(height * width)), num_warps=4,
    )  # fmt: skip


# (map, kernel, dilation, causal, head_dim and value_dim): MedViTV2 and NAT at 224 px, a dilated causal sequence,
# the widest heads.
EXAMPLES = (
    ((56, 56), 7, 1, False, 32),
    ((512,), 16, 4, True, 64),
    ((28, 28), 7, 2, False, 256),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for sizes, kernel, dilation, causal, width in EXAMPLES:
        axes = len(sizes)
        q, k, v = torch.empty(2, *sizes, 3, 2, width, dtype=dtype).unbind(1 + axes)
        out, lse = torch.empty(q.shape, dtype=dtype), torch.empty(q.shape[:-1])
        rpb = None if causal else torch.empty(2, *(2 * kernel - 1,) * axes)
        params = ((value,) * axes for value in (kernel, 1, dilation, causal))
        inputs = (q, k, v, rpb, *params, width**-0.5)

        def call(out=out, lse=lse, q=q, k=k, v=v, rpb=rpb, inputs=inputs):
            forward(out, lse, *inputs)
            backward(q, k, v, rpb, out, lse, out, lse, *inputs)

        yield f"{'x'.join(map(str, sizes))} k={kernel} d={width}{' causal' if causal else ''}", call
