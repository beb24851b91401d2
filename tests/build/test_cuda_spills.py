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
# Those with asynchronous products of warpgroups.
WARPGROUPS = (
    *("block_sparse_linear/warpgroup_product.cu", "block_sparse_linear/weight_hopper.cu"),
    *("kan_linear/forward_hopper.cu", "kan_linear/u_hopper.cu", "kan_linear/weight_hopper.cu"),
    *("learnable_token_merge/backward.cu", "learnable_token_merge/forward.cu"),
    "residual_ffn/forward_hopper.cu",
)


# Of kernels that run for a few microseconds at batch 1, where fetching code for the first time is much of that:
# (kernel, template arguments) -> bytes for sm_90a.
LATENCY_BOUND = {
    ("forward_tensor_kernel", "__nv_bfloat16, 64"): 64_000,
    ("forward_tensor_kernel", "__nv_bfloat16, 16"): 56_000,
    ("forward_expand_kernel", "__nv_bfloat16, 32"): 36_000,
    ("forward_contract_kernel", "__nv_bfloat16, 32"): 10_000,
    ("forward_stream_kernel", "TensorCores<__nv_bfloat16, 64>, 64, 64, WindowMap<__nv_bfloat16> "): 50_000,
}


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


def test_kernels_bound_by_latency_have_little_code(usage: list[kernel_report.Usage]) -> None:
    sizes = {(row.kernel, row.variant): row.code for row in usage}
    larger = {
        kernel: sizes[kernel] for kernel, most in LATENCY_BOUND.items() if not 0 < sizes[kernel] <= most
    }
    assert not larger, f"bytes of code: {larger}, at most {LATENCY_BOUND}"


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


@pytest.mark.parametrize("name", WARPGROUPS)
def test_products_of_warpgroups_do_not_wait_for_each_other(name: str) -> None:
    """Where ptxas cannot follow the registers of asynchronous products it puts a wait behind every one of them, and
    says so in a note of a long build."""
    built = kernel_report.built_object(kernel_report.ROOT / "csrc" / name)
    if built is None:
        pytest.skip("no build of it is up to date")
    kernels = kernel_report.warpgroup_products(built, BUILT)
    assert kernels, "no product of warpgroups"
    # The sources wait once or twice in their loops, and once behind them.
    waiting = {kernel: counts for kernel, counts in kernels.items() if counts[1] > 3}
    assert not waiting, f"(products, waits): {waiting}"
