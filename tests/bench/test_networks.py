"""What `run_model` does with variants that cannot be compiled in time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkernels.bench import models
from vitkernels.bench.runner import Row, Settings

SETTINGS = Settings(torch.device("cpu"), torch.float32, ("fwd",), (1, 2), seconds=0.001, rounds=2)


class Interrupted(nn.Module):
    """Compiles until the user has waited enough."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def run(variants: dict[str, models.Variant], rows: list[Row]) -> list[str]:
    torch.manual_seed(0)
    ready: list[str] = []
    models.run_model(
        "small",
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
        lambda batch: torch.randn(batch, 3, 6, 6),
        list(variants),
        SETTINGS,
        rows,
        contest=models.Contest(variants, tuple(variants), models.judge),
        ready=lambda: ready.append("ready"),
    )
    return ready


def test_an_interrupt_while_compiling_leaves_the_others_to_be_timed() -> None:
    rows: list[Row] = []
    variants = {
        "eager": lambda model: model,
        "torch.compile": lambda model: Interrupted(),
        "other": lambda model: model,
    }
    assert run(variants, rows) == ["ready"]
    found = {(row.provider, row.batch): (row.status, row.median is not None) for row in rows}
    timed, not_timed = ("ok", True), ("skipped", False)
    assert found == {
        (name, batch): not_timed if name == "torch.compile" else timed
        for name in variants
        for batch in (1, 2)
    }
    assert {row.reason for row in rows if row.status == "skipped"} == {
        "interrupted before it was compiled and checked"
    }


def test_an_interrupt_before_anything_is_ready_ends_the_run() -> None:
    rows: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        run({"torch.compile": lambda model: Interrupted()}, rows)
    assert rows == []
