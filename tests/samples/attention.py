"""Samples of attention whose keys are a window, a neighborhood or a strip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitkernels import ops

from .sample import Sample


def _window(heads: int, window: tuple[int, int], d: int, dv: int, entries: int | None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tokens = window[0] * window[1]
        tensors = {name: torch.randn(batch, heads, tokens, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, heads, tokens, dv)
        if entries is not None:
            tensors["bias_table"] = torch.randn(heads, entries)
        return tensors

    return make


def _neighborhood(
    sizes: tuple[int, ...], heads: int, d: int, dv: int, bias: tuple[int, ...] | None
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.randn(batch, *sizes, heads, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, *sizes, heads, dv)
        if bias is not None:
            tensors["rpb"] = torch.randn(heads, *bias)
        return tensors

    return make


def strip_tensors(
    heads: int, queries: int, keys: int, r: int, dv: int, bias: tuple[int, ...] | None = None
) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {
            "q": torch.randn(batch, heads, queries, r),
            "k": torch.randn(batch, heads, keys, r),
            "v": torch.randn(batch, heads, keys, dv),
        }
        if bias is not None:  # () is one of the whole shape
            tensors["attn_bias"] = torch.randn(bias or (batch, heads, queries, keys))
        return tensors

    return make


_x = torch.randn(2, 2, 15, 8)
_narrow, _wide = torch.randn(2, 2, 5, 1), torch.randn(2, 2, 5, 3)
_map = torch.randn(2, 5, 7, 2, 4)

SAMPLES = [
    Sample(
        "window_attention-absolute",
        ops.window_attention,
        _window(2, (3, 5), 8, 5, 15),
        {"window": (3, 5), "bias_index": "absolute"},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _x[:, :, :14]}, ValueError, "argument `q`: expected 15 tokens"),
            ({"q": _x.int(), "k": _x.int(), "v": _x.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _x[:1]}, ValueError, "argument `k`: expected shape"),
            ({"k": torch.randn(2, 2, 15, 8).double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"q": _x[..., :0], "k": _x[..., :0]}, ValueError, "argument `q`: expected a last dimension of"),
            ({"v": _x[:, :, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _x[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _x.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"bias_table": torch.zeros(2, 14)}, ValueError, "argument `bias_table`: expected shape"),
            (
                {"bias_table": torch.zeros(2, 15).half()},
                TypeError,
                "argument `bias_table`: expected dtype float32",
            ),
            (
                {"bias_index": "relative"},
                ValueError,
                "argument `bias_index`: expected 'absolute' or 'signed'",
            ),
            ({"window": (3, 0)}, ValueError, "argument `window`: expected 2 positive ints"),
            ({"window": "3x5"}, TypeError, "argument `window`: expected 2 ints"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "window_attention-signed-lse",
        ops.window_attention,
        _window(1, (4, 4), 16, 16, 49),
        {"window": 4, "bias_index": "signed", "return_lse": True},
    ),
    Sample(
        "window_attention-no_bias", ops.window_attention, _window(2, (1, 3), 3, 7, None), {"window": (1, 3)}
    ),
    Sample(
        "neighborhood_attention-2d-rpb",
        ops.neighborhood_attention,
        _neighborhood((5, 7), 2, 4, 3, (5, 3)),
        {"kernel_size": (3, 2), "dilation": (1, 3)},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _map[:, 0, 0]}, ValueError, "argument `q`: expected a map of one or two axes"),
            ({"q": _map.int(), "k": _map.int(), "v": _map.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _map[:, 1:]}, ValueError, "argument `k`: expected shape"),
            ({"k": _map.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"q": _map[..., :0], "k": _map[..., :0]}, ValueError, "argument `q`: expected a last dimension"),
            ({"v": _map[:, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _map[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _map.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"kernel_size": 3}, ValueError, "argument `kernel_size`: expected kernel_size * dilation <= 7"),
            ({"kernel_size": (3, 0)}, ValueError, "argument `kernel_size`: expected 2 positive ints"),
            ({"kernel_size": (3, 3, 3)}, TypeError, "argument `kernel_size`: expected 2 ints"),
            (
                {"dilation": (2, 1)},
                ValueError,
                "argument `kernel_size`: expected kernel_size * dilation <= 5",
            ),
            ({"dilation": 0}, ValueError, "argument `dilation`: expected 2 positive ints"),
            *(
                ({"is_causal": value}, TypeError, "argument `is_causal`: expected a bool or 2 bools")
                for value in (1, (True,), (True, 1))
            ),
            ({"is_causal": (False, True)}, ValueError, "argument `rpb`: expected None"),
            ({"rpb": torch.zeros(2, 5, 5)}, ValueError, "argument `rpb`: expected shape"),
            ({"rpb": torch.zeros(2, 5, 3).half()}, TypeError, "argument `rpb`: expected dtype float32"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "neighborhood_attention-1d-causal-lse",
        ops.neighborhood_attention,
        _neighborhood((9,), 2, 5, 5, None),
        {"kernel_size": 4, "dilation": 2, "is_causal": True, "return_lse": True},
    ),
    Sample(
        "neighborhood_attention-dense-groups",
        ops.neighborhood_attention,
        _neighborhood((4, 9), 1, 8, 8, (3, 5)),
        {"kernel_size": (2, 3), "dilation": (2, 3), "return_lse": True},
    ),
    Sample(
        "strip_attention-one-channel",
        ops.strip_attention,
        strip_tensors(2, 9, 5, 1, 3),
        {"scale": -0.7},
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _narrow[0]}, ValueError, "argument `q`: expected shape"),
            ({"q": _narrow.int(), "k": _narrow.int(), "v": _wide.int()}, TypeError, "argument `q`: expected"),
            ({"q": _narrow[..., :0], "k": _narrow[..., :0]}, ValueError, "argument `q`: expected a last"),
            ({"k": _wide}, ValueError, "argument `k`: expected shape [batch, heads, M, r] = [2, 2, *, 1]"),
            ({"k": _narrow[:, :, :0], "v": _wide[:, :, :0]}, ValueError, "argument `k`: expected at least"),
            ({"k": _narrow.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"v": _wide[:, :, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _wide[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _wide.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"attn_bias": 1.0}, TypeError, "argument `attn_bias`: expected a tensor or None"),
            ({"attn_bias": torch.zeros(9, 4)}, ValueError, "argument `attn_bias`: expected a shape that"),
            ({"attn_bias": torch.zeros(1, 1, 1, 9, 5)}, ValueError, "argument `attn_bias`: expected a shape"),
            (
                {"attn_bias": torch.zeros(9, 5).half()},
                TypeError,
                "argument `attn_bias`: expected dtype float32",
            ),
            (
                {"attn_bias": torch.zeros(9, 5, device="meta")},
                ValueError,
                "argument `attn_bias`: expected device",
            ),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "strip_attention-bias-lse",
        ops.strip_attention,
        strip_tensors(3, 4, 7, 2, 5, ()),
        {"return_lse": True},
    ),
    Sample(
        "strip_attention-one-channel-broadcast-bias",
        ops.strip_attention,
        strip_tensors(2, 5, 9, 1, 4, (2, 1, 9)),
    ),
]
