"""Every Triton kernel compiles for sm_80 and sm_90 as the launchers configure it, and nothing spills."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import kernel_report

# (targets, dtypes, whether in every variant). A compilation is long: in the default tier one dtype is compiled whole,
# for one target, and of the rest each kernel once.
SOME = (
    (("90a",), ("float16",), True),
    (("80",), ("float16", "float32"), False),
    (("90a",), ("bfloat16",), False),
)
ALL = ((kernel_report.TARGETS, kernel_report.DTYPES, True),)


@pytest.fixture(
    scope="module",
    params=[SOME, pytest.param(ALL, marks=pytest.mark.thorough)],
    ids=["some variants", "all"],
)
def usage(request: pytest.FixtureRequest) -> list[kernel_report.Usage]:
    rows = []
    for targets, dtypes, every_variant in request.param:
        rows += kernel_report.collect(targets, ("triton",), dtypes=dtypes, every_variant=every_variant)
    for row in rows:
        print(row)
    return rows


def test_every_kernel_is_compiled_for_both_targets(usage: list[kernel_report.Usage]) -> None:
    """In the same dtypes: some kernels serve float32 alone, or half precision."""
    seen = {(row.kernel, row.variant.split()[0], row.target) for row in usage}
    assert len({kernel for kernel, _, _ in seen}) >= 7
    assert {dtype for _, dtype, _ in seen} == set(kernel_report.DTYPES)
    shared = set.intersection(
        *({row[1] for row in seen if row[2] == f"sm_{t}"} for t in kernel_report.TARGETS)
    )
    first, second = (
        {row[:2] for row in seen if row[2] == f"sm_{target}" and row[1] in shared}
        for target in kernel_report.TARGETS
    )
    assert first == second
    for module in kernel_report.triton_modules():
        examples = importlib.import_module(module).examples
        assert all(list(examples(getattr(torch, dtype))) for dtype in kernel_report.DTYPES), module


def test_no_kernel_spills(usage: list[kernel_report.Usage]) -> None:
    failing = [f"{row.kernel} [{row.variant}] {row.target}: {row.local} bytes" for row in usage if row.fails]
    assert not failing, "local memory beyond what the source explains:\n" + "\n".join(failing)


def test_shared_memory_fits_every_supported_gpu(usage: list[kernel_report.Usage]) -> None:
    """The smallest limit among compute capabilities 8.x, 9.0 and 12.0 is 99 KB a block."""
    assert all(row.shared <= 99 * 1024 for row in usage)


def test_batch_size_never_recompiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkernels.kernels.window_attention import triton as launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    table = torch.empty(1, 16)
    with kernel_report.compile_only(80) as compiled:
        for batch in (1, 2, 3, 16, 4096):
            q, out = torch.empty(batch, 1, 16, 16), torch.empty(batch, 1, 16, 32)
            launcher.forward(out, torch.empty(batch, 1, 16), q, q, out, table, 4, 4, False, 0.25)
    assert len(compiled) == 1


def test_batch_size_never_recompiles_cascaded_group_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitkernels.kernels.cascaded_group_attention import triton as launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shapes = ((1, 48, 16), (1, 48), (1, 16, 3, 3), (1, 16), (1, 16), (16, 16), (16,))
    weights = [torch.empty(shape, dtype=torch.float16) for shape in shapes]
    with kernel_report.compile_only(80) as compiled:
        for batch in (1, 2, 3, 16, 4096):
            x = torch.empty(batch, 16, 4, 4, dtype=torch.float16)
            heads = torch.empty(batch, 16, 16, dtype=torch.float16)
            inputs = (x, *weights, 4, 4, [3], 0.25, True)
            launcher.forward(x, heads, *inputs)
            launcher.backward(*inputs[:8], x, None, x, heads, *inputs)
    # Sums are reduced to weights in fp16, and once to the fp32 that a table is made of.
    assert len(compiled) == len({function for function, _ in compiled}) + 1


def test_batch_size_never_recompiles_strip_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkernels.kernels.strip_attention import triton as launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kernel_report.compile_only(80) as compiled:
        for batch in (1, 2, 3, 16, 4096):
            q, k = (torch.empty(batch, 2, tokens, 1, dtype=torch.float16) for tokens in (49, 36))
            v, out = (torch.empty(batch, 2, tokens, 32, dtype=torch.float16) for tokens in (36, 49))
            lse = torch.empty(batch, 2, 49)
            launcher.forward(out, lse, q, k, v, None, 1.0)
            launcher.backward(q, k, v, None, out, None, out, lse, q, k, v, None, 1.0)
    assert len(compiled) == 2


def test_neither_tokens_nor_pattern_recompile_block_sparse_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitkernels.kernels.block_sparse_linear import triton as launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "PROGRAMS", 0)  # one of the two sets of tiles
    bias = torch.empty(32, dtype=torch.float16)
    with kernel_report.compile_only(80) as compiled:
        for tokens, stored in ((1, 1), (2, 3), (16, 4), (4096, 2)):
            x, y = (torch.empty(tokens, width, dtype=torch.float16) for width in (64, 32))
            values = torch.empty(stored, 16, 32, dtype=torch.float16)
            index = torch.empty(6 + 4 * stored, dtype=torch.int32)
            inputs = (x, values, bias, index, 32, 64, "gelu", False)
            launcher.forward(y, y, *inputs)
            launcher.backward(x, None, bias, None, y, None, y, y, *inputs)
    # Forward and gradient of x: the lists and the products differ; and the gradient through the activation.
    assert len(compiled) == 5


def test_neither_batch_nor_sequence_recompiles_token_merging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer has another sequence."""
    from vitkernels.kernels.attention_with_size import triton as attention
    from vitkernels.kernels.bipartite_match import triton as matching
    from vitkernels.kernels.learnable_token_merge import triton as soft
    from vitkernels.kernels.token_merge import triton as merging

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kernel_report.compile_only(80) as compiled:
        for batch, tokens, r in ((1, 197, 16), (2, 181, 1), (3, 160, 16), (4096, 48, 8)):
            half = [torch.empty(batch, n, 64, dtype=torch.float16) for n in (tokens, tokens - r)]
            whole, size = (torch.empty(batch, n, dtype=d) for n, d in ((tokens, torch.int32), (tokens, None)))
            starts, pairs = (torch.empty(batch, n, dtype=torch.int32) for n in (tokens - r + 1, r))
            matching.forward(whole, starts, whole, pairs, pairs, half[0], r, True, False)
            plan = (half[0], size, whole, starts, whole, "wavg")
            merging.forward(half[1], size[:, r:].contiguous(), *plan)
            merging.backward(half[0], None, None, None, None, half[1], None, half[1], size, *plan)
            q, lse = half[0].view(batch, tokens, 4, 16).transpose(1, 2), torch.empty(batch, 4, tokens)
            attention.forward(q, lse, q, q, q, size, 1.0)
            attention.backward(q, q, q, None, q, None, q, lse, q, q, q, size, 1.0)
            g = torch.empty(batch, tokens, 48, dtype=torch.float16)
            soft_inputs = (half[0], g, None, "softmax_rows")
            y = torch.empty(batch, 48, 64, dtype=torch.float16)
            soft.forward(y, y, size, *soft_inputs)
            soft.backward(half[0], g, None, y, None, None, y, y, size, *soft_inputs)
    # Of the soft merge's products each direction is one.
    assert len(compiled) == len({function for function, _ in compiled}) + 1 == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_float32_sums_are_made_in_parts(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dot in float32 starts at zero: to a plain addition of one, Triton gives the sum as its accumulator."""
    from vitkernels.kernels.kan_linear import triton as launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, weight, y = (torch.empty(shape, dtype=dtype) for shape in ((32, 64), (32, 512), (32, 32)))
    row, channel, grid = (torch.empty(count) for count in (32, 64, 8))
    with kernel_report.compile_only(90) as compiled:
        launcher.forward(y, row, row, x, weight, channel, channel, grid, 3.0, 1e-5)
    accumulators = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", "".join(k.asm["ttgir"] for _, k in compiled))
    assert [name.startswith("%cst") for name in accumulators] == [dtype is torch.float32]


def test_a_spilling_kernel_is_seen() -> None:
    row = kernel_report.Usage("triton", "kernel", "float32", "sm_80", 255, 0, 64, 64, 128, "")
    assert row.fails
    assert not kernel_report.dataclasses.replace(row, explanation="an indexed array", allowed=64).fails
    assert kernel_report.dataclasses.replace(row, explanation="an indexed array", allowed=63).fails


def test_an_unknown_operator_is_no_clean_report(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt one once gave an empty table and success."""
    with pytest.raises(SystemExit) as stopped:
        kernel_report.main(["--only", "triton", "--op", "window_atention"])
    assert stopped.value.code == 2
    assert "invalid choice: 'window_atention'" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["x", "9", "90b", "sm_90a"])
def test_a_target_is_a_compute_capability(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernel_report.main(["--target", target])
    assert stopped.value.code == 2
    assert f"expected a compute capability such as 80 or 90a; got '{target}'" in capsys.readouterr().err


def test_a_report_that_could_not_be_written_is_not_begun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernel_report.main(["--json", str(tmp_path / "nosuch" / "report.json")])
    assert stopped.value.code == 2
    assert f"--json: there is no folder {tmp_path / 'nosuch'}" in capsys.readouterr().err
