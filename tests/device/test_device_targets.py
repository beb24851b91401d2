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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("flags", [(), ("-DVITKERNELS_BUILT_FOR_SM90A",)], ids=["other targets", "sm_90a"])
def test_a_build_without_sm_90a_never_takes_its_kernels(flags, tmp_path):
    """Their bodies are empty there: on a Hopper device results would stay unwritten."""
    source, built = tmp_path / "asks.cu", tmp_path / "asks.o"
    source.write_text(
        '#include "vitkernels/wgmma.h"\nbool asks() { return vitkernels::wgmma_available(); }\n'
    )
    include = f"-I{twin.ROOT / 'csrc' / 'include'}"
    subprocess.run(["nvcc", "-std=c++17", include, *flags, "-c", source, "-o", built], check=True)
    assert (b"cudaDeviceGetAttribute" in built.read_bytes()) == bool(flags)


def test_cmake_tells_what_it_builds_for():
    """Read, not run: configuring with nvcc takes as long as a test of the whole build."""
    text = (twin.ROOT / "CMakeLists.txt").read_text()
    condition = re.search(r'if\("\$\{VITKERNELS_CUDA_ARCHS\}" MATCHES "90a"\)\s+(.*)', text)
    assert condition is not None
    assert condition[1] == "target_compile_definitions(cuda_kernels PRIVATE VITKERNELS_BUILT_FOR_SM90A)"
