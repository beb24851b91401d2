from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkernels.__main__ import main
from vitkernels.bench import report, runner

SHAPE = "windows=2,window=4x4,heads=1,d=16,dv=32"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vitkernels.bench.peaks.CPU_COPY_BYTES", (1 << 20,))


def test_operator_run_writes_json_csv_and_plot(tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    code = main(
        [
            *("bench", "--op", "window_attention", "--device", "cpu", "--shape", SHAPE, "--batch", "1", "2"),
            *("--providers", "sdpa", "vitkernels-reference", "--seconds", "0.01", "--rounds", "3", "--quiet"),
            *("--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])),
        ]
    )
    assert code == 0
    content = json.loads(files["json"].read_text())
    assert content["schema"] == report.SCHEMA
    assert set(content) == {"schema", "time", "environment", "peaks", "settings", "summary", "rows"}
    assert len(content["rows"]) == 2 * 2 * 3  # batches x modes x providers
    for row in content["rows"]:
        assert set(row) == set(runner.Row.__dataclass_fields__)
        assert row["status"] == "ok"
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert 0 < row["error_share"] <= 1 or row["error_share"] == 0
        assert row["floor_share"] == pytest.approx(row["floor"] / row["median"])
        assert row["flops_per_second"] > 0
    assert {(s["mode"], s["provider"], s["count"]) for s in content["summary"]} >= {("fwd", "sdpa", 2)}
    with files["csv"].open() as stream:
        assert len(list(csv.DictReader(stream))) == len(content["rows"])
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "measured peaks" in printed
    assert "geometric mean" in printed


def test_wrong_result_of_ours_is_an_exit_code(monkeypatch, capsys):
    from vitkernels.kernels.window_attention import reference

    original = reference.forward

    def scaled(*args, **kwargs):
        out, *rest = original(*args, **kwargs)
        # Right in float64, so that only the float32 call is wrong.
        return (out if out.dtype is torch.float64 else out * 1.01, *rest)

    operator = __import__("vitkernels").core.operator.REGISTRY["window_attention"]
    monkeypatch.setattr(operator, "reference", scaled)
    arguments = ["bench", "--op", "window_attention", "--device", "cpu", "--shape", SHAPE, "--mode", "fwd"]
    code = main([*arguments, "--providers", "vitkernels-reference", "--seconds", "0.01", "--quiet"])
    printed = capsys.readouterr().out
    assert code == 1
    assert "WRONG" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "op: expected one of"),
        ([], "op: expected one of --op or --model; got neither"),
        (["--op", "window_attention", "--model", "efficientvit_m0"], "--op or --model; got both"),
        (["--op", "window_attention", "--token-merging", "8"], "token-merging: expected it beside --model"),
        (["--op", "window_attention", "--preset", "resnet"], "preset: expected some of"),
        (["--op", "window_attention", "--providers", "cpu"], "providers: expected some of eager, "),
        (["--op", "window_attention", "--shape", "windows=-1"], "windows of at least 1; got 'windows=-1'"),
        (["--op", "window_attention", "--shape", "windows=0"], "windows of at least 1; got 'windows=0'"),
        (["--op", "window_attention", "--seconds", "-1"], "seconds: expected a positive number; got -1.0"),
        (["--op", "window_attention", "--seconds", "inf"], "seconds: expected a positive number; got inf"),
        (["--op", "window_attention", "--seed", str(2**64)], "seed: expected a number of at most 64 bits"),
        (["--op", "window_attention", "--channels-last"], "channels-last: expected it beside --model"),
        (["--model", "efficientvit_m0", "--refresh-peaks"], "refresh-peaks: expected it beside --op"),
        (["--op", "window_attention", "--csv", "."], "csv: expected a file; got the folder '.'"),
        (["--op", "window_attention", "--json", "README.md/x.json"], "json: expected a file that can be"),
        (["--op", "window_attention", "--plot", "x.foo"], "plot: expected a file of "),
        (["--op", "window_attention", "--shape", "d=1", "--preset", "swin_t"], "got both"),
        (["--op", "window_attention", "--batch", "0"], "batch: expected positive"),
        (["--model", "resnet9000"], "model: expected one of timm's or one of"),
        (["--model", "efficientvit_m0", "--mode", "fwd+bwd"], "model: a network runs in inference"),
    ],
)
def test_bad_arguments_are_one_line_on_stderr_before_anything_is_measured(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("vitkernels.bench.peaks.measured_peaks", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--device", "cpu", "--quiet", *arguments]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


def test_what_was_measured_before_the_memory_ended_is_kept(tmp_path, capsys, monkeypatch):
    run_problem = runner.run_problem

    def limited(case, preset, problem, batch, *rest):
        if batch > 1:
            raise RuntimeError("can't allocate memory\nand where")
        return run_problem(case, preset, problem, batch, *rest)

    monkeypatch.setattr(runner, "run_problem", limited)
    monkeypatch.setattr("vitkernels.bench.peaks.measured_peaks", lambda *_, **__: None)
    file = tmp_path / "out.json"
    arguments = ["bench", "--op", "window_attention", "--device", "cpu", "--shape", SHAPE, "--mode", "fwd"]
    arguments += ["--providers", "vitkernels-reference", "--seconds", "0.01", "--rounds", "2", "--quiet"]
    assert main([*arguments, "--batch", "1", "2", "--json", str(file)]) == 1
    assert {row["batch"] for row in json.loads(file.read_text())["rows"]} == {1}
    printed = capsys.readouterr().out
    assert "RuntimeError: can't allocate memory: this is what was measured until then" in printed
    assert "geometric mean" in printed
    with pytest.raises(RuntimeError, match="allocate"):
        main([*arguments, "--batch", "2"])


def test_a_batch_or_mode_named_twice_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr("vitkernels.bench.peaks.measured_peaks", lambda *_, **__: None)
    file = tmp_path / "out.json"
    arguments = ["bench", "--op", "window_attention", "--device", "cpu", "--shape", SHAPE, "--quiet"]
    arguments += ["--providers", "vitkernels-reference", "--seconds", "0.01", "--rounds", "2"]
    assert main([*arguments, "--batch", "1", "1", "--mode", "fwd", "fwd", "--json", str(file)]) == 0
    assert [row["provider"] for row in json.loads(file.read_text())["rows"]] == [
        "eager",
        "vitkernels-reference",
    ]


def test_missing_extra_says_how_to_install(monkeypatch, capsys):
    import importlib

    real = importlib.import_module

    def without_rich(name, *args):
        if name == "rich":
            raise ImportError("No module named 'rich'")
        return real(name, *args)

    monkeypatch.setattr("vitkernels.bench.extras.importlib.import_module", without_rich)
    assert main(["bench", "--op", "window_attention"]) == 2
    assert "pip install 'vitkernels[bench]'" in capsys.readouterr().err


def test_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for word in ("window_attention", "efficientvit_m5", "swin_t", "torch.compile", "sdpa", "vitkernels-cpu"):
        assert word in printed


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_is_cut_short_on_a_narrow_terminal(width, capsys):
    from rich.console import Console

    row = runner.Row(
        "op", "p", "preset stage 1", "16x1 67200x1050 1|64", 16, "float32", "cpu", "fwd", "mine", True
    )
    row.provider, row.method, row.median, row.p20, row.p80 = (
        "vitkernels-reference",
        "wall",
        1.2e-3,
        1.1e-3,
        1.3e-3,
    )
    row.speedup, row.flops_per_second, row.bytes_per_second = 12.34, 1.234e12, 1.2e9
    row.floor_share, row.bound = 0.2, "memory"
    console = Console(width=width, color_system=None)
    report.print_report(console, [row], runner.summarize([row]))
    row.images_per_second = 1234.5
    report.print_report(console, [row], [])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(len(line) <= width for line in printed.splitlines())
    for number in ("vitkernels-reference", "1.20 ms", "12.34", "20 % memory", "1234.5"):
        assert number in printed
    assert ("1.10 ms - 1.30 ms" in printed) == (width > 80)


def test_failures_are_printed_with_their_reason(capsys):
    from rich.console import Console

    base = {"subject": "op", "preset": "p", "shape": "1x1", "batch": 1, "dtype": "float32", "device": "cpu"}
    row = runner.Row(**base, problem="stage 1", mode="fwd", provider="eager", ours=False, method="wall")
    row.median = row.p20 = row.p80 = 1.5e-4
    wrong = runner.Row(**base, problem="stage 1", mode="fwd", provider="mine", ours=True, status="wrong")
    wrong.reason = "grad q: max 1.00e+00 [allowed]"
    report.print_report(Console(width=120), [row, wrong], [])
    printed = capsys.readouterr().out
    assert "150 us" in printed
    assert "WRONG" in printed
    assert "wrong mine: grad q: max 1.00e+00 [allowed] [first at stage 1, batch 1, fwd]" in printed


@pytest.mark.parametrize(
    ("preset", "code", "message"),
    [("efficientvit_m5", 0, "bench_residual_ffn.py::"), ("nope", 4, "--preset: expected some of")],
)
def test_a_preset_of_some_operators_is_one_for_all_of_pytests_benchmarks(preset, code, message):
    """README's `pytest benchmarks --preset efficientvit_m5` once ended in KeyErrors of the operators without it."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "benchmarks", "--preset", preset]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == code, done.stdout
    assert message in done.stdout + done.stderr
