"""``python -m vitkernels info``: what is installed, built and usable here, to paste into a bug report."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

import vitkernels
from vitkernels.core import backends, native
from vitkernels.core.operator import REGISTRY

PEERS = ("timm", "torchvision", "natten")
TOOLS = ("c++", "nvcc", "cmake", "ninja")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform's own name has to do
    return platform.processor() or platform.machine()


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cuda_available": torch.cuda.is_available(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            }
        )
    return gpus


def _nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return f"{query}: {'; '.join(done.stdout.split(chr(10))).strip('; ')}"


def _peers() -> dict[str, dict[str, Any]]:
    found = {}
    for name in PEERS:
        version, error = _version(name), None
        if version is not None:
            try:
                # Installed is not usable: a torchvision built for another torch dies while it is imported.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(name)
            except Exception as failure:
                error = _first_line(failure)
        found[name] = {"version": version, "error": error}
    return found


def _operators() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, operator in REGISTRY.items():
        by_backend = {}
        for backend in backends.NAMES:
            declared = operator.backends.get(backend)
            if declared is None and backend != "reference":
                by_backend[backend] = {"dtypes": [], "devices": {}, "missing": f"no {backend} implementation"}
                continue
            if backend in ("cpu", "cuda") and (reason := native.why_left_out(name)):
                by_backend[backend] = {"dtypes": [], "devices": {}, "missing": reason}
                continue
            dtypes = declared.dtypes if declared is not None else backends.FLOAT_DTYPES
            by_backend[backend] = {
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
                "devices": {device: _why_unavailable(backend, device) for device in ("cpu", "cuda")},
            }
        table[name] = by_backend
    return table


def _why_unavailable(backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch finds no CUDA device" if built else "this torch is built without CUDA"
        if backend == "cuda" and native.cuda_reason():
            reason += f"; {native.cuda_reason()}"
        return reason
    return backends.why_unavailable(backend, device, 0 if device == "cuda" else -1)


def _environment() -> dict[str, str]:
    prefixes = ("VITKERNELS_", "TRITON_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(prefixes)}


def collect() -> dict[str, Any]:
    """Everything `info` prints. A part that cannot be found out holds `{"error": why}` or is empty."""

    def guarded(part: Callable[[], Any], fallback: Any = None) -> Any:
        try:
            return part()
        except Exception as error:
            return {"error": _first_line(error)} if fallback is None else fallback

    return {
        "vitkernels": getattr(vitkernels, "__version__", "unknown"),
        "location": os.path.dirname(os.path.abspath(vitkernels.__file__)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": guarded(_cpu, {"name": "unknown"}),
        "torch": guarded(_torch, {"version": torch.__version__, "threads": torch.get_num_threads()}),
        "triton": guarded(lambda: _version("triton") or _version("triton-windows") or ""),
        "gpus": guarded(_gpus, []),
        "nvidia_smi": guarded(lambda: _nvidia_smi() or ""),
        "extension": guarded(native.status),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "environment": _environment(),
        "operators": guarded(_operators),
        "peers": guarded(_peers),
    }


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    if extension.get("error"):
        return [f"missing: {extension['error']}"]
    lines = [f"{extension.get('path')} (version {extension.get('version')}, {extension.get('compiler')})"]
    lines.append(f"CPU kernels: {extension.get('isa')}, OpenMP: {extension.get('openmp') or 'none'}")
    if extension.get("cuda"):
        lines.append(
            f"CUDA kernels: architectures {extension.get('cuda_archs')}, "
            f"runtime {extension.get('cuda_runtime')}, driver {extension.get('cuda_driver') or 'none'}"
        )
        if extension.get("cuda_reason"):
            lines.append(f"CUDA kernels cannot run: {extension['cuda_reason']}")
    else:
        lines.append("CUDA kernels: none, it was built without nvcc")
    return lines


def render(facts: dict[str, Any]) -> str:
    """The facts as plain text."""
    lines: list[str] = []

    def add(label: str, *values: str) -> None:
        for i, value in enumerate(values or ("-",)):
            lines.append(f"{label if not i else '':<12} {value}".rstrip())

    cpu, torch_facts = facts["cpu"], facts["torch"]
    add("vitkernels", f"{facts['vitkernels']} in {facts['location']}")
    add("python", f"{facts['python']}, {facts['platform']}")
    add("cpu", f"{cpu['name']}, {cpu.get('usable_cores')} of {cpu.get('cores')} cores usable")
    add(
        "torch",
        f"{torch_facts['version']}, {torch_facts['threads']} threads, CPU ISA {cpu.get('torch_isa')}, "
        f"CUDA build {torch_facts.get('cuda') or 'none'}",
    )
    add("triton", str(facts["triton"] or "not installed"))
    gpus = [
        f"{gpu['index']}: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} SMs, {gpu['l2_mib']} MiB L2"
        for gpu in facts["gpus"]
    ]
    add("gpu", *gpus or ["none"], *([str(facts["nvidia_smi"])] if facts["nvidia_smi"] else []))
    add("extension", *_extension_lines(facts["extension"]))
    add("tools", ", ".join(f"{tool}: {path or 'not on PATH'}" for tool, path in facts["tools"].items()))
    overrides = [f"{key}={value}" for key, value in facts["environment"].items()]
    add("environment", *overrides or ["no overrides set"])
    if "error" in facts["peers"]:
        add("peers", facts["peers"]["error"])
    else:
        peers = [
            f"{name} {peer['version'] or 'not installed'}"
            + (f", cannot be imported: {peer['error']}" if peer["error"] else "")
            for name, peer in facts["peers"].items()
        ]
        add("peers", *peers)
    if "error" in facts["operators"]:
        add("operators", facts["operators"]["error"])
        return "\n".join(lines)
    for name, table in facts["operators"].items():
        lines += ["", f"operator {name}"]
        for backend, entry in table.items():
            if entry.get("missing"):
                lines.append(f"  {backend:<10} {entry['missing']}")
                continue
            lines.append(f"  {backend:<10} dtypes {', '.join(entry['dtypes'])}")
            for device, reason in entry["devices"].items():
                lines.append(f"  {'':<10} {device} tensors: {reason or 'yes'}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=1, default=str) if args.json else render(facts))
    return 0
