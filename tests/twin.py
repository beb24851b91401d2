"""Builds and loads `_twin`, the CUDA kernels compiled onto host fibers (csrc/twin).

`python tests/twin.py [--sanitize address,undefined] [OPERATOR ...]` builds and prints the module's path.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "twin"
# Those with CUDA kernels.
OPERATORS = tuple(sorted({kernel.parent.name for kernel in SOURCE.parent.glob("*/*.cu")} - {"twin"}))
# The schedules that tests try: VITKERNELS_SEEDS=250 before a release, or after a change to a barrier.
SEEDS = range(int(os.environ.get("VITKERNELS_SEEDS") or 8))


def missing_tools() -> str | None:
    """Why the twin cannot be built here, or None."""
    if sys.platform != "linux":
        return "the host twin switches stacks the Linux way"
    lacking = [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool, path=_search_path()) is None]
    return f"not on PATH: {', '.join(lacking)}" if lacking else None


def _search_path() -> str:
    # cmake and ninja installed by pip lie beside the interpreter even when its venv is not activated
    return os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def build(sanitize: str = "", operators: tuple[str, ...] = OPERATORS) -> Path:
    """Build what is out of date and return the module's path; safe to call from several processes."""
    import pybind11

    contents = () if operators == OPERATORS else operators or ("probes",)
    name = "-".join(["twin", *filter(None, sanitize.split(",")), *contents])
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": _search_path(), "CXX": "g++"}
    environment.pop("LD_PRELOAD", None)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            *("cmake", "--fresh", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja"),
            f"-DVITKERNELS_SANITIZE={sanitize}",
            f"-DVITKERNELS_OPERATORS={';'.join(operators)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        # A new operator, another interpreter or an interrupted configuration starts afresh.
        configured = folder / "configured.txt"
        if not configured.exists() or configured.read_text() != "\n".join(configure):
            _run(configure, environment)
            configured.write_text("\n".join(configure))
        _run(["cmake", "--build", str(folder)], environment)
    modules = list(folder.glob("_twin*.so"))
    if len(modules) != 1:
        raise RuntimeError(f"expected one _twin module in {folder}, found {modules}")
    return modules[0]


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}{done.stderr[-4000:]}")


@functools.cache
def load(sanitize: str = "", operators: tuple[str, ...] = OPERATORS) -> ModuleType:
    """The module; one sanitized for address needs the process started by `run_sanitized`."""
    path = build(sanitize, operators)
    spec = importlib.util.spec_from_file_location("_twin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # scripts/barriers.py asks for these.
    module.ignore_barriers(json.loads(os.environ.get("VITKERNELS_IGNORE_BARRIERS") or "[]"))
    if listing := os.environ.get("VITKERNELS_LIST_BARRIERS"):
        atexit.register(lambda: Path(listing).write_text(json.dumps(module.barriers())))
    return module


def run_sanitized(
    code: str, sanitize: str = "address,undefined", operators: tuple[str, ...] = OPERATORS
) -> subprocess.CompletedProcess[str]:
    """Run Python code, `twin` being the sanitized module, in a process of its own."""
    path = build(sanitize, operators)
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    prologue = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('_twin', {str(path)!r})\n"
        "twin = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(twin)\n"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),  # before Python, and libstdc++ for the exceptions ASan intercepts
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [sys.executable, "-c", prologue + code], env=environment, capture_output=True, text=True, timeout=300
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="")
    parser.add_argument("operators", nargs="*", default=list(OPERATORS))
    arguments = parser.parse_args()
    print(build(arguments.sanitize, tuple(arguments.operators)))
