"""scripts/gpu_check.py on CPU tensors, and what gpu_check.sh makes of its steps."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkernels import ops
from vitkernels.core import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import build_tools
import gpu_check

SCRIPT = Path(gpu_check.__file__).with_suffix(".sh")
BACKEND = "reference" if native.why_missing() else "cpu"
ARGUMENTS = ["check", "--device", "cpu", "--backends", BACKEND, "--repeats", "1", "--jobs", "1"]


def check(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *ARGUMENTS, *arguments])
    return gpu_check.main()


def test_right_kernels_pass(monkeypatch, capsys):
    shapes = ("3x5", "4x4-lse", "7x7-no_bias", "12x12-lse")
    assert check(monkeypatch, "--dtypes", "float32", "float16", "float64", "--shapes", *shapes) == 0
    printed = capsys.readouterr().out
    assert printed.count("4 shapes, worst error") == 3
    assert "FAILED" not in printed


@pytest.mark.parametrize("wrong", ["lse", "out in inference", "repeat"])
def test_wrong_kernels_fail(monkeypatch, capsys, wrong):
    right, calls = ops.window_attention, []

    def window_attention(*args, backend=None, **kwargs):
        calls.append(backend)
        result = right(*args, backend=backend, **kwargs)
        if backend != BACKEND or len(calls) < 2:
            return result
        out, lse = result
        if wrong == "lse":
            return out, lse * 1.01
        if wrong == "repeat":
            return out * (1 + 1e-7 * len(calls)), lse
        return (out if torch.is_grad_enabled() else out * 1.01), lse

    monkeypatch.setattr(ops, "window_attention", window_attention)
    assert check(monkeypatch, "--dtypes", "float32", "--shapes", "4x4-lse") == 1
    printed = capsys.readouterr().out
    message = {"lse": "lse: max", "out in inference": "out: max", "repeat": "a repeat changed out"}[wrong]
    assert f"FAILED window_attention {BACKEND} torch.float32 4x4-lse" in printed
    assert message in printed


def test_a_kernel_that_ran_in_no_dtype_was_not_checked(monkeypatch, capsys):
    """CPU tensors are for no CUDA kernel."""
    arguments = ["--device", "cpu", "--backends", "cuda", "--operators", "token_merge", "--most-shapes", "1"]
    arguments += ["--jobs", "1", "--dtypes", "float32", "float16"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "check", *arguments])
    assert gpu_check.main() == 1
    assert "FAILED token_merge cuda: nothing ran\n0 of 0 passed" in capsys.readouterr().out


def test_a_kernel_that_an_operator_does_not_have_is_none_that_failed(monkeypatch, capsys):
    arguments = ["check", "--device", "cpu", "--backends", "triton", BACKEND, "--operators", "residual_ffn"]
    arguments += ["--most-shapes", "1", "--repeats", "1", "--jobs", "1", "--dtypes", "float32"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert gpu_check.main() == 0
    printed = capsys.readouterr().out
    assert "residual_ffn triton: the operator has no triton implementation" in printed
    assert printed.endswith("1 of 1 passed\n")


def test_every_check_has_a_process_of_its_own(tmp_path):
    """One that dies is named, and the others still pass."""
    prefix = tmp_path / "prefix"
    executable(prefix, '#!/bin/bash\n[[ $* == *float16* ]] && exit 9\nexec "$@"\n')
    arguments = [*ARGUMENTS[:-1], "2", "--operators", "token_merge", "--most-shapes", "1"]
    command = [sys.executable, gpu_check.__file__, *arguments, "--prefix", str(prefix)]
    done = subprocess.run([*command, "--dtypes", "float16", "float32"], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"FAILED token_merge {BACKEND} float16: exit code 9" in done.stdout
    assert "1 of 2 passed" in done.stdout


@pytest.mark.parametrize("wrong", [False, True])
def test_large_batches_are_held_to_their_images_alone(monkeypatch, capsys, wrong):
    right = ops.strip_attention

    def strip_attention(q, *args, **kwargs):
        out = right(q, *args, **kwargs)
        if wrong and len(q) > 2:
            out = torch.cat((out[:-1], out[-1:] * 1.1))  # where offsets would wrap
        return out

    monkeypatch.setattr(ops, "strip_attention", strip_attention)
    arguments = ["far", "--device", "cpu", "--backends", BACKEND, "--operators", "strip_attention"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--elements", "1000000"])
    assert gpu_check.main() == wrong
    printed = capsys.readouterr().out
    assert ("last of out" in printed) == wrong
    assert ("right, " in printed) == (not wrong)


def test_large_batches_without_memory_for_a_backward_run_forward(monkeypatch, capsys):
    right = gpu_check.evaluate

    def evaluate(function, inputs, training):
        if training:
            raise torch.OutOfMemoryError
        return right(function, inputs, training)

    monkeypatch.setattr(gpu_check, "evaluate", evaluate)
    arguments = ["far", "--device", "cpu", "--backends", BACKEND, "--operators", "residual_ffn"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--elements", "100000"])
    assert gpu_check.main() == 0
    assert "with backward not run: out of memory; right, " in capsys.readouterr().out


def test_operators_are_benchmarked_to_files_of_their_own(monkeypatch, tmp_path):
    pytest.importorskip("rich")
    arguments = ["bench", str(tmp_path / "results"), "--operators", "token_merge"]
    options = f"--device cpu --batch 1 --rounds 2 --seconds 0.01 --providers vitkernels-{BACKEND}"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--arguments", options])
    assert gpu_check.main() == 0
    assert (tmp_path / "results" / "bench_token_merge.json").exists()


def test_unknown_shapes_name_the_known_ones(monkeypatch, capsys):
    assert check(monkeypatch, "--shapes", "13x13") == 2
    printed = capsys.readouterr().err
    assert "expected some of " in printed
    assert all(f" {name}," in printed for name in ("3x5", "4x4", "12x12-lse"))


@pytest.mark.parametrize(
    ("found", "code"), [("77.0.1", 0), ("84.2.1", 0), ("76.1", 1), ("59.6.0", 1), (None, 1)]
)
def test_an_old_setuptools_is_named_before_the_build_fails(monkeypatch, capsys, found, code):
    monkeypatch.setattr(build_tools, "version", lambda name: found if name == "setuptools" else "1.0")
    assert build_tools.main() == code
    printed = capsys.readouterr().out
    assert f"setuptools {found or 'not installed'}" in printed
    assert ("setuptools 77 or newer is needed to build" in printed) == bool(code)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


PYTHON = """#!/bin/bash
case "$*" in
  *build_tools.py) exec {python} "$@" ;;
  *"-m pytest"*) echo "a test failed"; exit 1 ;;
  *"--preset all"*) trap 'echo "what was measured"; exit 0' INT; sleep 30 & wait ;;
  *) echo "pretended to run $*" ;;
esac
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_steps_that_fail_are_told_from_those_that_cannot_run(tmp_path):
    """The script with a python that only pretends, and a sanitizer that cannot open the device."""
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "pretender", PYTHON.format(python=sys.executable))
    executable(tools / "compute-sanitizer", "#!/bin/bash\necho '= Error: Device not supported'\nexit 1\n")
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tools / "pretender"),
        "OUT": str(tmp_path / "out"),
        "BUDGET": "12",
    }
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    table = (tmp_path / "out" / "gpu_check.txt").read_text()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 skipped" in table
    lines = {line[:34].strip(): line[34:].split(maxsplit=3) for line in table.splitlines() if " s  " in line}
    assert lines["build tools"][0] == "0"
    assert lines["tests (gpu)"][0] == "1"
    for tool in ("memcheck", "racecheck"):
        assert lines[f"compute-sanitizer {tool}"][0] == "skipped"
        assert "Device not supported" in lines[f"compute-sanitizer {tool}"][3]
    # Stopped at its limit, the benchmark writes what it has and has not failed.
    assert lines["bench, every preset"][0] == "0"
    assert "stopped at its limit" in lines["bench, every preset"][3]
    assert "setuptools" in done.stdout


def test_breakdown_lists_what_takes_the_time(monkeypatch, capsys):
    arguments = ["--device", "cpu", "--dtype", "float32", "--rounds", "2", "--most", "400"]
    monkeypatch.setattr(
        sys, "argv", ["gpu_check.py", "breakdown", "efficientvit_m0 2", "no_such 1", "no_batch", *arguments]
    )
    assert gpu_check.main() == 2
    printed = capsys.readouterr().out
    assert "=== efficientvit_m0 2: " in printed
    assert "vitkernels::cascaded_group_attention" in printed
    assert "=== no_such 1: FAILED ValueError" in printed
    assert "=== no_batch: FAILED ValueError" in printed


def test_summary_says_when_there_is_nothing_to_sum_up(monkeypatch, capsys, tmp_path):
    for folder, code in ((tmp_path, 0), (tmp_path / "nosuch", 2)):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "summary", str(folder)])
        assert gpu_check.main() == code
    printed = capsys.readouterr()
    assert printed.out == f"nothing was benchmarked: no bench_*.json in {tmp_path}\n"
    assert printed.err == f"summary: there is no folder {tmp_path / 'nosuch'}\n"
