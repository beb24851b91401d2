from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vitkernels import models

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ppma_mask_cost.py"
SMALL = {"embed_dims": (16,) * 4, "depths": (1, 1, 1, 1), "num_heads": (2, 1, 2, 1), "num_classes": 10}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("ppma_mask_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_times_the_network_and_its_twins_without_a_mask(
    script, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "cost.json"
    arguments = [
        "--json",
        str(path),
        "--size",
        "64",
        "96",
        "--batch",
        "2",
        "--mode",
        "fwd",
        "fwd+bwd",
        "--seconds",
        "0.01",
    ]
    build = script.models.create_model
    script.models = type("Small", (), {"create_model": staticmethod(lambda name: build(name, **SMALL))})
    results = script.main(arguments)
    assert results.keys() == {(2, "fwd"), (2, "fwd+bwd")}
    assert list(results[2, "fwd"]) == list(script.networks(build("ppma_t", **SMALL).eval()))
    assert capsys.readouterr().out.count("x no mask") == 10
    written = json.loads(path.read_text())
    assert [(row["batch"], row["mode"], row["network"], row["median"]) for row in written["rows"]] == [
        (*key, name, t.median) for key, times in results.items() for name, t in times.items()
    ]


def test_a_twin_that_is_wrong_is_not_timed(script) -> None:
    model = models.create_model("ppma_t", **SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    wrong = script.without_mask(model, lambda q, k, scale: script.sdpa(q, k, 2 * scale))
    bare = script.plain(script.with_zero_decays(model))
    with pytest.raises(SystemExit, match="WRONG"):
        script.held_to_the_truth(wrong, bare, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: expected positive numbers; got [0]"),
        (["--size", "0"], "--size: expected one or two positive numbers; got [0]"),
        (["--size", "32", "64", "96"], "--size: expected one or two positive numbers; got [32, 64, 96]"),
        (["--seconds", "nan"], "--seconds: expected a positive number; got nan"),
        (["--networks", "vitkernles"], "--networks: expected some of vitkernels, "),
        (["--json", "."], "json: expected a file; got the folder '.'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_timed(script, arguments, message, capsys, monkeypatch):
    """Batches of no image were timed, and a misspelt network or a third side left out without a word."""
    monkeypatch.setattr(script.timing, "time_on_cpu", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err
