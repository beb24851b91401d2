"""Launches the Triton kernels of polyline path attention: which tiles, how many programs, in which order.

The configuration follows from map, head dims and dtype alone: no autotuning, and a new batch size never recompiles.
native.py says what is saved and how the gradients of the decays are defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from vitkernels.core.triton_tiles import device_of, padded
from vitkernels.kernels.polyline_path_attention.triton_delta import row_products
from vitkernels.kernels.polyline_path_attention.triton_lines import forward_lines
from vitkernels.kernels.polyline_path_attention.triton_lines_backward import backward_lines, rows_lines
from vitkernels.kernels.polyline_path_attention.triton_scan import decay_gradient, sum_decays
from vitkernels.kernels.polyline_path_attention.triton_whole import forward_whole
from vitkernels.kernels.polyline_path_attention.triton_whole_backward import backward_whole, rows_whole


def _rows_of_tile(width: int, itemsize: int) -> int:
    """Tokens whose tiles, and a square of logits, stay in registers."""
    if itemsize == 4:
        return 32 if width <= 64 else 16
    return 64 if width <= 64 else 32


def _channels(head_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    return {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim),
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


def _least_padding(length: int, blocks: tuple[int, ...]) -> int:
    """The block that pads a line least; the largest of equals."""
    return min(blocks, key=lambda block: (-(-length // block) * block, -block))


@cache
def whole_configuration(
    height: int, width: int, head_dim: int, value_dim: int, itemsize: int
) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """The kernels' `size`, and their constants. Owners lie in tiles of as few empty slots as can be."""
    most = _rows_of_tile(max(head_dim, value_dim), itemsize)
    rows = max(16, min(most, next_power_of_2(height) * next_power_of_2(width)))
    narrowest = min(16, next_power_of_2(width))
    shapes = [(rows // x, x) for x in (1, 2, 4, 8, 16, 32, 64) if narrowest <= x <= rows]
    tile_y, tile_x = min(
        shapes, key=lambda s: (-(-height // s[0]) * s[0] * -(-width // s[1]) * s[1], s[0])
    )  # fmt: skip
    constants = {
        "TILE_Y": tile_y, "TILE_X": tile_x, "BLOCK_N": _least_padding(width, (16, 32) if most > 16 else (16,)),
        **_channels(head_dim, value_dim, itemsize),
    }  # fmt: skip
    return (height, width, -(-height // tile_y), -(-width // tile_x)), constants


@cache
def line_configuration(
    lines: int, length: int, head_dim: int, value_dim: int, itemsize: int
) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    most = _rows_of_tile(max(head_dim, value_dim), itemsize)
    if length <= most:
        block = next_power_of_2(length)
        together = max(min(most // block, next_power_of_2(lines)), -(-16 // block))
        blocks = {"LINES": together, "BLOCK_M": block, "BLOCK_N": block}
    else:
        together, block = 1, _least_padding(length, (most // 2, most) if most > 16 else (16,))
        blocks = {"LINES": 1, "BLOCK_M": block, "BLOCK_N": min(block, 32)}
    size = (lines, length, -(-lines // together), -(-length // block))
    return size, {**blocks, **_channels(head_dim, value_dim, itemsize)}


def _scratch(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _strides(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return tuple((0,) * 5 if tensor is None else tensor.stride() for tensor in tensors)


Sides = tuple[Tensor | None, ...]


class _Sweep:
    """The lines of one axis: rows (axis 0 of the planes), or columns (axis 1)."""

    def __init__(self, axis: int, q: Tensor, v: Tensor) -> None:
        batch, height, width, self.heads, head_dim = q.shape
        self.axis = axis
        self.planes = (width, 1) if axis == 0 else (1, width)
        lines, length = (height, width) if axis == 0 else (width, height)
        self.size, self.constants = line_configuration(
            lines, length, head_dim, v.shape[-1], q.element_size()
        )  # fmt: skip
        self.programs = (batch * self.size[2] * self.size[3] * self.heads,)
        # Of products in float32 the operands lie in registers, too many of them to own both sides of a wide head.
        wide = q.element_size() == 4 and max(head_dim, v.shape[-1]) > 64
        self.one = self.size[3] == 1 and not wide  # a program owns whole lines
        self.backward_constants = self.constants
        if q.element_size() == 4 or max(head_dim, v.shape[-1]) > 64:
            # Left alone, ptxas squeezes it into 128 registers and spills.
            self.backward_constants = {**self.constants, "num_warps": 8, "maxnreg": 255}

    def strides(self, *tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
        """(batch, line, position, head, and if there are any, channel)."""
        if self.axis == 0:
            return _strides(*tensors)
        return tuple((s[0], s[2], s[1], *s[3:]) for s in _strides(*tensors))

    def forward(
        self, out: Tensor, second_out: Tensor | None, lse: Tensor | None, base: Tensor | None, q: Tensor, k: Tensor,
        v: Tensor, second_v: Tensor | None, sums: Tensor, scale: float,
    ) -> None:  # fmt: skip
        forward_lines[self.programs](
            out, second_out, lse, base, q, k, v, second_v, sums,
            *self.strides(out, second_out, base, q, k, v, second_v), self.size, self.planes, self.heads, scale,
            **self.constants,
        )  # fmt: skip

    def rows(self, rows: Tensor, queries: Sides, keys: Sides, sums: Tensor, scale: float) -> None:
        rows_lines[self.programs](
            rows, *queries, *keys, sums, *self.strides(*queries, *keys), self.size, self.planes, self.heads,
            sums.numel(), scale, **self.backward_constants,
        )  # fmt: skip

    def backward(
        self, gradients: Sides, owners: Sides, walked: Sides, sums: Tensor, lse: Tensor, rows: Tensor | None,
        scale: float, *, keys: bool = True, one: bool = False, add: bool = False,
    ) -> None:  # fmt: skip
        """gradients: grad, other_grad, grad_v, passed, part, other_part."""
        backward_lines[self.programs](
            *gradients, *owners, *walked, sums, lse, rows, *self.strides(*gradients[:4], *owners, *walked), self.size,
            self.planes, self.heads, sums.numel(), scale, KEYS=keys, ONE=one, ADD=add, **self.backward_constants,
        )  # fmt: skip


def _scan_programs(axis: int, shape: torch.Size) -> tuple[tuple[int], tuple[Any, ...], dict[str, int]]:
    """(grid, (plane strides, decay stride order, size), constants) of the scans along an axis."""
    batch, height, width, heads = shape[:4]
    lines, length = (height, width) if axis == 0 else (width, height)
    block = min(next_power_of_2(length), 128)
    together = min(next_power_of_2(lines), max(1, 1024 // block))
    groups = -(-lines // together)
    planes = (width, 1) if axis == 0 else (1, width)
    return (
        (batch * heads * groups,), (planes, (lines, length, groups)),
        {"LINES": together, "BLOCK": block, "num_warps": 4},
    )  # fmt: skip


def _decay_strides(axis: int, decay: Tensor) -> tuple[int, ...]:
    b, y, x, h = decay.stride()
    return (b, y, x, h) if axis == 0 else (b, x, y, h)


def forward(
    out: Tensor,
    lse: Tensor,
    cum: Tensor,
    partial: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    criss_cross: bool,
    scale: float,
) -> None:
    """Fills out and what the backward pass reads: lse, cum, partial."""
    heads = q.shape[3]
    with device_of(q):
        for axis, decay in enumerate((log_decay_w, log_decay_h)):
            grid, (planes, size), constants = _scan_programs(axis, q.shape)
            sum_decays[grid](cum[axis], decay, planes, _decay_strides(axis, decay), size, heads, **constants)
        products = partial.view(partial.shape[0], *v.shape)
        if criss_cross:
            rows, columns = _Sweep(0, q, v), _Sweep(1, q, v)
            of_rows, of_columns, through = products
            rows.forward(of_rows, None, lse[0], None, q, k, v, None, cum[0], scale)
            columns.forward(through, of_columns, lse[1], None, q, k, of_rows, v, cum[1], scale)
            rows.forward(out, None, None, through, q, k, of_columns, None, cum[0], scale)
            return
        size, constants = whole_configuration(*q.shape[1:3], q.shape[4], v.shape[4], q.element_size())
        forward_whole[(q.shape[0] * size[2] * size[3] * heads,)](
            out, products[0], lse, q, k, v, cum, *_strides(out, products[0], q, k, v), size, heads,
            lse[0].numel(), scale, **constants,
        )  # fmt: skip


def backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_log_decay_w: Tensor | None,
    grad_log_decay_h: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_cum: Tensor | None,
    grad_partial: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cum: Tensor,
    partial: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    criss_cross: bool,
    scale: float,
) -> None:
    """Fills the gradients that are not None; those of by-products are ignored."""
    wanted = (grad_q, grad_k, grad_v, grad_log_decay_w, grad_log_decay_h)
    if grad_out is None:
        for grad in wanted:
            if grad is not None:
                grad.zero_()
        return
    if all(grad is None for grad in wanted):
        return
    decays = (grad_log_decay_w, grad_log_decay_h)
    products = partial.view(partial.shape[0], *v.shape)
    run = _backward_criss_cross if criss_cross else _backward_whole
    with device_of(q):
        parts = run(*wanted, grad_out, out, lse, cum, products, q, k, v, scale)
        for axis, (grad, part) in enumerate(zip(decays, parts, strict=True)):
            if grad is not None:
                grid, (planes, size), constants = _scan_programs(axis, q.shape)
                decay_gradient[grid](
                    grad, part, planes, _decay_strides(axis, grad), size, q.shape[3], part[0].numel(), part.shape[0],
                    **constants,
                )  # fmt: skip


def _row_products(delta: Tensor, grad_out: Tensor, out: Tensor, partial: Tensor) -> None:
    batch, height, width, heads, value_dim = out.shape
    block_v = padded(value_dim)
    block = max(16, 4096 // block_v)
    blocks = -(-height * width // block)
    row_products[(batch * heads * blocks,)](
        delta, grad_out, out, partial, *_strides(grad_out, out, partial), (height, width, blocks), heads,
        delta[0].numel(), VALUE_DIM=value_dim, BLOCK_M=block, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip


def _backward_whole(
    grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None, grad_w: Tensor | None, grad_h: Tensor | None,
    grad_out: Tensor, out: Tensor, lse: Tensor, cum: Tensor, products: Tensor, q: Tensor, k: Tensor, v: Tensor,
    scale: float,
) -> Sides:  # fmt: skip
    """Fills the gradients of q, k and v; returns the parts of those of the sums."""
    batch, height, width, heads, head_dim = q.shape
    size, constants = whole_configuration(height, width, head_dim, v.shape[4], q.element_size())
    # Tables of corners and two softmaxes leave few registers. Products of half precision take their rows by warps: more
    # of those than rows would compute the same twice.
    if q.element_size() == 4:
        constants = {**constants, "num_warps": 8, "maxnreg": 192}
    else:
        constants = {**constants, "BLOCK_N": 16}
    programs = (batch * size[2] * size[3] * heads,)
    planes, pair = (batch, heads, height, width), lse[0].numel()
    exact = q.dtype is torch.float32
    rows = _scratch(q, torch.float32, 6 if exact else 2, *planes)
    of_queries, of_keys = (q, grad_out, k, v), (k, v, q, grad_out)
    if exact:
        rows_whole[programs](
            rows, *of_queries, cum, *_strides(*of_queries), size, heads, pair, scale, **constants
        )
    else:
        _row_products(rows, grad_out, out, products[0])
    parts: Sides = (None, None)
    if grad_w is not None or grad_h is not None:
        parts = tuple(_scratch(q, torch.float32, 2 + 2 * size[3], *planes) for _ in range(2))
    for keys, grads, sides in ((False, (grad_q, None), of_queries), (True, (grad_k, grad_v), of_keys)):
        if parts[0] is None and grads == (None, None):
            continue
        backward_whole[programs](
            *grads, *parts, *sides, cum, lse, rows, *_strides(*grads, *sides), size, heads, pair, scale, KEYS=keys,
            EXACT=exact, **constants,
        )  # fmt: skip
    return parts


def _backward_criss_cross(
    grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None, grad_w: Tensor | None, grad_h: Tensor | None,
    grad_out: Tensor, out: Tensor, lse: Tensor, cum: Tensor, products: Tensor, q: Tensor, k: Tensor, v: Tensor,
    scale: float,
) -> Sides:  # fmt: skip
    """Fills the gradients of q, k and v; returns the parts of those of the sums."""
    batch, height, width, heads, _ = q.shape
    planes = (batch, heads, height, width)
    of_rows, of_columns, _ = products
    through_rows, through_columns = (_scratch(q, v.dtype, *v.shape) for _ in range(2))
    parts = tuple(
        None if grad is None else _scratch(q, torch.float32, 2, *planes) for grad in (grad_w, grad_h)
    )
    sweeps = rows, columns = _Sweep(0, q, v), _Sweep(1, q, v)
    scratch = None if all(sweep.one for sweep in sweeps) else _scratch(q, torch.float32, 3, *planes)
    rows.backward(
        (None, None, None, through_rows, None, None), (k, None, None), (q, grad_out, None), cum[0], lse[0], None, scale
    )  # fmt: skip
    for sweep, y, z, passed in (
        (columns, of_rows, through_rows, through_columns),
        (rows, of_columns, through_columns, None),
    ):
        part, sums, norm, last = parts[sweep.axis], cum[sweep.axis], lse[sweep.axis], sweep is rows
        key_part, query_part = (None, None) if part is None else (part[0], part[1])
        queries, keys = (q, grad_out, z), (k, y, v)
        if sweep.one:
            gradients = (grad_k, grad_q, grad_v, passed, key_part, query_part)
            sweep.backward(gradients, keys, queries, sums, norm, None, scale, one=True, add=last)
            continue
        sweep.rows(scratch, queries, keys, sums, scale)
        gradients = (grad_k, None, grad_v, passed, key_part, None)
        sweep.backward(gradients, keys, queries, sums, norm, scratch, scale, add=last)
        if grad_q is not None or part is not None:
            gradients = (grad_q, None, None, None, query_part, None)
            sweep.backward(gradients, queries, keys, sums, norm, scratch, scale, keys=False, add=last)
    return parts


# (height, width, head_dim and value_dim, whether criss-cross): PPMA at 224 px, at 800 x 1344 px, the widest heads.
EXAMPLES = (
    (14, 14, 32, False),
    (50, 84, 32, False),
    (14, 14, 128, False),
    (56, 56, 16, True),
    (200, 336, 16, True),
    (14, 40, 128, True),
)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for height, width, channels, criss_cross in EXAMPLES:
        q, k, v = torch.empty(1, height, width, 3, 2, channels, dtype=dtype).unbind(3)
        out = torch.empty(q.shape, dtype=dtype)
        decay = torch.empty(1, height, width, 2)
        lse, cum = torch.empty(2, 2, 1, 2, height, width)
        partial = torch.empty(3 if criss_cross else 1, 1, height, width, 2 * channels, dtype=dtype)
        inputs = (q, k, v, decay, decay, criss_cross, channels**-0.5)

        def call(saved=(out, lse, cum, partial), inputs=inputs):
            forward(*saved, *inputs)
            backward(*inputs[:5], saved[0], None, None, None, *saved, *inputs)

        yield f"{height}x{width} d={channels}{' criss-cross' if criss_cross else ''}", call
