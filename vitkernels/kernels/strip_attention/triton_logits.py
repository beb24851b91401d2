"""Loads and logits of strip attention in Triton, for one channel a query and key and for several.

With one channel the largest logit of a row is exactly the product with the largest or with the smallest key, by the
sign of the scaled query: rounding keeps order, so no product of the row rounds to more. With several channels, or a
bias, it is searched online.

Logits come from one of two places. In fp32 those of one channel are an outer product of two vectors (OUTER). Half
precision hands all to the tensor cores, one channel as a single step beside fifteen channels of zeros, whose products
are exact. Not for the arithmetic: Triton then holds the logits as the value product takes its operand, so that
weights go from one product to the next in registers and a row is summed by two shuffles. As an outer product they lie
across the warps: compiled for sm_90 at M = 49, dv = 64, that is 235 registers and 173 shuffles in the forward instead
of 103 and 16, and twice the exponentials in the backward.
"""

from __future__ import annotations

import triton.language as tl

from vitkernels.core.triton_compiler import jit
from vitkernels.core.triton_tiles import INF, LOG2E, dot, load_tile, store_tile, tile_mask, tile_offsets


@jit
def load_channels(
    base,
    tokens,
    valid,
    token_stride,
    col_stride,
    WIDTH: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Queries or keys as they are: [tokens] for one channel, else [tokens, BLOCK_R]; zeros where not valid."""
    if OUTER:
        return tl.load(base + tokens.to(tl.int64) * token_stride, mask=valid, other=0.0)
    else:
        return load_tile(
            base, tile_offsets(tokens, token_stride, col_stride, BLOCK_R), tile_mask(valid, BLOCK_R, WIDTH)
        )


@jit
def store_channels(
    base, tokens, valid, token_stride, col_stride, gradient,
    WIDTH: tl.constexpr, OUTER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What `load_channels` reads, written."""
    if OUTER:
        place = base + tokens.to(tl.int64) * token_stride
        tl.store(place, gradient.to(base.dtype.element_ty), mask=valid)
    else:
        offsets = tile_offsets(tokens, token_stride, col_stride, BLOCK_R)
        store_tile(base, offsets, tile_mask(valid, BLOCK_R, WIDTH), gradient)


@jit
def tile_logits(
    query, key, queries, keys, query_valid, key_valid, bias, bias_n, bias_m, scale, OUTER: tl.constexpr
):  # fmt: skip
    """Base-2 logits of a tile, -inf for keys beyond the last. `bias` points at the head's, or is None."""
    if OUTER:
        logits = scaled(query, scale)[:, None] * key.to(tl.float32)[None, :]
    else:
        logits = dot(query, tl.trans(key)) * (scale * LOG2E)
    if bias is not None:
        offsets = queries.to(tl.int64)[:, None] * bias_n + keys.to(tl.int64)[None, :] * bias_m
        mask = query_valid[:, None] & key_valid[None, :]
        logits += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32) * LOG2E
    return tl.where(key_valid[None, :], logits, -INF)


@jit
def scaled(query, scale):
    """Queries of one channel with the factor of the base-2 logits."""
    return query.to(tl.float32) * (scale * LOG2E)


@jit
def row_maximum(query, k, key_count, token_stride, scale, OUTER: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest base-2 logit of each query of one channel, in the rounding of `tile_logits`."""
    largest = -INF
    smallest = INF
    for first in range(0, key_count, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        valid = keys < key_count
        key = tl.load(k + keys.to(tl.int64) * token_stride, mask=valid, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.where(valid, key, -INF), 0))
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, key, INF), 0))
    factor = scaled(query, scale)
    extreme = tl.where(factor >= 0, largest, smallest)
    if OUTER:
        return factor * extreme
    else:
        return query.to(tl.float32) * extreme * (scale * LOG2E)


@jit
def weights_below(logits, maximum):
    """exp2(logits - maximum) of a known maximum.

    The compiler may fuse product and difference, whose exponent can then exceed 0 by the rounding of a product, which
    is no small number for huge logits; hence the clamp. It lets NaN through.
    """
    return tl.exp2(tl.minimum(logits - maximum[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL))
