"""Triton kernels of the polyline path scan, and their launchers.

A program has a whole line of tokens of one head, [tokens, channels], in registers, and runs the recurrences as
associative scans over pairs (decay, value), which keeps sums of neighbors together and divides by nothing:

    f_(i-1) and a_(i+1) r_(i+1) are scans of the tokens before and after,   y_i = x_i + a_i f_(i-1) + a_(i+1) r_(i+1)

Floor: the tokens read and written once an axis over the bandwidth. The second product works in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkernels.core import native
from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import device_of
from vitkernels.kernels.polyline_path_scan.native import gradient_place

TILE = 2048  # elements of a program's tile of tokens; half as many where two tensors are scanned both ways


@jit
def _combine(decay, value, next_decay, next_value):
    return decay * next_decay, next_decay * value + next_value


@jit
def _decays(base, step, place, shift, LENGTH):
    """The decays before the tokens at place + shift; 0 before the first and beyond the last."""
    at = place + shift
    inside = (at > 0) & (at < LENGTH)
    logs = tl.load(base + at.to(tl.int64) * step, mask=inside, other=0.0)
    return tl.where(inside, tl.exp(logs.to(tl.float32)), 0.0)


@jit
def _tokens(base, step, place, shift, channels, LENGTH, HEAD_DIM):
    at = place + shift
    inside = ((at >= 0) & (at < LENGTH))[:, None] & (channels < HEAD_DIM)[None, :]
    offsets = at.to(tl.int64)[:, None] * step + channels[None, :]
    return tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)


@jit
def _before(base, step, decays, decay_step, place, channels, LENGTH, HEAD_DIM):
    """f_(i-1) of the tokens at base."""
    values = _tokens(base, step, place, -1, channels, LENGTH, HEAD_DIM)
    factors = _decays(decays, decay_step, place, -1, LENGTH)[:, None] + tl.zeros_like(values)
    _, f = tl.associative_scan((factors, values), 0, _combine)
    return f


@jit
def _after(base, step, decays, decay_step, place, channels, LENGTH, HEAD_DIM):
    """a_(i+1) r_(i+1) of the tokens at base."""
    values = _tokens(base, step, place, 1, channels, LENGTH, HEAD_DIM)
    factors = _decays(decays, decay_step, place, 2, LENGTH)[:, None] + tl.zeros_like(values)
    _, r = tl.associative_scan((factors, values), 0, _combine, reverse=True)
    return _decays(decays, decay_step, place, 1, LENGTH)[:, None] * r


@jit
def product_lines(
    out, x, decays, lines, heads, channel_tiles, LENGTH, HEAD_DIM, out_b, out_line, out_place, out_head, x_b, x_line,
    x_place, x_head, decay_b, decay_line, decay_place, decay_head, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = the product of the masks of all lines and x, which out may be."""
    program = tl.program_id(0)
    channels = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    head = (program // channel_tiles % heads).to(tl.int64)
    line = (program // channel_tiles // heads % lines).to(tl.int64)
    b = (program // channel_tiles // heads // lines).to(tl.int64)
    place = tl.arange(0, BLOCK_T)
    x += b * x_b + line * x_line + head * x_head
    out += b * out_b + line * out_line + head * out_head
    decays += b * decay_b + line * decay_line + head * decay_head
    before = _before(x, x_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM)
    after = _after(x, x_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM)
    here = _decays(decays, decay_place, place, 0, LENGTH)[:, None]
    y = _tokens(x, x_place, place, 0, channels, LENGTH, HEAD_DIM) + here * before + after
    tl.debug_barrier()  # x may be out: all have read
    inside = (place < LENGTH)[:, None] & (channels < HEAD_DIM)[None, :]
    offsets = place.to(tl.int64)[:, None] * out_place + channels[None, :]
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


@jit
def gradient_lines(
    out, grad_decays, grad, x, decays, lines, heads, LENGTH, HEAD_DIM, out_b, out_line, out_place, out_head, grad_b,
    grad_line, grad_place, grad_head, x_b, x_line, x_place, x_head, decay_b, decay_line, decay_place, decay_head,
    gd_b, gd_line, gd_place, gd_head, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = the product of the masks and grad; grad_decays of what multiplied x. out may be grad or x.

    local memory: up to 8 bytes: on sm_80 ptxas keeps to 80 or 128 registers, and an address or two wait outside.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    line = (program // heads % lines).to(tl.int64)
    b = (program // heads // lines).to(tl.int64)
    place = tl.arange(0, BLOCK_T)
    x += b * x_b + line * x_line + head * x_head
    grad += b * grad_b + line * grad_line + head * grad_head
    out += b * out_b + line * out_line + head * out_head
    decays += b * decay_b + line * decay_line + head * decay_head
    grad_decays += b * gd_b + line * gd_line + head * gd_head
    here = _decays(decays, decay_place, place, 0, LENGTH)
    received = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, HEAD_DIM, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        mu = _before(grad, grad_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM)
        g = _tokens(grad, grad_place, place, 0, channels, LENGTH, HEAD_DIM)
        lam = g + _after(grad, grad_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM)
        f = _before(x, x_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM)
        r = _tokens(x, x_place, place, 0, channels, LENGTH, HEAD_DIM) + _after(
            x, x_place, decays, decay_place, place, channels, LENGTH, HEAD_DIM
        )
        received += tl.sum(lam * f + mu * r, 1)
        tl.debug_barrier()  # out may be grad or x: all have read
        inside = (place < LENGTH)[:, None] & (channels < HEAD_DIM)[None, :]
        offsets = place.to(tl.int64)[:, None] * out_place + channels[None, :]
        tl.store(out + offsets, (lam + here[:, None] * mu).to(out.dtype.element_ty), mask=inside)
    offsets = place.to(tl.int64) * gd_place
    tl.store(grad_decays + offsets, (received * here).to(grad_decays.dtype.element_ty), mask=place < LENGTH)


def strides(tensor: Tensor, rows: bool) -> tuple[int, ...]:
    """Of tokens or decays along rows or columns: image, line, place, head."""
    b, row, column, head = tensor.stride()[:4]
    return (b, row, column, head) if rows else (b, column, row, head)


def configuration(length: int, head_dim: int, gradient: bool) -> dict[str, int]:
    tile, a_thread = (TILE // 2, 4) if gradient else (TILE, 8)  # elements; more of them spill
    block_t = triton.next_power_of_2(length)
    block_c = max(1, min(triton.next_power_of_2(head_dim), tile // block_t))
    warps = max(1, min(8, block_t * block_c // (32 * a_thread)))
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": warps}


def _product(out: Tensor, x: Tensor, decays: Tensor, rows: bool) -> None:
    batch, height, width, heads, head_dim = x.shape
    lines, length = (height, width) if rows else (width, height)
    config = configuration(length, head_dim, False)
    channel_tiles = triton.cdiv(head_dim, config["BLOCK_C"])
    product_lines[(batch * lines * heads * channel_tiles,)](
        out, x, decays, lines, heads, channel_tiles, length, head_dim, *strides(out, rows), *strides(x, rows),
        *strides(decays, rows), **config,
    )  # fmt: skip


def _gradient(
    out: Tensor, grad_decays: Tensor | None, grad: Tensor, x: Tensor, decays: Tensor, rows: bool
) -> None:
    if grad_decays is None:
        _product(out, grad, decays, rows)
        return
    batch, height, width, heads, head_dim = x.shape
    lines, length = (height, width) if rows else (width, height)
    gradient_lines[(batch * lines * heads,)](
        out, grad_decays, grad, x, decays, lines, heads, length, head_dim, *strides(out, rows), *strides(grad, rows),
        *strides(x, rows), *strides(decays, rows), *strides(grad_decays, rows), **configuration(length, head_dim, True),
    )  # fmt: skip


def forward(y: Tensor, x: Tensor, log_decay_w: Tensor, log_decay_h: Tensor, transpose: bool) -> None:
    """Fills y."""
    first, second = (log_decay_w, log_decay_h) if transpose else (log_decay_h, log_decay_w)
    with device_of(x):
        _product(y, native.dense(x)[0], first, transpose)
        _product(y, y, second, not transpose)


def backward(
    grad_x: Tensor | None,
    grad_log_decay_w: Tensor | None,
    grad_log_decay_h: Tensor | None,
    grad_y: Tensor | None,
    y: Tensor,
    x: Tensor,
    log_decay_w: Tensor,
    log_decay_h: Tensor,
    transpose: bool,
) -> None:
    """Fills the gradients that are not None."""
    if grad_y is None:
        for gradient in (grad_x, grad_log_decay_w, grad_log_decay_h):
            if gradient is not None:
                gradient.zero_()
        return
    (x, grad_y), buffer = native.dense(x, grad_y), gradient_place(grad_x, x)
    first, second = (log_decay_w, log_decay_h) if transpose else (log_decay_h, log_decay_w)
    grad_first, grad_second = (
        (grad_log_decay_w, grad_log_decay_h) if transpose else (grad_log_decay_h, grad_log_decay_w)
    )
    with device_of(x):
        if grad_second is not None:
            # What the second product was given, in the place that its gradient then takes.
            _product(buffer, x, first, transpose)
        _gradient(buffer, grad_second, grad_y, buffer, second, not transpose)
        if grad_first is not None or grad_x is not None:
            _gradient(buffer, grad_first, buffer, x, first, transpose)
    if grad_x is not None and buffer is not grad_x:
        grad_x.copy_(buffer)


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every kernel at representative sizes, for compiling them without a GPU."""
    for height, width, d in ((14, 14, 32), (56, 56, 16), (50, 84, 32), (200, 336, 16)):
        x = torch.empty(1, height, width, 2, d, dtype=dtype)
        decays = torch.empty(2, 1, height, width, 2)

        def call(x: Tensor = x, decays: Any = decays) -> None:
            inputs: list[Any] = [x, *decays, False]
            forward(torch.empty_like(x), *inputs)
            arguments: list[Any] = [torch.empty_like(x), *decays.clone(), x, x, *inputs]
            backward(*arguments)

        yield f"{height}x{width} d={d}", call
