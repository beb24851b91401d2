"""The device layer's probes compile for real GPUs, without a spill."""

import re
import shutil
import subprocess

import pytest
import twin


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("probe", sorted(path.name for path in twin.SOURCE.glob("probe_*.cu")))
def test_probes_compile_for_real_targets(probe, tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", f"-I{twin.ROOT / 'csrc' / 'include'}", *targets, "-Xptxas=-v"),
            *("-c", str(twin.SOURCE / probe), "-o", str(tmp_path / "probe.o")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    assert spills, done.stderr
    assert not any(spills), done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(("arch", "early"), [("80", False), ("90a", True)])
def test_dependent_launches_start_early_where_the_device_can(arch, early, tmp_path):
    ptx = tmp_path / "probe.ptx"
    command = ["nvcc", "-std=c++17", f"-I{twin.ROOT / 'csrc' / 'include'}", f"-arch=sm_{arch}", "-ptx"]
    subprocess.run([*command, str(twin.SOURCE / "probe_order.cu"), "-o", str(ptx)], check=True)
    for instruction in ("griddepcontrol.launch_dependents", "griddepcontrol.wait"):
        assert (instruction in ptx.read_text()) == early
