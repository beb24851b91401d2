#!/usr/bin/env python3
"""Registers, shared memory, spills and size of every CUDA and Triton kernel, for each target. Needs no GPU.

    python scripts/kernel_report.py [--target 80 --target 90a] [--only cuda|triton] [--op NAME] [--json FILE]

CUDA kernels are read from the objects of the last build (in VITKERNELS_BUILD_DIR, default build/cmake) where
those are up to date and hold the target, else compiled by nvcc. Triton kernels are compiled by running the
package's own launchers on CPU tensors with launching replaced by compiling, so what is reported is what a GPU
would be given. All are read with cuobjdump; for CUDA kernels, shared memory is the static part. Exits with 1 when a
kernel uses local memory (spills, or arrays indexed at run time) without its source saying why, on a line
"local memory: up to <n> bytes: <reason>".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("80", "90a")
DTYPES = ("float16", "bfloat16", "float32")
EXPLANATION = re.compile(r"local memory: up to (\d+) bytes: *(\S.*)")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses; `local` is bytes of local memory a thread, `spills` those of spills, `code`
    those of its machine code."""

    language: str
    kernel: str
    variant: str
    target: str
    registers: int
    shared: int
    local: int
    spills: int
    threads: int
    explanation: str
    allowed: int = 0
    code: int = 0

    @property
    def fails(self) -> bool:
        return self.local > self.allowed


def find_tool(name: str) -> str:
    """A CUDA binary utility: from PATH, or the one Triton ships."""
    found = shutil.which(name)
    if found:
        return found
    with contextlib.suppress(ImportError):
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    raise SystemExit(f"kernel_report: {name} is neither on PATH nor inside triton; install one of them.")


def cuobjdump(option: str, binary: Path, target: str = "") -> str:
    """What it prints of a cubin, or of an object's code for a target."""
    only = [f"-arch=sm_{target}"] if target else []
    command = [find_tool("cuobjdump"), option, *only, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(binary: Path, target: str = "") -> dict[str, tuple[int, int, int]]:
    """kernel (mangled) -> (registers, static shared bytes, local bytes) of a cubin, or an object's for a target."""
    text = cuobjdump("-res-usage", binary, target)
    usage = {}
    for name, row in re.findall(r"Function ([^:\s]+):\s*\n\s*(REG:.*)", text):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", row)}
        usage[name] = (numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])
    return usage


def code_sizes(binary: Path, target: str = "") -> dict[str, int]:
    """kernel (mangled) -> bytes of its machine code, what never runs included."""
    text = cuobjdump("-elf", binary, target)
    # index, offset, size, ...: hexadecimal
    sections = re.findall(
        r"^ *[0-9a-f]+ +[0-9a-f]+ +([0-9a-f]+) .* PROGBITS .* \.text\.(\S+)$", text, re.MULTILINE
    )
    return {name: int(size, 16) for size, name in sections}


def warpgroup_products(binary: Path, target: str) -> dict[str, tuple[int, int]]:
    """kernel (mangled) -> (products of warpgroups in its code, waits for them), of kernels that have some."""
    text = cuobjdump("-sass", binary, target)
    kernels = {}
    for part in text.split("Function : ")[1:]:
        if products := part.count("HGMMA"):
            kernels[part.split()[0]] = (products, part.count("WARPGROUP.DEPBAR"))
    return kernels


def spilled_bytes(log: str) -> dict[str, int]:
    """kernel (mangled) -> bytes of spill stores, from the output of ptxas -v."""
    pattern = r"Function properties for (\S+)\n.*?(\d+) bytes spill stores"
    return {name: int(number) for name, number in re.findall(pattern, log)}


def ptx_spills(ptx: str, target: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            find_tool("ptxas"),
            "-v",
            f"-arch=sm_{target}",
            str(source),
            "-o",
            str(source.with_suffix(".o")),
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(spilled_bytes(log).values(), default=0)


class CompileOnlyDriver:
    """Stands in for Triton's CUDA driver where there is no GPU: it has a target and launches nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device of its own, so that targets do not share compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(capability: int, known: Container[Any] = ()) -> Iterator[list[Any]]:
    """In this scope launching a Triton kernel compiles it instead; yields the (function, kernel) pairs.

    Functions in `known` are left out.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run
    # reset_active() would look for a GPU, so the previous state is put back by hand.
    previous = driver._active

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self in known:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for _, other in compiled):
            compiled.append((self, kernel))
        return kernel

    driver.set_active(CompileOnlyDriver(capability))
    JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


ROOMS = ROOT / "vitkernels" / "kernels"


def operators() -> list[str]:
    return [room.name for room in pkgutil.iter_modules([str(ROOMS)]) if room.ispkg]


def triton_modules(operator: str | None = None) -> list[str]:
    """Import paths of the operators' Triton launchers."""
    return [
        f"vitkernels.kernels.{name}.triton"
        for name in operators()
        if (ROOMS / name / "triton.py").exists() and operator in (None, name)
    ]


def triton_usage(module: str, dtype: str, target: str, every_variant: bool = True) -> list[Usage]:
    """Every kernel that a launcher module's `examples(dtype)` launch, compiled for the target.

    Without `every_variant` each kernel is compiled once, as the first example that has it launches it.
    """
    import torch

    capability = int(re.sub(r"\D", "", target))
    rows = []
    known: set[Any] = set()
    with tempfile.TemporaryDirectory() as folder:
        for label, call in importlib.import_module(module).examples(getattr(torch, dtype)):
            with compile_only(capability, known) as compiled:
                call()
            if not every_variant:
                known.update(function for function, _ in compiled)
            for function, kernel in compiled:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(kernel.asm["cubin"])
                ((registers, _, local),) = resource_usage(cubin).values()
                reason = EXPLANATION.search(inspect.getsource(function.fn))
                rows.append(
                    Usage(
                        language="triton",
                        kernel=function.fn.__name__,
                        variant=f"{dtype} {label}",
                        target=f"sm_{target}",
                        registers=registers,
                        shared=kernel.metadata.shared,
                        local=local,
                        spills=ptx_spills(kernel.asm["ptx"], target) if local else 0,
                        threads=kernel.metadata.num_warps * 32,
                        explanation=reason.group(2) if reason and local else "",
                        allowed=int(reason.group(1)) if reason else 0,
                        code=sum(code_sizes(cubin).values()),
                    )
                )
    return rows


def cuda_sources(operator: str | None = None) -> list[Path]:
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    return [s for s in sources if s.parent.name != "twin" and operator in (None, s.parent.name)]


def demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.splitlines(), strict=True))


def short_name(signature: str) -> tuple[str, str]:
    """(name, template arguments) of a demangled kernel, without namespaces and integer casts."""
    bare = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
    bare = re.sub(r"\([\w:]+\)(?=-?\d)", "", bare)
    bare = re.sub(r"\b\w+::", "", bare)
    name, _, rest = bare.partition("(")[0].partition("<")
    return name.strip(), rest.rpartition(">")[0]


@functools.cache
def dependencies(build: Path) -> dict[str, list[Path]]:
    """object -> the files that its compilation read, as the last build recorded them."""
    ninja = shutil.which(
        "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if ninja is None:
        return {}
    command = [ninja, "-C", str(build), "-t", "deps"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read: dict[str, list[Path]] = {}
    for entry in text.split("\n\n"):
        name, *files = entry.splitlines() or [""]
        read[name.partition(": #deps")[0]] = [build / file.strip() for file in files]
    return read


def built_object(source: Path) -> Path | None:
    """The object that the last build made of a CUDA source, unless it is older than a file it was made from."""
    if ROOT not in source.parents:
        return None
    build = Path(os.environ.get("VITKERNELS_BUILD_DIR", ROOT / "build" / "cmake"))
    name = Path("CMakeFiles", "cuda_kernels.dir", source.relative_to(ROOT).parent, f"{source.name}.o")
    built = build / name
    if not built.exists():
        return None
    files = [source, *dependencies(build).get(str(name), [])]
    if len(files) == 1 or not all(file.exists() for file in files):
        return None
    return built if built.stat().st_mtime > max(file.stat().st_mtime for file in files) else None


def compile_source(
    source: Path, target: str
) -> tuple[dict[str, tuple[int, int, int]], dict[str, int], dict[str, int]]:
    """(resource usage, bytes of code, bytes spilled) of every kernel of a CUDA source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
        options = [f"-arch=sm_{target}", "-std=c++17", "-O3", "--expt-relaxed-constexpr", *includes]
        command = [find_tool("nvcc"), "-cubin", "-Xptxas=-v", *options, "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"kernel_report: nvcc failed on {source}:\n{done.stderr}")
        return resource_usage(cubin), code_sizes(cubin), spilled_bytes(done.stderr)


def cuda_usage(source: Path, target: str) -> list[Usage]:
    """Every kernel of a CUDA source, as built for the target; compiled here where no build is up to date."""
    reason = EXPLANATION.search(source.read_text())
    allowed = int(reason.group(1)) if reason else 0
    built = built_object(source)
    usage, code = (resource_usage(built, target), code_sizes(built, target)) if built else ({}, {})
    spills: dict[str, int] = {}
    # Only the compiler's own output tells spills from other local memory.
    if not usage or any(local > allowed for _, _, local in usage.values()):
        usage, code, spills = compile_source(source, target)
    names = demangle(list(usage))
    rows = []
    for mangled, (registers, shared, local) in usage.items():
        kernel, template = short_name(names[mangled])
        rows.append(
            Usage(
                language="cuda",
                kernel=kernel,
                variant=template,
                target=f"sm_{target}",
                registers=registers,
                shared=shared,
                local=local,
                spills=spills.get(mangled, 0),
                threads=0,
                explanation=reason.group(2) if reason and local else "",
                allowed=allowed,
                code=code[mangled],
            )
        )
    return rows


def collect(
    targets: tuple[str, ...] = TARGETS,
    languages: tuple[str, ...] = ("cuda", "triton"),
    operator: str | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    workers: int = 2,
    every_variant: bool = True,
) -> list[Usage]:
    """Compiles everything and returns one row per kernel, variant and target."""
    sys.path.insert(0, str(ROOT))
    jobs: list[functools.partial[list[Usage]]] = []
    if "cuda" in languages:
        jobs += [functools.partial(cuda_usage, s, t) for s in cuda_sources(operator) for t in targets]
    if "triton" in languages:
        modules = triton_modules(operator)
        run = functools.partial(triton_usage, every_variant=every_variant)
        jobs += [functools.partial(run, m, d, t) for m in modules for d in dtypes for t in targets]
    # Spawned, since a fork of a process with running threads may find their locks held for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), context) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [row for future in futures for row in future.result()]


def show(rows: list[Usage]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Kernel resources")
    for column in ("language", "kernel", "variant", "target"):
        table.add_column(column, overflow="fold")
    for column in ("threads", "registers", "code B", "shared B", "local B", "spilled B"):
        table.add_column(column, justify="right")
    table.add_column("local memory because")
    for row in rows:
        table.add_row(
            row.language, row.kernel, row.variant, row.target, str(row.threads or "-"), str(row.registers),
            str(row.code), str(row.shared), str(row.local), str(row.spills), row.explanation,
            style="red" if row.fails else None,
        )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--target", action="append", help="compute capability as nvcc writes it (80, 90a)")
    parser.add_argument("--only", choices=("cuda", "triton"))
    parser.add_argument("--op", choices=operators(), help="one operator's kernels")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="Triton dtypes (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rows as JSON ('-': only that, to stdout)"
    )
    options = parser.parse_args(arguments)
    for target in options.target or ():
        if not re.fullmatch(r"\d{2,3}[af]?", target):
            parser.error(
                f"--target: expected a compute capability such as {' or '.join(TARGETS)}; got {target!r}"
            )
    if options.json not in (None, "-") and not (folder := Path(options.json).absolute().parent).is_dir():
        parser.error(f"--json: there is no folder {folder}")
    rows = collect(
        tuple(options.target or TARGETS),
        (options.only,) if options.only else ("cuda", "triton"),
        options.op,
        tuple(options.dtype or DTYPES),
        options.jobs,
    )
    records = json.dumps([{**dataclasses.asdict(row), "fails": row.fails} for row in rows], indent=1)
    if options.json == "-":
        print(records)
    else:
        show(rows)
        if options.json:
            Path(options.json).write_text(records + "\n")
    failing = [row for row in rows if row.fails]
    for row in failing:
        print(
            f"{row.language} {row.kernel} [{row.variant}] {row.target}: {row.local} bytes of local memory a"
            f" thread ({row.spills} spilled), of which its source explains {row.allowed}",
            file=sys.stderr,
        )
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
