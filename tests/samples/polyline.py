"""Samples of attention under polyline path masks, and of the mask and the scan alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitkernels import ops

from .sample import Sample


def _polyline(height: int, width: int, heads: int, d: int, dv: int) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {name: torch.randn(batch, height, width, heads, d) for name in "qk"}
        tensors["v"] = torch.randn(batch, height, width, heads, dv)
        return tensors | {f"log_decay_{axis}": -torch.rand(batch, height, width, heads) for axis in "wh"}

    return make


def _decays(height: int, width: int, heads: int, d: int | None = None) -> Callable[..., Any]:
    def make(batch: int) -> dict[str, torch.Tensor]:
        tensors = {} if d is None else {"x": torch.randn(batch, height, width, heads, d)}
        return tensors | {f"log_decay_{axis}": -torch.rand(batch, height, width, heads) for axis in "wh"}

    return make


_map = torch.randn(2, 5, 7, 2, 4)
_cells = torch.zeros(2, 3, 4, 2)

SAMPLES = [
    Sample(
        "polyline_path_attention-whole",
        ops.polyline_path_attention,
        _polyline(5, 7, 2, 4, 3),
        bad=[
            ({"q": "text"}, TypeError, "argument `q`: expected a tensor"),
            ({"q": _map[0]}, ValueError, "argument `q`: expected shape"),
            ({"q": _map.int(), "k": _map.int(), "v": _map.int()}, TypeError, "argument `q`: expected dtype"),
            ({"k": _map[:, 1:]}, ValueError, "argument `k`: expected shape"),
            ({"k": _map.double()}, TypeError, "argument `k`: expected dtype float32"),
            ({"q": _map[..., :0], "k": _map[..., :0]}, ValueError, "argument `q`: expected a last dimension"),
            ({"v": _map[:, 1:]}, ValueError, "argument `v`: expected shape"),
            ({"v": _map[..., :0]}, ValueError, "argument `v`: expected a last dimension of at least 1"),
            ({"v": _map.to("meta")}, ValueError, "argument `v`: expected device cpu"),
            ({"log_decay_w": None}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map[..., 0].mT}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _map[..., 0].half()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _map}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _map[..., 0].double()}, TypeError, "argument `log_decay_h`: expected dtype"),
            ({"mode": "chunk"}, ValueError, "argument `mode`: expected 'whole' or 'criss_cross'"),
            ({"mode": True}, TypeError, "argument `mode`: expected 'whole' or 'criss_cross'"),
            ({"scale": float("nan")}, ValueError, "argument `scale`: expected a finite number"),
            ({"scale": torch.ones(1)}, TypeError, "argument `scale`: expected a number"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "polyline_path_attention-criss_cross",
        ops.polyline_path_attention,
        _polyline(4, 3, 2, 5, 5),
        {"mode": "criss_cross", "scale": 0.3},
    ),
    Sample(
        "polyline_path_mask",
        ops.polyline_path_mask,
        _decays(3, 4, 2),
        products=False,
        bad=[
            ({"log_decay_w": "text"}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _cells.int()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _cells[:, 1:]}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _cells.double()}, TypeError, "argument `log_decay_h`: expected dtype float32"),
            ({"log_decay_h": _cells.to("meta")}, ValueError, "argument `log_decay_h`: expected device cpu"),
            ({"log": 1}, TypeError, "argument `log`: expected True or False"),
            ({"transpose": None}, TypeError, "argument `transpose`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample(
        "polyline_path_mask-transposed",
        ops.polyline_path_mask,
        _decays(5, 3, 1),
        {"log": False, "transpose": True},
        products=False,
    ),
    Sample(
        "polyline_path_scan",
        ops.polyline_path_scan,
        _decays(5, 7, 2, 4),
        bad=[
            ({"x": "text"}, TypeError, "argument `x`: expected a tensor"),
            ({"x": _map[0]}, ValueError, "argument `x`: expected shape"),
            ({"x": _map.int()}, TypeError, "argument `x`: expected dtype"),
            ({"log_decay_w": None}, TypeError, "argument `log_decay_w`: expected a tensor"),
            ({"log_decay_w": _map[..., 0].mT}, ValueError, "argument `log_decay_w`: expected shape"),
            ({"log_decay_w": _map[..., 0].half()}, TypeError, "argument `log_decay_w`: expected dtype"),
            ({"log_decay_h": _map}, ValueError, "argument `log_decay_h`: expected shape"),
            ({"log_decay_h": _map[..., 0].double()}, TypeError, "argument `log_decay_h`: expected dtype"),
            ({"log_decay_h": _map[..., 0].to("meta")}, ValueError, "argument `log_decay_h`: expected device"),
            ({"transpose": 1}, TypeError, "argument `transpose`: expected True or False"),
            ({"backend": "cudnn"}, ValueError, "argument `backend`: expected one of"),
        ],
    ),
    Sample("polyline_path_scan-transposed", ops.polyline_path_scan, _decays(4, 3, 1, 9), {"transpose": True}),
]
