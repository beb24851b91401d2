from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATOR = "learnable_token_merge"


def test_learnable_token_merge(
    benchmark: Any, step: Callable[[], object], problem: tuple[Any, Any, int], mode: str, provider: str
) -> None:
    case, shape, batch = problem
    benchmark.group = f"{case.operator} {shape.label} {shape.describe(batch)} {mode}"
    benchmark.extra_info["provider"] = provider
    benchmark(step)
