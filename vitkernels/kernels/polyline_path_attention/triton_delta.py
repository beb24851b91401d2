"""What each row of probabilities subtracts from the gradient of its weights, in Triton: sum(weights * gradients).

With the output of the row saved it is the product of the output and its gradient. Floor: the bytes of the tensors.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.kernels.polyline_path_attention.triton_map import cell_offsets, load_tokens, plane_offset


@jit(do_not_specialize=["pair"])
def row_products(
    delta, grad_out, out, partial, go_s, out_s, partial_s, size, heads, pair,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fills delta [2] planes: <grad_out, partial> and <grad_out, 2 out - partial>, of the two softmaxes.

    size holds (height, width, blocks of tokens).
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    batch = (program // heads // size[2]).to(tl.int64)
    token = program // heads % size[2] * BLOCK_M + tl.arange(0, BLOCK_M)
    y = token // size[1]
    x = token % size[1]
    valid = y < size[0]
    gradient = load_tokens(grad_out, go_s, batch, head, y, x, valid, BLOCK_V, VALUE_DIM).to(tl.float32)
    whole = load_tokens(out, out_s, batch, head, y, x, valid, BLOCK_V, VALUE_DIM).to(tl.float32)
    first = load_tokens(partial, partial_s, batch, head, y, x, valid, BLOCK_V, VALUE_DIM).to(tl.float32)
    cells = delta + plane_offset(batch, heads, head, size) + cell_offsets(y, x, size)
    tl.store(cells, tl.sum(gradient * first, 1), mask=valid)
    tl.store(cells + pair, tl.sum(gradient * (2.0 * whole - first), 1), mask=valid)
