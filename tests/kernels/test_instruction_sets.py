"""The CPU kernels of other processors: the tests of every operator's CPU kernels again, in one process a set.

Where a processor has no AVX-512, the Makefile builds those kernels emulated: their lanes, tiles and roundings by AVX2.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitkernels.core import native as extension

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

ISAS = ("baseline", "avx2", "avx512")
CSRC = Path(__file__).parents[2] / "csrc"
# Memory, threads and what a tolerance rejects are no matter of the instruction set; most of those tests take long.
LEFT_OUT = ("memory", "large_pages", "threads", "wrong")
FILES = sorted(map(str, Path(__file__).parent.glob("test_*_cpu.py")))


def _in_process(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VITKERNELS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=1800, check=False
    )


def _run_tests_of(isa: str, tier: str) -> None:
    if isa == extension.load().cpu_isa():
        pytest.skip(f"the other tests run {isa}")
    asked = _in_process(isa, "-c", "from vitkernels.core import native; native.load().cpu_isa()")
    if "not available on this processor or in this build" in asked.stderr:
        pytest.skip(asked.stderr.splitlines()[-1])
    assert asked.returncode == 0, asked.stderr[-4000:]
    selection = ["-m", tier, "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    done = _in_process(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection, *FILES)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa: str) -> None:
    """One of the tests run here asks the extension whether the set is the one asked for."""
    _run_tests_of(isa, "not thorough")


@pytest.mark.thorough
@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets_on_the_wider_grid(isa: str) -> None:
    _run_tests_of(isa, "thorough")


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ for x86-64")
def test_real_avx512_compiles() -> None:
    """What names its own instructions, which an emulating build leaves out: simd.h and the mask's stream."""
    flags = ["-std=c++17", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
    command = [
        "g++",
        "-fsyntax-only",
        "-Wno-psabi",
        "-DVITKERNELS_ISA=avx512",
        f"-I{CSRC / 'include'}",
        *flags,
    ]
    for operator in ("polyline_path_mask", "window_attention"):
        files = list(map(str, (CSRC / operator).glob("cpu_kernel*.cpp")))
        assert files
        done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]


def test_unknown_instruction_set_is_refused() -> None:
    """Empty it is as good as unset."""
    script = """
import os
from vitkernels.core import native
try:
    native.load().cpu_isa()
except ValueError as error:
    print(error)
os.environ["VITKERNELS_CPU_ISA"] = ""
print(native.load().cpu_isa())
"""
    refusal, isa = _in_process("sse9", "-c", script).stdout.splitlines()
    assert refusal == "VITKERNELS_CPU_ISA: expected baseline, avx2 or avx512, got sse9"
    assert isa in ISAS
