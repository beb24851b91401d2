"""Interleaved timing: providers take turns in every round, so that drift (clocks, heat, load) hits all."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    median: float
    p20: float
    p80: float
    best: float
    samples: int

    def each(self, calls: int) -> Timing:
        """Of one of the `calls` calls in a step."""
        median, p20, p80, best = (value / calls for value in (self.median, self.p20, self.p80, self.best))
        return Timing(median, p20, p80, best, self.samples)


def percentile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarize(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    median, p20, p80 = (percentile(ordered, share) for share in (0.5, 0.2, 0.8))
    return Timing(median, p20, p80, ordered[0], len(ordered))


def busy() -> str:
    """A warning when other work would disturb the times; empty when the machine is quiet."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 0.5 * cores:
        return ""
    return f"other work is running here (load {load:.1f} on {cores} cores): times are noisy and too long"


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _order(names: list[str], turn: int) -> list[str]:
    # Nobody always runs behind the same neighbour, whose leftovers in the caches and queues would favour or hurt it:
    # every order is followed by its reverse, and then another begins it.
    first = turn // 2 % max(1, len(names))
    order = names[first:] + names[:first]
    return order[::-1] if turn % 2 else order


def fastest(step: Step, calls: int) -> float:
    best = math.inf
    for _ in range(calls):
        begin = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - begin)
    return best


def time_on_cpu(steps: Mapping[str, Step], *, seconds: float = 0.5, rounds: int = 25) -> dict[str, Timing]:
    """Times on the wall clock, caches warm.

    ``seconds`` is the budget of one provider; a sample is the mean of as many calls as fit a round. Should
    other work slow the machine down, the rounds end early, after three times the budget.
    """
    calls = {}
    for name, step in steps.items():
        once = max(fastest(step, calls=4), 1e-7)
        calls[name] = max(1, int(seconds / rounds / once))
        if once * rounds > 2 * seconds:
            rounds = max(MIN_ROUNDS, int(2 * seconds / once))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + 3 * seconds * len(steps)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in _order(list(steps), turn):
                step, count = steps[name], calls[name]
                step()  # bring its code and data back into the caches after the neighbour's turn
                begin = time.perf_counter()
                for _ in range(count):
                    step()
                samples[name].append((time.perf_counter() - begin) / count)
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}


class CudaTimer:
    """Two ways to time on CUDA, both with a cold L2.

    ``call``  events around one ordinary call, with the gaps between its launches; the way to its first launch hides
              behind the flush.
    ``graph`` the call recorded ``repeats`` times in a CUDA graph, each behind a flush of the L2, less the
              same graph with the flushes alone: device time without launch overhead. Timing warm repeats
              instead would leave the inputs in the L2 and flatter every small kernel.
    """

    def __init__(self, device: torch.device, repeats: int = 8):
        self.device = device
        self.repeats = repeats
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.flush_buffer = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def flush(self) -> None:
        self.flush_buffer.zero_()

    def capture(self, step: Step | None) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.flush()
                if step is not None:
                    step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.repeats):
                self.flush()
                if step is not None:
                    step()
        return graph

    def _timed(self, run: Step) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        return begin, end

    def _rounds(self, steps: Mapping[str, Step], rounds: int, before: Step) -> dict[str, list[float]]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
        for turn in range(rounds):
            for name in _order(list(steps), turn):
                before()
                events[name].append(self._timed(steps[name]))
            torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) * 1e-3 for a, b in pairs] for name, pairs in events.items()}

    def time_calls(self, steps: Mapping[str, Step], *, rounds: int = 50) -> dict[str, Timing]:
        for step in steps.values():
            for _ in range(3):
                step()
        return {name: summarize(values) for name, values in self._rounds(steps, rounds, self.flush).items()}

    def time_graphs(
        self, steps: Mapping[str, Step], *, rounds: int = 25
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings, and for every step that cannot be captured the reason."""
        graphs = {"": self.capture(None)}
        failed = {}
        for name, step in steps.items():
            try:
                graphs[name] = self.capture(step)
            except Exception as error:  # whatever a provider does that a capture forbids
                torch.cuda.synchronize(self.device)
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        replays = {name: graph.replay for name, graph in graphs.items()}
        for replay in replays.values():
            replay()
        samples = self._rounds(replays, rounds, lambda: None)
        flushes = summarize(samples.pop("")).median
        timings = {
            name: summarize([max(value - flushes, 0.0) / self.repeats for value in values])
            for name, values in samples.items()
        }
        return timings, failed


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes allocated beyond what was there before, at the worst moment of one call. CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = step()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
