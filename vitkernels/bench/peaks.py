"""What this machine can do, measured: copy bandwidth, matrix rate, exponential rate; and the floor they give.

No number is written down anywhere: the first benchmark on a machine measures (a few seconds) and keeps the
result in the user's cache directory, keyed by device, threads and torch version.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from vitkernels.bench.case import Cost
from vitkernels.bench.timing import busy
from vitkernels.info import cpu_name

# Total bytes touched by a copy. On a CPU a working set that fits in a cache moves faster than memory does.
CPU_COPY_BYTES = (1 << 20, 8 << 20, 64 << 20, 512 << 20)
CUDA_COPY_BYTES = (2 << 30,)


@dataclass
class Peaks:
    device: str
    threads: int
    torch_version: str
    copy: dict[str, float] = field(default_factory=dict)  # working set in bytes -> bytes/s
    gemm: dict[str, float] = field(default_factory=dict)  # dtype -> FLOP/s
    exp: float | None = None  # exponentials/s

    def bandwidth(self, working_set: float) -> float:
        """The best rate at which a working set of that size was seen to move, read and write together."""
        larger = [rate for size, rate in self.copy.items() if int(size) >= working_set]
        return max(larger) if larger else self.copy[max(self.copy, key=int)]

    def matrix_rate(self, dtype: torch.dtype) -> float:
        rate = self.gemm[dtype_name(dtype)]
        # Without a fast product of 16-bit numbers, as of PyTorch on many CPUs, a kernel computes in float32.
        return max(rate, self.gemm.get("float32", 0.0)) if dtype.itemsize == 2 else rate

    def floor(self, cost: Cost, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds below which the work cannot be done, and which resource says so.

        The three resources are taken as perfectly overlapped: the floor is the largest, not the sum.
        """
        parts = {
            "memory": cost.bytes / self.bandwidth(cost.bytes),
            "matrix": cost.flops / self.matrix_rate(dtype),
            "exp": cost.exps / self.exp if self.exp else 0.0,
        }
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} x{os.cpu_count()}"


def _best_seconds(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The fastest of the calls that fit the time: a peak is what was reached once."""
    step()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if device.type == "cuda":
            begin, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            done.record()
            torch.cuda.synchronize(device)
            best = min(best, begin.elapsed_time(done) * 1e-3)
        else:
            start = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - start)
    return best


def measure_copy(device: torch.device, seconds: float) -> dict[str, float]:
    rates = {}
    for size in CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES:
        source = torch.ones(size // 2, dtype=torch.uint8, device=device).view(torch.float32)
        target = torch.empty_like(source)
        rates[str(size)] = size / _best_seconds(partial(target.copy_, source), device, seconds)
    return rates


def measure_gemm(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    # On a CPU a small product fits between two interruptions and in the caches, a large one hides its edges.
    sides = (384, 1024) if device.type == "cpu" else (4096,) if dtype is torch.float64 else (8192,)
    rates = []
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(2 * side**3 / _best_seconds(partial(torch.mm, a, b, out=out), device, seconds))
    return max(rates)


def measure_exp(device: torch.device, seconds: float) -> float | None:
    if device.type == "cuda":
        # torch.exp on a GPU is bound by memory; the special-function units need a loop in registers.
        try:
            from vitkernels.bench.exp_rate import exponentials
        except ImportError:
            return None
        step, count = exponentials(device)
    else:
        count = 32768 * torch.get_num_threads()
        x = torch.linspace(-8, 0, count)
        out = torch.empty_like(x)

        def step() -> object:
            return torch.exp(x, out=out)

    return count / _best_seconds(step, device, seconds)


def cache_file(device: torch.device) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = f"{device_name(device)}|{torch.get_num_threads()}|{torch.__version__}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return Path(base) / "vitkernels" / f"peaks-{device.type}-{digest}.json"


def measured_peaks(
    device: torch.device, dtypes: tuple[torch.dtype, ...], *, refresh: bool = False, seconds: float = 0.4
) -> Peaks:
    """The machine's peaks for these dtypes, from the cache where they are there already."""
    if device.type == "cpu" and any(dtype.itemsize == 2 for dtype in dtypes):
        dtypes = (*dtypes, torch.float32)
    path = cache_file(device)
    peaks = Peaks(device_name(device), torch.get_num_threads(), torch.__version__)
    if not refresh:
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or of another version
            peaks = Peaks(**json.loads(path.read_text()))
    known = asdict(peaks)
    missing = [dtype for dtype in dtypes if dtype_name(dtype) not in peaks.gemm]
    if not peaks.copy:
        peaks.copy = measure_copy(device, seconds)
    if peaks.exp is None:  # Triton, which measures it on a GPU, may have been installed since
        peaks.exp = measure_exp(device, seconds)
    for dtype in missing:
        peaks.gemm[dtype_name(dtype)] = measure_gemm(device, dtype, seconds)
    if asdict(peaks) == known or busy():
        return (
            peaks  # what was measured beside other work are no peaks: they serve this run, and are not kept
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(peaks), indent=1))
        partial.replace(path)
    except OSError:
        pass  # a read-only home costs a new measurement next time, no more
    return peaks
