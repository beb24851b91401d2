"""Where what the backends declare as their limits begins: the largest that fits, and the first that does not."""

from __future__ import annotations

import pytest
import torch

from vitkernels.core.operator import REGISTRY

F32, F64 = torch.float32, torch.float64


def _empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sequence(d: int, dv: int, tokens: int = 4, dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    q = _empty(1, 1, tokens, d, dtype=dtype)
    return q, q, _empty(1, 1, tokens, dv, dtype=dtype)


def _map(
    d: int, dv: int, height: int = 4, width: int = 4, dtype: torch.dtype = F32
) -> tuple[torch.Tensor, ...]:
    q = _empty(1, height, width, 1, d, dtype=dtype)
    return q, q, _empty(1, height, width, 1, dv, dtype=dtype)


def _window(d: int, dv: int, side: int, dtype: torch.dtype = F32, bias: bool = False):
    table = _empty(1, (2 * side - 1) ** 2) if bias else None
    return *_sequence(d, dv, side * side, dtype), table, side, side


def _neighbors(
    d: int,
    dv: int,
    kernel: int = 3,
    sides: tuple[int, int] = (4, 4),
    dtype: torch.dtype = F32,
    bias: bool = False,
):
    rpb = _empty(1, 2 * kernel - 1, 2 * kernel - 1) if bias else None
    return *_map(d, dv, *sides, dtype), rpb, (kernel, kernel)


def _paths(d: int, dv: int, height: int = 4, width: int = 4):
    return *_map(d, dv, height, width), None, None, True


def _grid(points: int):
    return None, None, None, None, _empty(points)


LIMITS = [
    ("window_attention", "triton", 128, lambda n: _window(n, 8, 9)),
    ("window_attention", "triton", 128, lambda n: _window(8, n, 9)),
    ("window_attention", "triton", 8, lambda n: _window(200, 8, n)),
    ("window_attention", "cuda", 256, lambda n: _window(n, 8, 3)),
    ("window_attention", "cuda", 256, lambda n: _window(8, n, 3)),
    ("window_attention", "cuda", 128, lambda n: _window(n, 8, 3, F64)),
    ("window_attention", "cuda", 17, lambda n: _window(8, 8, n, bias=True)),
    ("strip_attention", "cpu", 64, lambda n: _sequence(n, 500)),
    ("strip_attention", "cuda", 64, lambda n: _sequence(n, 8)),
    ("strip_attention", "cuda", 256, lambda n: _sequence(1, n)),
    ("strip_attention", "cuda", 128, lambda n: _sequence(1, n, dtype=F64)),
    ("strip_attention", "triton", 64, lambda n: _sequence(n, 8)),
    ("strip_attention", "triton", 128, lambda n: _sequence(1, n)),
    ("attention_with_size", "cuda", 256, lambda n: _sequence(n, 8)),
    ("attention_with_size", "cuda", 256, lambda n: _sequence(8, n)),
    ("attention_with_size", "cuda", 128, lambda n: _sequence(n, 8, dtype=F64)),
    ("attention_with_size", "triton", 128, lambda n: _sequence(n, 8)),
    ("attention_with_size", "triton", 128, lambda n: _sequence(8, n)),
    ("neighborhood_attention", "cuda", 256, lambda n: _neighbors(n, 8)),
    ("neighborhood_attention", "cuda", 256, lambda n: _neighbors(8, n)),
    ("neighborhood_attention", "cuda", 128, lambda n: _neighbors(n, 8, dtype=F64)),
    ("neighborhood_attention", "cuda", 17, lambda n: _neighbors(8, 8, n, (40, 40), bias=True)),
    ("neighborhood_attention", "cuda", 2**13, lambda n: _neighbors(8, 8, sides=(2**13, n))),
    ("neighborhood_attention", "cuda", 1562, lambda n: _neighbors(8, 8, n, (2**12, 2**12))),
    ("neighborhood_attention", "triton", 256, lambda n: _neighbors(n, 8)),
    ("neighborhood_attention", "triton", 256, lambda n: _neighbors(8, n)),
    ("neighborhood_attention", "triton", 2**15, lambda n: _neighbors(8, 8, sides=(2**15, n))),
    ("neighborhood_attention", "triton", 480, lambda n: _neighbors(8, 8, n, (2**12, 2**12))),
    ("polyline_path_attention", "cuda", 128, lambda n: _paths(n, 8)),
    ("polyline_path_attention", "cuda", 128, lambda n: _paths(8, n)),
    ("polyline_path_attention", "cuda", 2**15 - 1, lambda n: _paths(8, 8, n)),
    ("polyline_path_attention", "cuda", 2**15 - 1, lambda n: _paths(8, 8, 1, n)),
    ("polyline_path_attention", "triton", 128, lambda n: _paths(n, 8)),
    ("polyline_path_attention", "triton", 128, lambda n: _paths(8, n)),
    ("polyline_path_attention", "triton", 2**15, lambda n: _paths(8, 8, 2**15, n)),
    ("polyline_path_scan", "cuda", 1408, lambda n: (_empty(1, n, 4, 1, 8),)),
    ("polyline_path_scan", "triton", 1024, lambda n: (_empty(1, 4, n, 1, 8),)),
    ("kan_linear", "cuda", 64, _grid),
    ("kan_linear", "triton", 64, _grid),
]


@pytest.mark.parametrize(
    ("name", "backend", "most", "inputs"), LIMITS, ids=lambda value: None if callable(value) else str(value)
)
def test_limits_begin_where_they_say(name, backend, most, inputs):
    limits = REGISTRY[name].backends[backend].limits
    assert limits(*inputs(most)) == []
    (reason,) = limits(*inputs(most + 1))
    assert "takes " in reason or "take " in reason
