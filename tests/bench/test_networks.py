"""What `run_model` does with variants that cannot be compiled in time."""

from __future__ import annotations

import dataclasses

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


def test_every_batch_size_of_every_compiled_variant_is_compiled() -> None:
    """From the ninth graph of a class on they ran eagerly, and were timed as compiled."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).flatten(1)

    compiled: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(next(x.shape for x in inputs if x.shape[1:] == (3, 6, 6)))
        return graph.forward

    torch._dynamo.reset()
    batches = tuple(range(1, 12))
    variants: dict[str, models.Variant] = {
        "eager": lambda model: model,
        "torch.compile": lambda model: torch.compile(model, dynamic=False, backend=backend),
    }
    rows: list[Row] = []
    models.run_model(
        "small",
        Network(),
        lambda batch: torch.randn(batch, 3, 6, 6),
        list(variants),
        dataclasses.replace(SETTINGS, batches=batches),
        rows,
        contest=models.Contest(variants, tuple(variants), models.judge),
    )
    assert [shape[0] for shape in compiled] == list(batches)
    assert all(row.status == "ok" for row in rows)


def test_an_interrupt_before_anything_is_ready_ends_the_run() -> None:
    rows: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        run({"torch.compile": lambda model: Interrupted()}, rows)
    assert rows == []
