"""``python -m vitkernels bench``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitkernels.bench.extras import MissingExtra, require

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

DESCRIPTION = """\
Times one operator, or a whole network before and after vitkernels.apply, next to plain PyTorch,
torch.compile and the public peers. Every result is held to a float64 reference first: a provider that
is wrong is shown as WRONG with its error, and gets no speed. Providers take turns in every round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to time")
    what.add_argument("--op", help="an operator; --list names them")
    what.add_argument("--model", help="a network such as efficientvit_m5 (timm's, or ours without timm)")
    what.add_argument("--preset", nargs="+", help="whose shapes to take; 'all' for every preset")
    what.add_argument("--shape", nargs="+", help="your own shapes as key=value,...; --list shows the keys")
    what.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images per call (default: 1 16)")
    what.add_argument("--mode", nargs="+", choices=["fwd", "fwd+bwd"], help="default: both (networks: fwd)")
    what.add_argument("--providers", nargs="+", help="only these, besides eager")
    what.add_argument(
        "--token-merging",
        type=int,
        nargs="+",
        metavar="R",
        help="networks: merge R tokens in every block, or as many as given for each; timm's ViTs",
    )
    what.add_argument("--channels-last", action="store_true", help="networks: channels-last memory format")
    what.add_argument("--list", action="store_true", help="list operators, presets and providers, and stop")
    where = parser.add_argument_group("where and how")
    where.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    where.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on CUDA, float32 on the CPU")
    where.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    where.add_argument("--seconds", type=float, default=0.5, help="CPU time per measurement (default: 0.5)")
    where.add_argument("--rounds", type=int, default=25, help="rounds of taking turns (default: 25)")
    where.add_argument("--seed", type=int, default=0)
    where.add_argument("--refresh-peaks", action="store_true", help="measure the machine's peaks anew")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="F", help="everything: environment, peaks, rows, summary")
    out.add_argument("--csv", type=Path, metavar="F", help="one line a row")
    out.add_argument("--plot", type=Path, metavar="F", help="a bar chart (.png, .svg, .pdf)")
    out.add_argument("--quiet", action="store_true", help="no progress bar")


def settings_of(args: argparse.Namespace) -> Any:
    from vitkernels.bench.runner import Settings

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is there; got 'cuda', but torch finds no CUDA device")
    for name, low in (("threads", 1), ("rounds", 2)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"{name}: expected at least {low}; got {getattr(args, name)}")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"seconds: expected a positive number; got {args.seconds}")
    if not -(2**63) <= args.seed < 2**64:  # torch's generators take no other
        raise ValueError(f"seed: expected a number of at most 64 bits; got {args.seed}")
    if min(args.batch) < 1:
        raise ValueError(f"batch: expected positive numbers; got {args.batch}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = DTYPES[args.dtype] if args.dtype else torch.float16 if device.type == "cuda" else torch.float32
    modes = list(dict.fromkeys(args.mode or (["fwd"] if args.model else ["fwd", "fwd+bwd"])))
    batches = list(dict.fromkeys(args.batch))
    return Settings(device, dtype, modes, batches, args.seconds, args.rounds, args.seed)


def print_list(device: torch.device) -> None:
    from vitkernels.bench import merging, models, providers
    from vitkernels.bench.case import load_case, operators

    for name in operators():
        case = load_case(name)
        print(f"--op {name}\n  --preset    {' '.join(case.presets)}\n  --shape     {case.shape_help}")
        print(f"  --providers {' '.join(p.name for p in providers.all_providers(case, device))}")
    print(f"--model NAME\n  --providers {' '.join(models.VARIANTS)}")
    print(f"--model NAME --token-merging R\n  --providers {' '.join(merging.contest(0).variants)}")


def chosen_problems(case: Any, args: argparse.Namespace) -> dict[str, Sequence[Any]]:
    if args.shape:
        if args.preset:
            raise ValueError("preset: expected either --preset or --shape; got both")
        parsed = [case.parse_shape(text) for text in args.shape]
        return {"shape": [dataclasses.replace(p, label=f"shape {i}") for i, p in enumerate(parsed, 1)]}
    names = args.preset or [case.default_preset]
    names = list(case.presets) if names == ["all"] else names
    unknown = [name for name in names if name not in case.presets]
    if unknown:
        raise ValueError(f"preset: expected some of {', '.join(case.presets)}, all; got {', '.join(unknown)}")
    return {name: case.presets[name] for name in names}


def check_what(args: argparse.Namespace) -> None:
    if bool(args.op) == bool(args.model):
        got = "both" if args.op else "neither (--list shows what there is)"
        raise ValueError(f"op: expected one of --op or --model; got {got}")
    if args.op and args.token_merging is not None:
        raise ValueError("token-merging: expected it beside --model, whose blocks merge; got --op")
    if args.op and args.channels_last:
        raise ValueError("channels-last: expected it beside --model, whose images it lays out; got --op")
    if args.model and args.refresh_peaks:
        raise ValueError("refresh-peaks: expected it beside --op, whose floor they give; got --model")


def check_outputs(args: argparse.Namespace) -> None:
    from vitkernels.bench import outputs

    outputs.check("json", args.json)
    outputs.check("csv", args.csv)
    outputs.check_plot("plot", args.plot)


def chosen(args: argparse.Namespace, settings: Any) -> tuple[Any, list[Any], dict[str, Sequence[Any]]]:
    """The operator's case, and of it the providers and the problems that are asked for."""
    from vitkernels.bench import providers
    from vitkernels.bench.case import load_case

    case = load_case(args.op)
    return case, providers.select(case, settings.device, args.providers), chosen_problems(case, args)


def run_operator(
    case: Any,
    selected: list[Any],
    problems: dict[str, Sequence[Any]],
    settings: Any,
    peaks: Any,
    progress: Any,
    rows: list[Any],
) -> None:
    from vitkernels.bench import runner

    progress.total(sum(len(p) for p in problems.values()) * len(settings.batches) * len(settings.modes))
    for preset, members in problems.items():
        if len(problems) > 1:  # the tables label a problem by itself; with several presets it needs its model
            members = [dataclasses.replace(p, label=f"{preset} {p.label}") for p in members]
        runner.run_case(case, preset, members, selected, settings, peaks, rows, progress.step)


def run_network(
    args: argparse.Namespace,
    settings: Any,
    progress: Any,
    console: Any,
    rows: list[Any],
    ready: Callable[[], None],
) -> None:
    from vitkernels.bench import merging, models
    from vitkernels.bench.host_model import calibrate, create_host_model, randomize

    if args.preset or args.shape or list(settings.modes) != ["fwd"]:
        raise ValueError(
            "model: a network runs in inference at its own shapes; got --preset, --shape or --mode"
        )
    contest = models.APPLY
    if args.token_merging is not None:
        schedule = args.token_merging
        contest = merging.contest(schedule[0] if len(schedule) == 1 else schedule)
    names = contest.select(args.providers)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    host = create_host_model(args.model)
    console.print(f"{args.model} of {host.source}{f': {host.note}' if host.note else ''}", markup=False)
    console.print("weights, norm statistics and attention biases are random: speed does not depend on them")
    randomize(host.model, generator)

    image = getattr(host.model, "default_cfg", {}).get("input_size", (3, 224, 224))

    def make_images(batch: int) -> torch.Tensor:
        return torch.randn(batch, *image, generator=generator)

    calibrate(host.model, [make_images(16)])
    progress.total(len(settings.batches) * (len(names) + 1))
    models.run_model(
        args.model,
        host.model,
        make_images,
        names,
        settings,
        rows,
        channels_last=args.channels_last,
        contest=contest,
        progress=progress.step,
        ready=ready,
    )


class Progress:
    """A bar on stderr, so that stdout can be redirected."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=quiet)
        self.task = self.bar.add_task("", total=None)
        self.running = False

    def total(self, count: int) -> None:
        self.bar.update(self.task, total=count)

    def step(self, text: str) -> None:
        """Called when a step begins, and once more with ``"done"`` at the end."""
        if self.running:
            self.bar.advance(self.task)
        self.running = text != "done"
        self.bar.update(self.task, description=text)


def execute(args: argparse.Namespace, ready: Callable[[], None] = lambda: None) -> int:
    """``ready`` is called before a network is timed, when all of its variants have been compiled."""
    require("rich", "matplotlib")
    from rich.console import Console

    from vitkernels import info
    from vitkernels.bench import peaks as measured
    from vitkernels.bench import report, runner
    from vitkernels.bench.timing import busy

    settings = settings_of(args)
    if args.list:
        print_list(settings.device)
        return 0
    check_what(args)
    check_outputs(args)
    operator = chosen(args, settings) if args.op else None
    console = Console(width=None if sys.stdout.isatty() else 140)
    load_note = busy()
    if load_note:
        console.print(load_note, style="yellow")
    peaks = None
    rows: list[Any] = []
    progress = Progress(args.quiet)
    failure: RuntimeError | None = None
    try:
        with progress.bar:
            if operator:
                progress.bar.update(progress.task, description="measuring the machine's peaks")
                peaks = measured.measured_peaks(
                    settings.device, (settings.dtype,), refresh=args.refresh_peaks
                )
                run_operator(*operator, settings, peaks, progress, rows)
            else:
                run_network(args, settings, progress, console, rows, ready)
    except (KeyboardInterrupt, RuntimeError) as error:  # PyTorch's, as where the memory ends
        if not rows:
            raise
        failure = error if isinstance(error, RuntimeError) else None
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0] if failure else "interrupted"
        console.print(f"{reason}: this is what was measured until then", style="yellow", markup=False)
    environment = info.collect()
    peaks_dict = dataclasses.asdict(peaks) if peaks else None
    summary = runner.summarize(rows)
    for line in report.environment_lines(environment, peaks_dict):
        console.print(line, markup=False, highlight=False)
    report.print_report(console, rows, summary)
    options = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if not callable(v)}
    options["busy"] = load_note
    if args.json:
        report.write_json(args.json, report.document(rows, summary, environment, peaks_dict, options))
    if args.csv:
        report.write_csv(args.csv, rows)
    if args.plot and any(row.median is not None for row in rows):
        from vitkernels.bench import plot

        title = f"{rows[0].subject}, {rows[0].dtype}, {measured.device_name(settings.device)}"
        draw = plot.plot_models if args.model else plot.plot_operator
        threads = f", {torch.get_num_threads()} CPU thread(s)" if settings.device.type == "cpu" else ""
        draw(args.plot, rows, title + threads)
    return 1 if failure or any(row.ours and row.status == "wrong" for row in rows) else 0


def run(args: argparse.Namespace) -> int:
    try:
        return execute(args)
    except (MissingExtra, ValueError) as error:
        print(f"vitkernels bench: {error}", file=sys.stderr)
        return 2
