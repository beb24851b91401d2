"""Runs an operator's case: gate first, then interleaved timing, one row a provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitkernels.bench import gate, timing
from vitkernels.bench.case import Case, Cost, Function, Inputs, Problem, Provider, Unavailable
from vitkernels.bench.peaks import Peaks, dtype_name

MODES = ("fwd", "fwd+bwd")

# torch.autograd.grad itself costs some 60 us of Python: more than the calls under it at small shapes. A network
# pays it once for all its layers, so calls shorter than this many seconds share it too, this many at a time.
SHORT_CALL, SHARING_CALLS = 1e-3, 8


@dataclass
class Row:
    """One measurement, in seconds. ``status``: "ok", "wrong" (no times then), "skipped" (with the reason)."""

    subject: str  # operator or model
    preset: str
    problem: str
    shape: str
    batch: int
    dtype: str
    device: str
    mode: str
    provider: str
    ours: bool
    status: str = "ok"
    reason: str = ""
    error_share: float | None = None  # of what the gate allows
    method: str = ""  # wall | call | graph
    calls: int = 1  # of the operator under one backward pass; the times are of one call
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    best: float | None = None
    samples: int = 0
    speedup: float | None = None  # over eager
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    floor: float | None = None
    floor_share: float | None = None
    bound: str = ""
    images_per_second: float | None = None
    peak_memory: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    modes: Sequence[str] = ("fwd", "fwd+bwd")
    batches: Sequence[int] = (1, 16)
    seconds: float = 0.5
    rounds: int = 25
    seed: int = 0


def evaluate(function: Function, inputs: Inputs, training: bool) -> dict[str, Tensor]:
    """Every output and, in training, the gradient of every tensor, by name."""

    def named(result: Any) -> dict[str, Tensor]:
        return dict(zip(inputs.outputs, result if isinstance(result, tuple) else (result,), strict=True))

    if not training:
        with torch.no_grad():
            return named(function(**inputs.tensors))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs = named(function(**leaves))
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), inputs.gradients)
    detached = {name: output.detach() for name, output in outputs.items()}
    return detached | dict(zip(leaves, grads, strict=True))


def verdicts(
    case: Case,
    problem: Problem,
    batch: int,
    inputs: Inputs,
    got: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
) -> list[gate.Check]:
    """A provider's results by the house rule."""
    dtype = inputs.grad_out.dtype
    reduced = case.reduced(problem, batch)
    return gate.check_results(got, baseline, truth, reduced, dtype, inputs.outputs)


def judge(*args: Any) -> gate.Check:
    """The worst of `verdicts`."""
    return gate.worst(verdicts(*args))


class Draws:
    """Inputs of one problem with their truth and baseline, each made when it is first asked for."""

    def __init__(self, case: Case, problem: Problem, batch: int, training: bool, settings: Settings) -> None:
        self.case, self.problem, self.batch, self.training = case, problem, batch, training
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.known: list[tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]] = []

    def __getitem__(self, index: int) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        while len(self.known) <= index:
            inputs = self.case.make_inputs(
                self.problem,
                self.batch,
                dtype=self.settings.dtype,
                device=self.settings.device,
                generator=self.generator,
            )
            self.known.append((inputs, *truth_and_baseline(self.case, inputs, self.training)))
        return self.known[index]

    def judge(self, provider: Provider, function: Function) -> gate.Check:
        """The worst of a provider's results, `function` being prepared for the first draw.

        A kernel whose typical error passes and whose largest does not is judged over three draws together.
        """

        def checks(index: int) -> list[gate.Check]:
            inputs, truth, baseline = self[index]
            prepared = provider.prepare(inputs, self.training) if index else function
            got = evaluate(prepared, inputs, self.training)
            return verdicts(self.case, self.problem, self.batch, inputs, got, baseline, truth)

        first = checks(0)
        if all(c.ok for c in first) or not all(c.rms_error <= c.rms_allowed for c in first):
            return gate.worst(first)
        return gate.worst(gate.pool([first, checks(1), checks(2)]))


def make_step(function: Function, inputs: Inputs, training: bool, calls: int = 1) -> timing.Step:
    """What is timed: no gradient is drawn, no graph retained, no leaf recreated inside.

    In training `calls` calls on leaves of their own, as the layers of a network, and one backward pass.
    """
    if not training:

        def forward() -> object:
            with torch.no_grad():
                return function(**inputs.tensors)

        return forward
    layers = [
        {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        for _ in range(calls)
    ]
    wanted = [leaf for leaves in layers for leaf in leaves.values()]
    gradients = inputs.gradients * calls

    def forward_backward() -> object:
        outputs: list[Tensor] = []
        for leaves in layers:
            result = function(**leaves)
            outputs += result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(outputs, wanted, gradients)

    return forward_backward


def calls_to_share(step: timing.Step, settings: Settings, training: bool) -> int:
    """How many calls share a backward pass, given a step of one. On CUDA, graphs take the Python away instead."""
    if not training or settings.device.type != "cpu":
        return 1
    return SHARING_CALLS if timing.fastest(step, calls=4) < SHORT_CALL else 1


def truth_and_baseline(
    case: Case, inputs: Inputs, training: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 reference and plain PyTorch in the inputs' dtype.

    The reference itself is held to plain PyTorch in float64 first: two programs, one answer.
    """
    wide = inputs.map(lambda tensor: tensor.double())
    operator = case.function

    def reference(**tensors: Tensor) -> Any:
        return operator(**tensors, **inputs.options, backend="reference")

    def plain(**tensors: Tensor) -> Any:
        return case.eager(**tensors, **inputs.options)

    truth = evaluate(reference, wide, training)
    for name, value in evaluate(plain, wide, training).items():
        difference = (truth[name] - value).abs().max().item() if value.numel() else 0.0
        if not difference <= 1e-9 * max(1.0, value.abs().max().item()):
            raise RuntimeError(
                f"{case.operator}: the reference and plain PyTorch disagree in float64 on {name} by "
                f"{difference:.2e}; nothing can be judged against either"
            )
    return truth, evaluate(plain, inputs, training)


def time_steps(
    steps: Mapping[str, timing.Step], settings: Settings
) -> tuple[dict[str, dict[str, timing.Timing]], dict[str, str]]:
    """{method: {provider: timing}} and, on CUDA, why a provider could not be captured in a graph."""
    if settings.device.type != "cuda":
        return {"wall": timing.time_on_cpu(steps, seconds=settings.seconds, rounds=settings.rounds)}, {}
    timer = timing.CudaTimer(settings.device)
    calls = timer.time_calls(steps, rounds=2 * settings.rounds)
    graphs, failed = timer.time_graphs(steps, rounds=settings.rounds)
    return {"call": calls, "graph": graphs}, failed


def run_problem(
    case: Case,
    preset: str,
    problem: Problem,
    batch: int,
    mode: str,
    providers: Sequence[Provider],
    settings: Settings,
    peaks: Peaks | None,
) -> list[Row]:
    # A recompilation limit reached by earlier shapes would silently turn compiled providers into eager ones.
    torch._dynamo.reset()
    training = mode == "fwd+bwd"
    draws = Draws(case, problem, batch, training, settings)
    inputs = draws[0][0]
    rows: dict[str, Row] = {}
    steps: dict[str, timing.Step] = {}
    calls = 0
    for provider in providers:
        if mode not in provider.modes:
            continue
        row = Row(
            subject=case.operator,
            preset=preset,
            problem=problem.label,
            shape=problem.describe(batch),
            batch=batch,
            dtype=dtype_name(settings.dtype),
            device=str(settings.device),
            mode=mode,
            provider=provider.name,
            ours=provider.ours,
        )
        rows[provider.name] = row
        try:
            function = provider.prepare(inputs, training)
            worst = draws.judge(provider, function)
            row.error_share = worst.share
            if not worst.ok:
                row.status, row.reason = "wrong", str(worst)
                continue
            step = make_step(function, inputs, training)
            row.peak_memory = timing.peak_memory(step, settings.device)
            calls = calls or calls_to_share(
                step, settings, training
            )  # eager is the first, and decides for all
            row.calls = calls
            steps[provider.name] = step if calls == 1 else make_step(function, inputs, training, calls)
        except Unavailable as error:
            row.status, row.reason = "skipped", str(error)
        except Exception as error:  # a peer that fails on a shape must not end the run, and is never hidden
            row.status, row.reason = "skipped", f"{type(error).__name__}: {error}".splitlines()[0]
    timings, uncaptured = time_steps(steps, settings)
    cost = case.cost(problem, batch, settings.dtype, mode)
    result = []
    for name, row in rows.items():
        if row.status != "ok":
            result.append(row)
        for method, by_provider in timings.items():
            if name in by_provider:
                timed = record(row, method, by_provider[name], by_provider.get("eager"))
                add_cost(timed, cost, settings.dtype, peaks)
                result.append(timed)
        if name in uncaptured:
            result.append(not_captured(row, uncaptured[name]))
    return result


def record(row: Row, method: str, spent: timing.Timing, eager: timing.Timing | None) -> Row:
    """A copy of the row with its times."""
    timed = Row(**row.as_dict())
    timed.method, timed.samples = method, spent.samples
    spent, eager = spent.each(row.calls), eager and eager.each(row.calls)
    timed.median, timed.p20, timed.p80, timed.best = spent.median, spent.p20, spent.p80, spent.best
    if eager is not None and spent.median > 0:
        timed.speedup = eager.median / spent.median
    return timed


def add_cost(row: Row, cost: Cost, dtype: torch.dtype, peaks: Peaks | None) -> None:
    if not row.median:
        return
    row.flops_per_second, row.bytes_per_second = cost.flops / row.median, cost.bytes / row.median
    if peaks is not None:
        row.floor, row.bound = peaks.floor(cost, dtype)
        row.floor_share = row.floor / row.median


def not_captured(row: Row, reason: str) -> Row:
    skipped = Row(**row.as_dict())
    skipped.method, skipped.status, skipped.reason = "graph", "skipped", f"CUDA graph capture: {reason}"
    return skipped


def run_case(
    case: Case,
    preset: str,
    problems: Sequence[Problem],
    providers: Sequence[Provider],
    settings: Settings,
    peaks: Peaks | None,
    rows: list[Row],
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Appends to ``rows`` as it goes, so that an interrupted run keeps what it measured."""
    for mode in settings.modes:
        for problem in problems:
            for batch in settings.batches:
                progress(f"{preset} {problem.label} batch {batch} {mode}")
                rows += run_problem(case, preset, problem, batch, mode, providers, settings, peaks)
    progress("done")


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per mode, method and provider the geometric mean of the speed-up over eager, over all shapes timed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status == "ok" and row.speedup is not None:
            groups.setdefault((row.mode, row.method, row.provider), []).append(row)
    return [
        {
            "mode": mode,
            "method": method,
            "provider": provider,
            "speedup": timing.geometric_mean([row.speedup for row in members if row.speedup]),
            "floor_share": timing.geometric_mean(shares) if shares else None,
            "count": len(members),
        }
        for (mode, method, provider), members in groups.items()
        for shares in [[row.floor_share for row in members if row.floor_share]]
    ]
