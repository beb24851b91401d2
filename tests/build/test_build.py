"""The three ways to build: with nvcc, with a C++ compiler only, with no compiler; each built and then used."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1 << 20
ISAS = ("baseline", "avx2", "avx512")
USE = """
import json, sys
# An editable install of this tree would lend the unpacked wheel its compiled extension.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, vitkernels
from vitkernels.core import native
y = torch.randn(2, 3, 40)
rows, starts, members = [0, 2, 1, 0, 2], [0, 2, 3, 5], [0, 3, 2, 1, 4]
plan = vitkernels.MergePlan(*(torch.tensor([part] * 2, dtype=torch.int32) for part in (rows, starts, members)))
out = vitkernels.ops.token_unmerge(y, plan)
assert torch.equal(out, vitkernels.ops.token_unmerge(y, plan, backend="reference"))
assert torch.equal(out, y[:, rows])
x, weight, ones = torch.randn(2, 8), torch.randn(4, 64), torch.ones(8)
left_out = vitkernels.supported_backends("kan_linear", x, weight, ones, ones, torch.linspace(-2, 2, 8))
print(json.dumps({"where": vitkernels.__file__, "native": native.status(), "left_out": left_out,
                  "supported": vitkernels.supported_backends("token_unmerge", y, plan)}))
"""


@pytest.fixture(scope="module")
def sources(no_torch, tmp_path_factory) -> Path:
    """The unpacked source distribution: every build here shows that it holds what a build needs."""
    folder = tmp_path_factory.mktemp("sources")
    # With setuptools' own files there too, it leaves no trace in the tree.
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        "sdist",
        "--formats=zip",
        "-d",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(no_torch)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.zip")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".zip")


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> Path:
    """A folder that, on PYTHONPATH, makes `import torch` fail: the build must not need it."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    return folder


def path_without_nvcc() -> str:
    kept = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    return os.pathsep.join([str(Path(sys.executable).parent), *kept, "/usr/bin", "/bin"])


def build_wheel(sources: Path, no_torch: Path, target: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VITKERNELS_", "CUDA"))}
    environment |= {
        "PYTHONPATH": str(no_torch),
        "VITKERNELS_BUILD_DIR": str(target / "cmake"),
        # The quickest to build; what installs the tests builds all.
        "VITKERNELS_OPERATORS": "token_unmerge",
        "VITKERNELS_CMAKE_ARGS": " ".join(f"-DVITKERNELS_OPTIMIZE_{isa}=-O0" for isa in ISAS),
        **variables,
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "-w",
        str(target),
    ]
    return subprocess.run(
        [*command, str(sources)], env=environment, capture_output=True, text=True, cwd=target
    )


def wheel_of(built: subprocess.CompletedProcess, target: Path) -> Path:
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (wheel,) = target.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / MEGABYTE:.2f} MB")
    return wheel


def use(wheel: Path) -> dict:
    """Runs an operator from the unpacked wheel in a fresh process."""
    unpacked = wheel.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment, capture_output=True, text=True, cwd=wheel.parent
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["where"].startswith(str(unpacked))
    return facts


def members(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_wheel_with_nvcc(sources, no_torch, tmp_path):
    built = build_wheel(
        sources, no_torch, tmp_path, VITKERNELS_CUDA_ARCHS="80-real;80-virtual", VITKERNELS_BUILD_CUDA="1"
    )
    wheel = wheel_of(built, tmp_path)
    assert wheel.stat().st_size < 20 * MEGABYTE
    facts = use(wheel)
    assert facts["native"]["cuda_archs"] == "80-real, 80-virtual"
    assert facts["native"]["operators"] == ["token_unmerge"]
    assert facts["supported"]["cpu"] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_an_old_nvcc_builds_what_it_knows(sources, no_torch, tmp_path):
    """Before CUDA 12.8 there is no sm_120, which once failed the installation."""
    old = tmp_path / "bin" / "nvcc"
    old.parent.mkdir()
    old.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*--list-gpu-arch*) echo compute_75; echo compute_80; exit;;\n"
        "*compute_9*|*compute_1*|*sm_9*|*sm_1*) echo nvcc fatal: Unsupported gpu architecture >&2; exit 1;;\n"
        f'esac\nexec "{shutil.which("nvcc")}" "$@"\n'
    )
    old.chmod(0o755)
    built = build_wheel(
        sources,
        no_torch,
        tmp_path,
        PATH=f"{old.parent}{os.pathsep}{path_without_nvcc()}",
        VITKERNELS_BUILD_CUDA="1",
    )
    assert "is too old for" in built.stdout + built.stderr
    assert use(wheel_of(built, tmp_path))["native"]["cuda_archs"] == "80"


@pytest.fixture(scope="module")
def cpu_folder(sources, no_torch, tmp_path_factory) -> Path:
    """Where a wheel was built with a C++ compiler only, its CMake folder included."""
    folder = tmp_path_factory.mktemp("cpu")
    built = build_wheel(sources, no_torch, folder, PATH=path_without_nvcc())
    wheel_of(built, folder)
    assert "nvcc not found: building the CPU kernels only" in built.stdout + built.stderr
    return folder


def test_wheel_without_nvcc(cpu_folder):
    (wheel,) = cpu_folder.glob("*.whl")
    assert wheel.stat().st_size < 20 * MEGABYTE
    assert "vitkernels/py.typed" in members(wheel)
    assert not [name for name in members(wheel) if "twin" in name or name.startswith(("tests", "csrc"))]
    facts = use(wheel)
    assert not facts["native"]["cuda"]
    assert facts["supported"]["cpu"] == []
    assert "VITKERNELS_OPERATORS" in facts["left_out"]["cpu"][0]
    assert facts["supported"]["cuda"]


def test_the_source_distribution_has_no_half_of_the_tests(sources):
    """setuptools takes tests/test_*.py by itself, without the files that they import."""
    top = {path.name for path in sources.iterdir()}
    assert {"csrc", "vitkernels", "CMakeLists.txt", "LICENSE", "README.md", "setup.py"} <= top
    assert not top & {"tests", "benchmarks", "scripts"}


def test_an_unknown_operator_is_an_error(sources, no_torch, tmp_path):
    built = build_wheel(
        sources, no_torch, tmp_path, VITKERNELS_BUILD_CUDA="0", VITKERNELS_OPERATORS="token_unmegre"
    )
    assert built.returncode != 0
    assert "there is no operator token_unmegre" in built.stdout + built.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["native", "75"])
def test_architectures_that_nothing_can_be_told_of_are_an_error(sources, no_torch, tmp_path, arch):
    """What CMake makes of "native" is not known at run time: every call with CUDA tensors once ended in its int()."""
    built = build_wheel(sources, no_torch, tmp_path, VITKERNELS_CUDA_ARCHS=f"80-real;{arch}")
    assert built.returncode != 0
    assert f"such as 80 or 90a-real, got {arch}" in " ".join((built.stdout + built.stderr).split())


def test_the_installed_extension_is_small():
    """With every operator; the wheels built here have one."""
    spec = importlib.util.find_spec("vitkernels._native")
    assert spec is not None, "the extension is not installed"
    size = Path(spec.origin).stat().st_size
    print(f"{spec.origin}: {size / MEGABYTE:.2f} MB")
    assert size < 20 * MEGABYTE


def test_an_nvcc_that_fails_means_cpu_kernels(sources, no_torch, cpu_folder, tmp_path):
    """CMake once took the compiler on trust, and a broken nvcc failed the installation.

    The CPU kernels are those of `cpu_folder`: only what CMake makes of nvcc is new.
    """
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    built = build_wheel(
        sources,
        no_torch,
        tmp_path,
        PATH=f"{broken.parent}{os.pathsep}{path_without_nvcc()}",
        VITKERNELS_BUILD_DIR=str(cpu_folder / "cmake"),
    )
    assert not use(wheel_of(built, tmp_path))["native"]["cuda"]


def test_building_again_forgets_the_tools_of_the_first_build(sources, no_torch, cpu_folder):
    """Under build isolation ninja lies in a folder that is gone the next time; its path was once kept."""
    cmake = cpu_folder / "cmake"
    cache = cmake / "CMakeCache.txt"
    program = next(line for line in cache.read_text().splitlines() if line.startswith("CMAKE_MAKE_PROGRAM:"))
    cache.write_text(cache.read_text().replace(program, "CMAKE_MAKE_PROGRAM:FILEPATH=/no/such/ninja"))
    kernels = {path: path.stat().st_mtime_ns for path in cmake.rglob("cpu_kernel*.o")}
    assert kernels
    wheel_of(build_wheel(sources, no_torch, cpu_folder, PATH=path_without_nvcc()), cpu_folder)
    assert {path: path.stat().st_mtime_ns for path in kernels} == kernels, "kernels were compiled again"


def test_wheel_without_a_compiler(sources, no_torch, tmp_path):
    built = build_wheel(sources, no_torch, tmp_path, PATH=path_without_nvcc(), CXX="no-such-compiler")
    wheel = wheel_of(built, tmp_path)
    assert "no working C++ compiler found" in built.stdout + built.stderr
    assert not [name for name in members(wheel) if name.endswith(".so")]
    facts = use(wheel)
    assert "was not built" in facts["native"]["error"]
    assert "was not built" in facts["supported"]["cpu"][0]


def test_required_cuda_without_nvcc_is_an_error(sources, no_torch, tmp_path):
    built = build_wheel(sources, no_torch, tmp_path, PATH=path_without_nvcc(), VITKERNELS_BUILD_CUDA="1")
    assert built.returncode != 0
    assert "VITKERNELS_BUILD_CUDA=1 but nvcc was not found" in built.stdout + built.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VITKERNELS_BUILD_CUDA", "ON", "VITKERNELS_BUILD_CUDA: expected 0 or 1; got 'ON'"),
        ("VITKERNELS_BUILD_NATIVE", "no", "VITKERNELS_BUILD_NATIVE: expected 0 or 1; got 'no'"),
        ("MAX_JOBS", "all", "MAX_JOBS: expected a number of compile jobs; got 'all'"),
    ],
)
def test_bad_values_of_the_builds_variables_are_one_line(variable, value, message):
    """A switch that was neither 0 nor 1 was once taken for one that is not set: CUDA=ON built CPU kernels alone."""
    code = "import runpy, sys; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')['jobs']()"
    environment = {**os.environ, variable: value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_empty_variables_are_as_good_as_none():
    """An empty CXX or MAX_JOBS, as a script exports one that was never set, once ended in a traceback."""
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--name']; build = runpy.run_path('setup.py')\n"
        "assert build['jobs']() >= 1 and build['cxx_compiler']() and build['wanted']()"
    )
    names = ("CXX", "MAX_JOBS", "VITKERNELS_BUILD_CUDA", "VITKERNELS_BUILD_NATIVE")
    environment = {**os.environ, **dict.fromkeys(names, "")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=ROOT)
