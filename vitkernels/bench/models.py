"""Whole networks before and after ``vitkernels.apply``, behind the same gate as the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vitkernels
from vitkernels.bench import gate, runner, timing
from vitkernels.bench.host_model import clone, fold_conv_bn, plain
from vitkernels.bench.peaks import dtype_name
from vitkernels.bench.runner import Row, Settings

Variant = Callable[[nn.Module], Any]


def _applied(fold_bn: bool | None) -> Variant:
    def build(model: nn.Module) -> nn.Module:
        applied = clone(model)
        vitkernels.apply(applied, fold_bn=fold_bn, verbose=False)
        return applied

    return build


def _eager(model: nn.Module) -> nn.Module:
    return plain(clone(model))


def _eager_folded(model: nn.Module) -> nn.Module:
    return plain(fold_conv_bn(model))


def _compiled(build: Variant) -> Variant:
    return lambda model: torch.compile(build(model), dynamic=False)


VARIANTS: dict[str, Variant] = {
    "eager": _eager,
    "eager-folded": _eager_folded,
    "torch.compile": _compiled(_eager),
    "torch.compile-folded": _compiled(_eager_folded),
    "vitkernels": _applied(None),
    "vitkernels-unfolded": _applied(False),
    "vitkernels+compile": _compiled(_applied(None)),
}
DEFAULT_VARIANTS = ("eager", "eager-folded", "torch.compile", "vitkernels")


@dataclass(frozen=True)
class Contest:
    """The variants of a network to choose from, and what holds each of them to the truth.

    ``judge(model, images)`` returns a function of a variant's name and the variant.
    """

    variants: Mapping[str, Variant]
    default: Sequence[str]
    judge: Callable[[nn.Module, Tensor], Callable[[str, Any], gate.Check]]

    def select(self, names: Sequence[str] | None) -> list[str]:
        unknown = [name for name in names or () if name not in self.variants]
        if unknown:
            raise ValueError(
                f"providers: expected some of {', '.join(self.variants)}; got {', '.join(unknown)}"
            )
        return list(self.default if names is None else dict.fromkeys(("eager", *names)))


def judge(model: nn.Module, images: Tensor) -> Callable[[str, Any], gate.Check]:
    """Logits against those of the network in float64."""
    truth = forward(plain(clone(model, torch.float64)), images.double())
    baseline = forward(VARIANTS["eager"](model), images)

    def check(name: str, variant: Any) -> gate.Check:
        return gate.check("logits", forward(variant, images), baseline, truth, factor=gate.FORWARD_FACTOR)

    return check


def forward(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


APPLY = Contest(VARIANTS, DEFAULT_VARIANTS, judge)


def build_variants(
    model: nn.Module, names: Sequence[str], variants: Mapping[str, Variant] = VARIANTS
) -> tuple[dict[str, Any], dict[str, str]]:
    """The variants that could be built and, for the others, why not."""
    built, failed = {}, {}
    for name in names:
        try:
            built[name] = variants[name](model)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return built, failed


def prepare(
    row: Row,
    step: timing.Step,
    check: Callable[[str, Any], gate.Check],
    built: Any,
    steps: dict[str, timing.Step],
    device: torch.device,
) -> None:
    """Compiles a variant and checks it. What may be timed joins the steps; otherwise the row says why not."""
    try:
        logits = check(row.provider, built)
    except Exception as error:
        row.status, row.reason = "skipped", f"{type(error).__name__}: {error}".splitlines()[0]
        return
    row.error_share = logits.share
    if not logits.ok:
        row.status, row.reason = "wrong", str(logits)
        return
    steps[row.provider] = step
    row.peak_memory = timing.peak_memory(step, device)


def run_model(
    name: str,
    model: nn.Module,
    make_images: Callable[[int], Tensor],
    names: Sequence[str],
    settings: Settings,
    rows: list[Row],
    *,
    channels_last: bool = False,
    contest: Contest = APPLY,
    progress: Callable[[str], None] = lambda text: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Inference at every batch size; ``model`` is left as it is, every variant is a copy of it.

    ``ready`` is called when all is compiled and checked, before the first measurement. An interrupt before that ends
    the compiling: what is ready is measured. Appends to ``rows`` as it goes, so that an interrupted run keeps what it
    measured.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = clone(model, settings.dtype).to(settings.device)
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    built, failed = build_variants(model, names, contest.variants)
    prepared: list[tuple[int, dict[str, Row], dict[str, timing.Step]]] = []
    unready: list[tuple[Row, Callable[[], None]]] = []
    for batch in settings.batches:
        images = make_images(batch).to(settings.device, settings.dtype, memory_format=memory_format)
        blank = Row(
            subject=name,
            preset=name,
            problem="channels-last" if channels_last else "NCHW",
            shape="x".join(map(str, images.shape)),
            batch=batch,
            dtype=dtype_name(settings.dtype),
            device=str(settings.device),
            mode="fwd",
            provider="",
            ours=False,
        )
        by_name: dict[str, Row] = {}
        steps: dict[str, timing.Step] = {}
        check = contest.judge(model, images)
        for variant in names:
            row = Row(**{**blank.as_dict(), "provider": variant, "ours": variant.startswith("vitkernels")})
            by_name[variant] = row
            if variant in failed:
                row.status, row.reason = "skipped", failed[variant]
            else:
                step = partial(forward, built[variant], images)
                unready.append(
                    (row, partial(prepare, row, step, check, built[variant], steps, settings.device))
                )
        prepared.append((batch, by_name, steps))
    unready.sort(key=lambda item: "compile" in item[0].provider)  # the longest wait last
    for i, (row, make_ready) in enumerate(unready):
        progress(f"{name}: {row.provider}, batch {row.batch}")
        try:
            # Variants of one class share its limit, and each has a graph a batch size: what comes beyond would run
            # eagerly, and be timed as compiled.
            with torch._dynamo.config.patch(recompile_limit=len(unready) + 8):
                make_ready()
        except KeyboardInterrupt:
            if not any(steps for _, _, steps in prepared):
                raise
            for later, _ in unready[i:]:
                later.status, later.reason = "skipped", "interrupted before it was compiled and checked"
            break
    ready()
    for batch, by_name, steps in prepared:
        progress(f"{name} batch {batch}")
        timings, uncaptured = runner.time_steps(steps, settings)
        for variant, row in by_name.items():
            if row.status != "ok":
                rows.append(row)
            for method, measured in timings.items():
                if variant in measured:
                    timed = runner.record(row, method, measured[variant], measured.get("eager"))
                    timed.images_per_second = batch / measured[variant].median
                    rows.append(timed)
            if variant in uncaptured:
                rows.append(runner.not_captured(row, uncaptured[variant]))
    progress("done")
