"""What the host twin counts of a warp's accesses (csrc/twin/traffic.h), where it is known by hand."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import twin

pytestmark = pytest.mark.skipif(bool(twin.missing_tools()), reason=str(twin.missing_tools()))


def counted(module, run):
    """{(of shared memory, writes): (requests, taken, least)} of `run`, all places in the code together."""
    module.count_traffic(True)
    run()
    totals = {}
    for _, _, shared, writes, *numbers in module.traffic():
        totals[shared, writes] = tuple(np.add(totals.get((shared, writes), (0, 0, 0)), numbers))
    return totals


@pytest.mark.parametrize(
    ("width", "pitch", "wavefronts", "least", "sectors", "least_sectors"),
    [
        (1, 1, 1, 1, 4, 4),  # 32 words side by side
        (1, 2, 2, 1, 8, 4),  # every other bank, twice; half of each sector
        (1, 8, 8, 1, 32, 4),
        (1, 32, 32, 1, 32, 4),  # one bank
        (1, 33, 1, 1, 32, 4),  # padded: each row one bank further
        (2, 2, 2, 2, 8, 8),  # 8 bytes: half a warp at a time
        (2, 34, 2, 2, 32, 8),
        (4, 4, 4, 4, 16, 16),  # 16 bytes: a quarter at a time
        (4, 32, 32, 4, 32, 16),
        (4, 36, 4, 4, 32, 16),  # rows 16 bytes longer than all banks
    ],
)
def test_stores(module, width, pitch, wavefronts, least, sectors, least_sectors):
    raw = np.zeros(32 * pitch + 64, np.float32)
    out = raw[-raw.ctypes.data % 128 // 4 :]
    totals = counted(module, lambda: module.write_apart(out.ctypes.data, width, pitch))
    assert totals == {(True, True): (1, wavefronts, least), (False, True): (1, sectors, least_sectors)}


@pytest.mark.parametrize("tiles", [2, 4])
def test_ldmatrix_takes_a_wavefront_a_tile(module, tiles):
    x, out = np.zeros(64 * tiles, np.uint16), np.zeros((32, tiles), np.uint32)
    totals = counted(module, lambda: module.load_matrices(x.ctypes.data, out.ctypes.data, tiles, 0, 0))
    assert totals[True, False] == (1, tiles, tiles)


def test_lines_and_kernels_are_named(module):
    out = np.zeros(64, np.float32)
    module.count_traffic(True)
    module.write_apart(out.ctypes.data, 1, 1)
    source = (twin.SOURCE / "probe_memory.cu").read_text().splitlines()
    for kernel, line, shared, *_ in module.traffic():
        assert kernel == "write_apart_kernel"
        file, number = line.split(":")
        assert file == "probe_memory.cu"
        assert ("shared_memory()" in source[int(number) - 1]) == shared


def test_nothing_is_counted_unasked(module):
    out = np.zeros(64, np.float32)
    module.write_apart(out.ctypes.data, 1, 1)
    assert module.traffic() == []


@pytest.mark.parametrize(
    ("operator", "shape", "most"),
    [
        ("block_sparse_linear", ["--shape", "out=160,in=96,tokens=70"], 1.05),
        ("cascaded_group_attention", ["--preset", "efficientvit_m0", "--stage", "2"], 1.05),
        ("kan_linear", ["--shape", "rows=130,channels=64,outputs=64"], 1.05),
        ("neighborhood_attention", ["--shape", "map=16x16"], 1.2),
        ("polyline_path_attention", ["--preset", "ppma_t", "--stage", "3"], 1.1),
        ("residual_ffn", ["--shape", "c=192,side=14,layout=nhwc"], 1.05),
        ("strip_attention", ["--preset", "s2aformer_t", "--stage", "3"], 1.05),
        ("window_attention", ["--preset", "efficientvit_m0", "--stage", "1"], 1.1),
    ],
)
def test_operators_are_almost_free_of_bank_conflicts(operator, shape, most):
    """Rows of four chunks met in the banks two by two, and a column of KAN's sums four by four, until this counted."""
    script = [sys.executable, str(twin.ROOT / "scripts" / "memory_traffic.py"), operator, *shape]
    done = subprocess.run(
        [*script, "--most", str(most)],
        cwd=twin.ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_" in done.stdout or "product_kernel" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("memory_traffic", ["--preset", "efficientvit_m9"], "preset: expected one of efficientvit_m0, "),
        ("memory_traffic", ["--stage", "9"], "stage: expected one of efficientvit_m5, 0 to 2; got 9"),
        ("memory_traffic", ["--stage", "-1"], "stage: expected one of efficientvit_m5, 0 to 2; got -1"),
        ("memory_traffic", ["--shape", "windows=x"], "shape: expected windows=int; got 'windows=x'"),
        ("memory_traffic", ["--shape", "d=8", "--preset", "efficientvit_m5"], "expected either --preset or"),
        ("memory_traffic", ["--batch", "0"], "batch: expected a positive number; got 0"),
        ("barriers", ["--jobs", "0"], "--jobs: expected at least 1; got 0"),
    ],
)
def test_bad_arguments_of_the_scripts_are_refused(script, arguments, message, monkeypatch, capsys):
    """They ended in tracebacks, and of two problems that were asked for one was left out without a word."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # memory_traffic sets it
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = twin.ROOT / "scripts" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(twin, "build", lambda: pytest.fail("built"))
    monkeypatch.setattr(sys, "argv", [str(path), "window_attention", *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert message in capsys.readouterr().err
