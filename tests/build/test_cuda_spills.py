"""Every CUDA kernel compiles without spills or local memory that its source leaves open.

For sm_90a, which `make test` builds; for sm_80 two sources, and all in `make test-thorough`, where each is compiled
again: no source knows its architecture, so most of what one target shows is true of the other.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kernel_report

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

# An array whose index is known at run time only cannot live in registers.
SPILLING = """
__global__ void indexed(const int* index, float* out) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = out[i];
  for (int i = 0; i < 64; ++i) values[index[i]] += values[index[i + 1]];
  for (int i = 0; i < 64; ++i) out[i] = values[i];
}
"""


BUILT = "90a"
# Tensor cores and plain arithmetic in every dtype; and copies and sums of rows.
SAMPLES = ("window_attention/forward.cu", "token_unmerge/forward.cu")


@pytest.fixture(scope="module")
def usage() -> list[kernel_report.Usage]:
    return kernel_report.collect(targets=(BUILT,), languages=("cuda",))


def _failing(rows: list[kernel_report.Usage]) -> list[str]:
    print(f"{len(rows)} kernels, at most {max(row.registers for row in rows)} registers")
    return [
        f"{row.kernel} [{row.variant}] {row.target}: {row.local} bytes, {row.spills} spilled"
        for row in rows
        if row.fails
    ]


def test_every_source_is_compiled(usage: list[kernel_report.Usage]) -> None:
    sources = kernel_report.cuda_sources()
    assert {source.name for source in sources} >= {"forward.cu", "backward.cu"}
    kernels = {(row.kernel, row.target) for row in usage}
    for kernel in ("forward_kernel", "backward_kernel", "reduce_table_kernel"):
        assert (kernel, f"sm_{BUILT}") in kernels


def test_no_kernel_spills(usage: list[kernel_report.Usage]) -> None:
    failing = _failing(usage)
    assert not failing, "local memory beyond what the source explains:\n" + "\n".join(failing)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_do_not_spill_on_sm_80(name: str) -> None:
    failing = _failing(kernel_report.cuda_usage(kernel_report.ROOT / "csrc" / name, "80"))
    assert not failing, "local memory beyond what the source explains:\n" + "\n".join(failing)


@pytest.mark.thorough
def test_no_kernel_spills_on_sm_80() -> None:
    failing = _failing(kernel_report.collect(targets=("80",), languages=("cuda",)))
    assert not failing, "local memory beyond what the source explains:\n" + "\n".join(failing)


@pytest.mark.parametrize("allowed", [0, 8, 256])
def test_local_memory_is_seen_and_needs_its_reason(tmp_path: Path, allowed: int) -> None:
    source = tmp_path / "indexed.cu"
    reason = f"// local memory: up to {allowed} bytes: indexed at run time\n" if allowed else ""
    source.write_text(reason + SPILLING)
    (row,) = kernel_report.cuda_usage(source, "80")
    assert row.kernel == "indexed"
    assert row.local == 256
    assert row.fails == (allowed < 256)
