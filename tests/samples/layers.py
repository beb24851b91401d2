"""Samples of whole layers: cascaded attention, feed-forward units, KAN and block-sparse layers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from vitkernels import BlockSparseTensor, ops

from .sample import Sample


def _cascade(
    heads: int, d: int, key_dim: int, size: tuple[int, int], tokens: int, largest: int
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        channels, rows = heads * d, 2 * key_dim + d
        return {
            "x": torch.randn(batch, channels, *size),
            "qkv_weight": torch.randn(heads, rows, d) * d**-0.5,
            "qkv_bias": torch.randn(heads, rows) * 0.5,
            "dw_weight": torch.randn(heads, key_dim, largest, largest) / largest,
            "dw_bias": torch.randn(heads, key_dim) * 0.5,
            "attn_bias": torch.randn(heads, tokens),
            "proj_weight": torch.randn(channels, channels) * channels**-0.5,
            "proj_bias": torch.randn(channels) * 0.5,
        }

    return make


def _ffn(channels: int, hidden: int, size: tuple[int, int], scales: bool, dw: bool) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "x": torch.randn(batch, channels, *size),
            "weight1": torch.randn(hidden, channels) * channels**-0.5,
            "bias1": torch.randn(hidden),
            "weight2": torch.randn(channels, hidden) * hidden**-0.5,
            "bias2": torch.randn(channels),
        }
        if scales:
            tensors |= {"scale1": torch.randn(hidden), "scale2": torch.randn(channels)}
        if dw:
            tensors |= {"dw_weight": torch.randn(channels, 3, 3) / 3, "dw_bias": torch.randn(channels)}
        return tensors

    return make


def _kan(channels: int, grids: int, outputs: int, *leading: int) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        return {
            "x": torch.randn(batch, *leading, channels),
            "weight": torch.randn(outputs, channels * grids) / (channels * grids) ** 0.5,
            "ln_weight": 1 + 0.2 * torch.randn(channels),
            "ln_bias": 0.2 * torch.randn(channels),
            "grid": torch.linspace(-2, 2, grids) + 0.1 * torch.randn(grids),
        }

    return make


def _block_sparse(
    pattern: BlockSparseTensor, *leading: int, bias: bool = True
) -> dict[str, Callable[..., dict[str, Any]]]:
    """`make` and `arguments` of a call whose weight has the pattern."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "x": torch.randn(batch, *leading, pattern.shape[1]),
            "values": torch.randn(pattern.values.shape) / pattern.shape[1] ** 0.5,
        }
        # Beyond the matrix a value has no gradient, which differs from what a plain copy would give.
        tensors["values"] *= pattern.values
        return tensors | ({"bias": torch.randn(pattern.shape[0])} if bias else {})

    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in tensors.items() if name != "values"}
        values = tensors["values"]
        return {"weight": pattern.to(values.device).with_values(values)} | others

    return {"make": make, "arguments": arguments}


def _ones(rows: int, columns: int, block: tuple[int, int], mask: list[list[int]]) -> BlockSparseTensor:
    return BlockSparseTensor.from_dense(torch.ones(rows, columns), block, torch.tensor(mask))


_edges = _ones(5, 7, (2, 3), [[1, 0, 1], [0, 0, 0], [1, 1, 0]])
_whole = _ones(8, 12, (4, 4), [[0, 1, 0], [0, 1, 1]])
_large = _ones(32, 48, (16, 16), [[0, 1, 0], [0, 1, 1]])
_features = torch.randn(2, 3, 7)
_pixels = torch.randn(2, 5, 3, 4)
_image = torch.randn(2, 10, 4, 7)
_floats = torch.zeros
_rows = torch.randn(2, 9)

SAMPLES = [
    Sample(
        "cascaded_group_attention-windows",
        ops.cascaded_group_attention,
        _cascade(2, 5, 3, (4, 7), 8, 3),  # padded right to 4 x 8
        {"window_size": (2, 4), "kernel_sizes": (3, 1), "residual": True},
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _image[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _image[:, :0]}, ValueError, "argument `x`: expected channels in a positive multiple"),
            ({"x": _image[:, :9]}, ValueError, "argument `x`: expected channels in a positive multiple"),
            ({"x": _image.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _image.double()}, TypeError, "argument `qkv_weight`: expected dtype float64"),
            ({"qkv_weight": _floats(2, 11, 4)}, ValueError, "argument `qkv_weight`: expected shape"),
            ({"qkv_bias": _floats(2, 12)}, ValueError, "argument `qkv_bias`: expected shape"),
            ({"qkv_bias": _floats(2, 11).half()}, TypeError, "argument `qkv_bias`: expected dtype float32"),
            ({"dw_weight": _floats(2, 3, 3)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": _floats(2, 3, 2, 2)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": _floats(2, 3, 3, 1)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": _floats(2, 0, 3, 3)}, ValueError, "argument `dw_weight`: expected at least one"),
            ({"dw_weight": _floats(0, 3, 3, 3)}, ValueError, "argument `dw_weight`: expected at least one"),
            ({"dw_bias": _floats(2)}, ValueError, "argument `dw_bias`: expected shape"),
            ({"attn_bias": _floats(2, 9)}, ValueError, "argument `attn_bias`: expected shape"),
            ({"attn_bias": _floats(2, 8).half()}, TypeError, "argument `attn_bias`: expected dtype float32"),
            ({"proj_weight": _floats(10, 5)}, ValueError, "argument `proj_weight`: expected shape"),
            ({"proj_bias": _floats(10).to("meta")}, ValueError, "argument `proj_bias`: expected device cpu"),
            ({"window_size": (2, 0)}, ValueError, "argument `window_size`: expected 2 positive ints"),
            ({"kernel_sizes": 3}, TypeError, "argument `kernel_sizes`: expected 2 ints"),
            ({"kernel_sizes": (3, 2)}, ValueError, "argument `kernel_sizes`: expected odd ints up to the 3"),
            ({"kernel_sizes": (3, 5)}, ValueError, "argument `kernel_sizes`: expected odd ints up to the 3"),
            ({"scale": float("inf")}, ValueError, "argument `scale`: expected a finite number"),
            ({"residual": 1}, TypeError, "argument `residual`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "cascaded_group_attention-one_window",
        ops.cascaded_group_attention,
        _cascade(3, 16, 16, (4, 4), 16, 5),
        {"window_size": 4, "kernel_sizes": [5, 3, 3], "scale": 0.3},
    ),
    Sample(
        "residual_ffn-depthwise",
        ops.residual_ffn,
        _ffn(5, 7, (3, 4), True, True),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _pixels[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _pixels.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _pixels.double()}, TypeError, "argument `weight1`: expected dtype float64"),
            (
                {"weight1": torch.zeros(7, 4)},
                ValueError,
                "argument `weight1`: expected shape [hidden, C] = [*, 5]",
            ),
            (
                {"weight1": torch.zeros(7, 5, 3, 3)},
                ValueError,
                "argument `weight1`: expected shape [hidden, C, 1, 1]",
            ),
            ({"weight1": torch.zeros(0, 5)}, ValueError, "argument `weight1`: expected at least one"),
            (
                {"x": _pixels[:, :0], "weight1": torch.zeros(7, 0)},
                ValueError,
                "argument `weight1`: expected at least one",
            ),
            ({"weight2": torch.zeros(5, 6)}, ValueError, "argument `weight2`: expected shape"),
            ({"weight2": torch.zeros(5, 7).half()}, TypeError, "argument `weight2`: expected dtype float32"),
            ({"bias1": None}, TypeError, "argument `bias1`: expected a tensor"),
            ({"bias1": torch.zeros(7).half()}, TypeError, "argument `bias1`: expected dtype float32"),
            ({"bias2": torch.zeros(5).double()}, TypeError, "argument `bias2`: expected dtype float32"),
            ({"bias2": torch.zeros(5).to("meta")}, ValueError, "argument `bias2`: expected device cpu"),
            ({"scale1": torch.zeros(5)}, ValueError, "argument `scale1`: expected shape"),
            ({"scale2": torch.zeros(5, 1)}, ValueError, "argument `scale2`: expected shape"),
            ({"dw_weight": torch.zeros(5, 5, 5)}, ValueError, "argument `dw_weight`: expected shape"),
            ({"dw_weight": None}, ValueError, "argument `dw_weight`: expected a tensor"),
            ({"dw_bias": None}, ValueError, "argument `dw_bias`: expected a tensor"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("residual_ffn-plain", ops.residual_ffn, _ffn(8, 4, (1, 5), False, False)),
    Sample(
        "kan_linear",
        ops.kan_linear,
        _kan(9, 8, 7),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": torch.tensor(1.0)}, ValueError, "argument `x`: expected shape [..., channels] = [*]"),
            ({"x": _rows[:, :0]}, ValueError, "argument `x`: expected a last dimension of at least 1"),
            ({"x": _rows[:, :8]}, ValueError, "argument `weight`: expected shape"),
            ({"x": _rows.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _rows.half()}, TypeError, "argument `weight`: expected dtype float16"),
            ({"weight": torch.zeros(7, 72).double()}, TypeError, "argument `weight`: expected dtype"),
            ({"weight": torch.zeros(7, 72).to("meta")}, ValueError, "argument `weight`: expected device cpu"),
            ({"weight": torch.zeros(0, 72)}, ValueError, "argument `weight`: expected a first dimension"),
            ({"ln_weight": torch.ones(8)}, ValueError, "argument `ln_weight`: expected shape"),
            ({"ln_bias": torch.zeros(8)}, ValueError, "argument `ln_bias`: expected shape"),
            ({"ln_bias": torch.zeros(9).half()}, TypeError, "argument `ln_bias`: expected dtype float32"),
            ({"grid": torch.zeros(0)}, ValueError, "argument `grid`: expected at least 1 grid point"),
            ({"grid": torch.zeros(2, 4)}, ValueError, "argument `grid`: expected shape"),
            ({"inv_denominator": 0.0}, ValueError, "argument `inv_denominator`: expected a finite number"),
            ({"inv_denominator": True}, TypeError, "argument `inv_denominator`: expected a number"),
            ({"inv_denominator": torch.ones(1)}, TypeError, "argument `inv_denominator`: expected a number"),
            ({"eps": float("nan")}, ValueError, "argument `eps`: expected a finite number above 0"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("kan_linear-maps", ops.kan_linear, _kan(5, 3, 8, 1, 4), {"inv_denominator": 1.7, "eps": 1e-3}),
    Sample(
        "block_sparse_linear-gelu-edges",
        ops.block_sparse_linear,
        **_block_sparse(_edges, 3),
        without=("triton",),
        kwargs={"activation": "gelu"},
        share=Fraction(4 * 6, 5 * 7),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": torch.tensor(1.0)}, ValueError, "argument `x`: expected shape [..., in_features] = [7]"),
            (
                {"x": _features[..., :6]},
                ValueError,
                "argument `x`: expected shape [..., in_features] = [*, *, 7]",
            ),
            ({"x": _features.int()}, TypeError, "argument `x`: expected dtype"),
            ({"x": _features.double()}, TypeError, "argument `weight`: expected dtype float64"),
            ({"weight": torch.zeros(5, 7)}, TypeError, "argument `weight`: expected a BlockSparseTensor"),
            ({"weight": _whole}, ValueError, "argument `x`: expected shape"),
            ({"weight": _edges.to("meta")}, ValueError, "argument `weight`: expected device cpu"),
            ({"bias": "text"}, TypeError, "argument `bias`: expected a tensor"),
            ({"bias": torch.zeros(6)}, ValueError, "argument `bias`: expected shape [out_features] = [5]"),
            ({"bias": torch.zeros(5).half()}, TypeError, "argument `bias`: expected dtype float32"),
            ({"bias": torch.zeros(5).to("meta")}, ValueError, "argument `bias`: expected device cpu"),
            ({"activation": "silu"}, ValueError, "argument `activation`: expected None, 'gelu' or 'relu'"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "block_sparse_linear-relu",
        ops.block_sparse_linear,
        **_block_sparse(_whole),
        without=("triton",),
        kwargs={"activation": "relu"},
        share=Fraction(3, 6),
    ),
    Sample(
        "block_sparse_linear-plain",
        ops.block_sparse_linear,
        **_block_sparse(_large, 3, bias=False),
        share=Fraction(3, 6),
    ),
]
