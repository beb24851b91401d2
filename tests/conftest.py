from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import Guarded

import vitkernels
from vitkernels.core.operator import REGISTRY

# Files that run for long, longest first; the workers share out the rest after them, and none is left alone at the end.
LONGEST = (
    *("build/test_cuda_spills.py", "build/test_build.py", "build/test_triton_compile.py"),
    *("core/test_operators.py", "core/test_compiled.py", "kernels/test_instruction_sets.py"),
    *("device/test_twin_memory.py", "test_train_example.py", "test_patching_graphs.py"),
    "device/test_device_targets.py",
    *("kernels/test_neighborhood_attention_triton.py", "kernels/test_window_attention_triton.py"),
    "kernels/test_accesses_triton.py",
    *("kernels/test_cascaded_group_attention_triton.py", "kernels/test_polyline_path_attention_triton.py"),
    *("kernels/test_strip_attention_triton.py", "kernels/test_learnable_token_merge_triton.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    if gone := [path for path in places if not Path(path).exists()]:
        raise pytest.UsageError(
            f"LONGEST in tests/conftest.py names files that are not there: {', '.join(gone)}"
        )
    items.sort(key=lambda item: places.get(str(item.path), len(places)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _poison(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def poisoned(*args: Any) -> Any:
        tensor = allocate(*args)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    return poisoned


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every output and gradient with NaN (an index, with the lowest) before the kernels run.

    So a forgotten element shows.
    """
    for operator in REGISTRY.values():
        monkeypatch.setattr(operator, "allocate", tuple(map(_poison, operator.allocate)))
        monkeypatch.setattr(operator, "like", _poison(operator.like))


@pytest.fixture
def walls_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts what `Guarded` walls off in front of its tensors, not behind them."""
    monkeypatch.setattr(Guarded, "in_front", True)


@pytest.fixture(params=["behind", "in_front"])
def either_wall(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guarded, "in_front", request.param == "in_front")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """(operator, backend) of every call of an operator, in order."""
    seen = []

    def spy(name, original):
        def call(*args, **kwargs):
            seen.append((name, kwargs.get("backend")))
            return original(*args, **kwargs)

        return call

    for name in vitkernels.ops.__all__:
        monkeypatch.setattr(vitkernels.ops, name, spy(name, getattr(vitkernels.ops, name)))
    return seen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the call overheads that tests recorded, which pytest hides when they pass."""
    lines = [
        f"{report.nodeid.partition('::')[2]}, {name}: {value * 1e6:.1f} us"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name.startswith("call, ")
    ]
    if lines:
        terminalreporter.section("best time of a call, kernel included")
        for line in lines:
            terminalreporter.write_line(line)
