"""Builds the compiled extension with CMake and Ninja.

Environment:
    VITKERNELS_BUILD_CUDA   unset: CUDA kernels when nvcc works; 1: a missing nvcc is an error; 0: none
    VITKERNELS_BUILD_NATIVE 0: no compiled extension at all (Triton and reference backends only)
    VITKERNELS_CUDA_ARCHS   CMake architecture list, e.g. "80;90a-real"; default: the GPU present, else
                            80 (with PTX), 90a, 120, as far as nvcc knows them
    VITKERNELS_OPERATORS    comma-separated operators to build the CUDA and CPU kernels of; default: all
    VITKERNELS_CMAKE_ARGS   further CMake arguments
    VITKERNELS_BUILD_DIR    where CMake builds; default: a folder of setuptools' own
    MAX_JOBS                parallel compile jobs; default: bounded by cores and memory
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a-real;120-real"
BYTES_PER_JOB = 1 << 30  # the largest source takes 0.4 GB


def say(message: str) -> None:
    """Prints past pip's capture of a successful build, so that a missing part is never silent."""
    line = f"vitkernels: {message}"
    print(line, file=sys.stderr, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            print(line, file=terminal)
    except OSError:
        pass


def switch(name: str) -> str:
    """A variable that is "0", "1" or empty: "ON" for a kernel that must be built would else mean nothing."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"vitkernels: {name}: expected 0 or 1; got {value!r}.")
    return value


def cxx_compiler() -> list[str]:
    """The command of the C++ compiler, empty without one."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command if shutil.which(command[0]) else []
    for name in ("c++", "g++", "clang++"):  # the CPU kernels use GCC's and Clang's vector extensions
        if path := shutil.which(name):
            return [path]
    return []


def nvcc_compiler() -> str | None:
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    if path := shutil.which("nvcc"):
        return path
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None


def present_archs() -> str | None:
    """Architectures of the GPUs in this machine, as CMake spells them, or None."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    caps = sorted(
        {line.strip().replace(".", "") for line in lines if line.strip().replace(".", "").isdigit()}
    )
    caps = [cap for cap in caps if int(cap) >= 80]
    # The "a" target is only for Hopper's and Blackwell's architecture-specific instructions.
    return ";".join(f"{cap}a-real" if cap in ("90", "100") else f"{cap}-real" for cap in caps) or None


def default_archs(nvcc: str) -> str:
    """Those of the GPUs in this machine, else DEFAULT_ARCHS; what this nvcc is too old for is left to PTX."""
    wanted = (present_archs() or DEFAULT_ARCHS).split(";")
    try:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ";".join(wanted)
    known = [arch for arch in wanted if f"compute_{arch.partition('-')[0].rstrip('a')}" in listed]
    if len(known) < len(wanted):
        say(f"{nvcc} is too old for {', '.join(arch for arch in wanted if arch not in known)}.")
        known = ["80", *(arch for arch in known if arch != "80")]
    return ";".join(known)


def jobs() -> int:
    if asked := os.environ.get("MAX_JOBS", "").strip():
        if not asked.isdecimal():
            raise SystemExit(f"vitkernels: MAX_JOBS: expected a number of compile jobs; got {asked!r}.")
        return max(1, int(asked))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, available_memory() // BYTES_PER_JOB))


def available_memory() -> int:
    """Bytes. What caches files counts as available: after an installation of torch little else is left."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def compiler_works(compiler: list[str]) -> bool:
    command = [*compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", "-"]
    try:
        return (
            subprocess.run(command, input="#include <vector>\n", text=True, capture_output=True).returncode
            == 0
        )
    except OSError:
        return False


def wanted() -> bool:
    cuda = switch("VITKERNELS_BUILD_CUDA")
    if switch("VITKERNELS_BUILD_NATIVE") == "0":
        say("compiled extension switched off: Triton and reference backends only.")
        return False
    compiler = cxx_compiler()
    if compiler and compiler_works(compiler):
        return True
    if cuda == "1":
        raise SystemExit(
            "vitkernels: VITKERNELS_BUILD_CUDA=1 but no working C++ compiler was found (set CXX)."
        )
    say(
        "no working C++ compiler found (set CXX): no CPU or CUDA kernels; Triton and reference backends only."
    )
    return False


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("VITKERNELS_BUILD_DIR") or Path(self.build_temp).resolve() / "cmake")
        build.mkdir(parents=True, exist_ok=True)
        # Without build isolation the cmake and ninja of the environment need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment, cmake = {**os.environ, "PATH": path}, shutil.which("cmake", path=path)
        if nvcc := nvcc_compiler():
            # Not as CMAKE_CUDA_COMPILER, which CMake would take on trust: an nvcc that fails must mean CPU kernels.
            environment["CUDACXX"] = nvcc
        if cmake is None:
            raise SystemExit("vitkernels: cmake was not found: pip install cmake ninja")
        # An earlier build's cache names the tools of a temporary environment that is gone. Unlike cmake --fresh,
        # this keeps the objects, which ninja knows to be up to date or not.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for tools in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(tools, ignore_errors=True)
        arguments = [cmake, "-S", str(ROOT), "-B", str(build), *self.cmake_arguments(target)]
        subprocess.run(arguments, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs())], check=True, env=environment)

    def cmake_arguments(self, target: Path) -> list[str]:
        import pybind11

        arguments = [
            f"-DVITKERNELS_OUTPUT={target}",
            f"-DVITKERNELS_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if os.name != "nt":
            arguments.append("-GNinja")
        if operators := os.environ.get("VITKERNELS_OPERATORS", "").replace(",", " ").split():
            arguments.append(f"-DVITKERNELS_OPERATORS={';'.join(operators)}")
        cuda, nvcc = switch("VITKERNELS_BUILD_CUDA"), nvcc_compiler()
        if cuda == "1" and not nvcc:
            raise SystemExit(
                "vitkernels: VITKERNELS_BUILD_CUDA=1 but nvcc was not found (set CUDACXX, CUDA_HOME or PATH)."
            )
        if cuda == "0" or not nvcc:
            say(
                f"{'CUDA kernels switched off' if cuda == '0' else 'nvcc not found'}: building the CPU kernels only."
            )
            arguments.append("-DVITKERNELS_CUDA=OFF")
        else:
            archs = os.environ.get("VITKERNELS_CUDA_ARCHS") or default_archs(nvcc)
            say(f"building CUDA kernels with {nvcc} for {archs}.")
            arguments += [
                f"-DVITKERNELS_CUDA={'ON' if cuda == '1' else 'AUTO'}",
                f"-DVITKERNELS_CUDA_ARCHS={archs}",
            ]
        return arguments + shlex.split(os.environ.get("VITKERNELS_CMAKE_ARGS", ""))


setup(
    ext_modules=[Extension("vitkernels._native", [])] if wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
