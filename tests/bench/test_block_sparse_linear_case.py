from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from vitkernels.bench import runner
from vitkernels.bench.case import Unavailable, load_case
from vitkernels.bench.cases.block_sparse_linear import PATTERNS, mask_of
from vitkernels.bench.providers import select

CASE = load_case("block_sparse_linear")
CPU = torch.device("cpu")


def inputs_of(problem, batch=2):
    generator = torch.Generator().manual_seed(0)
    return CASE.make_inputs(problem, batch, dtype=torch.float32, device=CPU, generator=generator)


@pytest.mark.parametrize("name", list(CASE.check_shapes))
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_every_provider_passes_the_gate(name, mode):
    problem, training = CASE.parse_shape(CASE.check_shapes[name]), mode == "fwd+bwd"
    inputs = inputs_of(problem)
    truth, baseline = runner.truth_and_baseline(CASE, inputs, training)
    passed = set()
    for provider in select(CASE, CPU, ["dense", "torch-bsr", "vitkernels-cpu"]):
        if mode not in provider.modes:
            continue
        try:
            function = provider.prepare(inputs, training)
        except Unavailable:
            assert provider.name == "torch-bsr"
            continue
        got = runner.evaluate(function, inputs, training)
        assert runner.judge(CASE, problem, 2, inputs, got, baseline, truth).ok, provider.name
        passed.add(provider.name)
    assert passed >= {"eager", "dense", "vitkernels-cpu"}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("density", [0.05, 0.5, 0.7])
def test_patterns_keep_the_same_number_of_blocks(pattern, density):
    problem = CASE.parse_shape(f"out=3072,in=768,density={density},pattern={pattern}")
    mask = mask_of(problem, torch.Generator().manual_seed(0))
    assert mask.sum() == problem.stored == int(density * 2304)
    assert (pattern == "lpvit") <= (mask.sum(0) == 0).any().item()


def test_the_dense_layer_gathers_its_gradient_by_rows():
    """It was charged for a gather of single elements, which took a twentieth of its time at 197 tokens."""
    inputs = inputs_of(CASE.parse_shape("out=96,in=128,tokens=49"))
    function = next(p for p in CASE.peers(CPU) if p.name == "dense").prepare(inputs, True)
    with torch.profiler.profile() as profile:
        runner.evaluate(function, inputs, True)
    called = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in called
    assert "aten::index" not in called


def test_cost_counts_the_stored_blocks():
    problem = CASE.parse_shape("out=3072,in=768,density=0.5")
    assert problem.stored == 1152
    assert CASE.cost(problem, 2, torch.float32, "fwd").flops == 2 * 2 * 197 * 1152 * 32 * 32
    assert CASE.cost(problem, 2, torch.float32, "fwd+bwd").flops == 3 * 2 * 2 * 197 * 1152 * 32 * 32
    with pytest.raises(ValueError, match="pattern in"):
        CASE.parse_shape("pattern=diagonal")


@pytest.fixture
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "block_sparse_break_even.py"
    spec = importlib.util.spec_from_file_location("block_sparse_break_even", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_break_even_compares_times_of_one_kind(script):
    """Where ours could not be captured in a graph, its calls were set against the dense layer's graphs."""

    def row(provider, method, median, dtype="float16"):
        problem, ours = "fc1 32x32 uniform d=0.5", provider != "dense"
        kept = runner.Row("op", "p", problem, "1", 8, dtype, "cuda:0", "fwd", provider, ours)
        kept.method, kept.median = method, median
        return kept

    rows = [row("dense", "call", 6.0), row("vitkernels-cuda", "call", 3.0), row("dense", "graph", 1.0)]
    key = ("fc1", "32x32", "uniform", 8, "fwd")
    assert script.curves_of(rows) == {key: [(0.5, 2.0)]}
    assert script.curves_of([*rows, row("vitkernels-cuda", "graph", 0.8)]) == {key: [(0.5, 1.25)]}
    assert script.curves_of([*rows, row("dense", "call", 30.0, "float32")]) == {key: [(0.5, 2.0)]}


def test_break_even_script(script, tmp_path, capsys):
    arguments = ["--preset", "head", "--layers", "head", "--batch", "1", "--density", "0.5", "0.1"]
    curves = script.main([*arguments, "--seconds", "0.01", "--plot", str(tmp_path / "new" / "plot.png")])
    assert len(curves) == 2
    assert [d for d, _ in next(iter(curves.values()))] == [0.1, 0.5]
    assert (tmp_path / "new" / "plot.png").stat().st_size > 0
    assert capsys.readouterr().out.count("break-even") == 2
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"rows": [{"operator": "strip_attention"}]}')
    for bad, message in (
        (["--plot", "break_even.foo"], "plot: expected a file of "),
        (["--layers", "haed"], "--layers: expected some of head, "),
        (["--block", "32"], "expected block=intxint; got 'block=32'"),
        (["--density", "0.5", "2"], "expected density above 0, at most 1; got 2.0"),
        (["--batch", "1", "0"], "--batch: expected positive numbers; got [1, 0]"),
        (["--seconds", "nan"], "--seconds: expected a positive number; got nan"),
        (["--density", "--json", str(tmp_path / "none.json")], "density: expected some, or --json with"),
        (["--json", str(foreign)], "json: expected a file that this script wrote; got "),
    ):  # they were told after the sweep, which may take an hour, or not at all
        with pytest.raises(SystemExit):
            script.parse(["--preset", "head", *bad])
        assert message in capsys.readouterr().err
    assert script.crossing([(0.1, 4.0), (0.5, 1.5), (0.7, 0.5)]) == "0.60"
    assert script.crossing([(0.1, 0.9)]) == "below 0.1"
    assert script.crossing([(0.1, 4.0)]) == "above 0.1"
