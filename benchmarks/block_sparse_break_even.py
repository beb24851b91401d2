"""From which density on a block-sparse layer is faster than the dense one, and how much of 1 / density it reaches.

    python benchmarks/block_sparse_break_even.py --preset deit_base --batch 1 8 --plot break_even.png

Every layer of the preset is timed at each density, beside F.linear with a dense weight and, forward, PyTorch's BSR;
results are held to the rule of the benchmark first. The break-even density lies between the last density that wins and
the first that does not.

The whole sweep takes an hour. With --json it can be made in pieces: what the file holds already is kept, what is
measured again is replaced, and the table and the plot are of all that it holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitkernels import info
from vitkernels.bench import outputs, report, runner, timing
from vitkernels.bench.case import load_case
from vitkernels.bench.cases.block_sparse_linear import DENSITIES, PATTERNS, SparseLayer
from vitkernels.bench.providers import OURS, select

CASE = load_case("block_sparse_linear")
MODES = ("fwd", "fwd+bwd")
Curve = list[tuple[float, float]]  # (density, speed-up over dense)
Key = tuple[str, str, str, int, str]  # layer, block, pattern, batch, mode


def labelled(layer: SparseLayer, block: tuple[int, int], pattern: str, density: float) -> SparseLayer:
    label = f"{layer.label.split()[0]} {'x'.join(map(str, block))} {pattern} d={density:g}"
    return replace(layer, label=label, block=block, pattern=pattern, density=density)


def curves_of(rows: Iterable[runner.Row]) -> dict[Key, Curve]:
    """Speed-ups over dense from rows that `labelled` named, by rising density."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row.median:
            layer, block, pattern, density = row.problem.split()
            key = layer, block, pattern, row.batch, row.mode
            provider = "ours" if row.ours else row.provider
            # A time in a graph is not set against one around a call, nor one dtype against another.
            alike = row.method, row.dtype, row.device
            times.setdefault((key, float(density[2:]), *alike), {})[provider] = row.median
    curves: dict[Key, dict[float, float]] = {}
    for (key, density, *_), by_provider in times.items():
        if "dense" in by_provider and "ours" in by_provider:
            curves.setdefault(key, {})[density] = by_provider["dense"] / by_provider["ours"]
    return {key: sorted(curve.items()) for key, curve in sorted(curves.items())}


def crossing(curve: Curve) -> str:
    """Where the speed-up falls through 1, interpolated along the density."""
    if curve[0][1] < 1:
        return f"below {curve[0][0]:g}"
    for (low, before), (high, after) in itertools.pairwise(curve):
        if after < 1:
            return f"{low + (before - 1) / (before - after) * (high - low):.2f}"
    return f"above {curve[-1][0]:g}"


def show(key: Key, curve: Curve, tokens: int) -> str:
    layer, block, pattern, batch, mode = key
    points = "  ".join(f"{d:g}: {s:.2f}x ({s * d:.0%})" for d, s in curve)
    label = f"{layer} {block} {pattern}, {batch * tokens} tokens, {mode}"
    return f"{label:42s} break-even {crossing(curve):10s} {points}"


def plot(path: Path, curves: dict[Key, Curve], tokens: int) -> None:
    """One panel a mode and number of tokens, one line a layer, block and pattern."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    panels = sorted({(key[4], key[3]) for key in curves})
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 4.2 * lines), layout="constrained", squeeze=False, sharey=True
    )
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(key[0] for key in curves))}
    styles = dict(zip(sorted({key[1] for key in curves}), ("-", "--", "-."), strict=False))
    markers = dict(zip(PATTERNS, "o^s", strict=True))
    for axis, (mode, batch) in itertools.zip_longest(axes.flat, panels, fillvalue=(None, None)):
        if mode is None:
            axis.set_axis_off()
            continue
        densities: set[float] = set()
        for key, curve in curves.items():
            layer, block, pattern = key[:3]
            if (key[4], key[3]) != (mode, batch):
                continue
            densities |= {d for d, _ in curve}
            axis.plot(
                *zip(*curve, strict=True),
                color=colors[layer],
                linestyle=styles.get(block, ":"),
                marker=markers[pattern],
                markersize=4,
                linewidth=1.2,
                label=f"{layer} {block} {pattern}",
            )
        ideal = sorted(densities)
        axis.plot(ideal, [1 / d for d in ideal], color="black", linestyle=":", label="1 / density")
        axis.plot(ideal, [0.7 / d for d in ideal], color="grey", linestyle=":", label="70 % of it")
        axis.axhline(1.0, color="black", linewidth=0.7)
        axis.set(title=f"{mode}, {batch * tokens} tokens", xlabel="density", yscale="log")
        axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("speed-up over the dense layer")
    axes[0][0].legend(fontsize=7, ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def kept_rows(path: Path | None) -> dict[tuple[Any, ...], runner.Row]:
    if path is None or not path.exists():
        return {}
    try:
        rows = [runner.Row(**entry) for entry in json.loads(path.read_text())["rows"]]
        curves_of(rows)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"json: expected a file that this script wrote; got {str(path)!r}") from None
    return {identity(row): row for row in rows}


def identity(row: runner.Row) -> tuple[Any, ...]:
    return row.problem, row.batch, row.dtype, row.device, row.mode, row.provider, row.method


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="deit_base", choices=list(CASE.presets))
    add("--layers", nargs="+", help="only these labels")
    add("--block", nargs="+", default=["32x32"], metavar="HxW")
    add("--pattern", nargs="+", default=["uniform"], choices=PATTERNS)
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--density", type=float, nargs="*", default=list(DENSITIES), help="none: only show what --json holds")
    add("--mode", nargs="+", choices=MODES, default=list(MODES))
    add("--backend", default="cpu", choices=["cpu", "cuda", "triton"])
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--bsr", action="store_true", help="PyTorch's BSR beside it, forward")
    add("--seconds", type=float, default=0.5, help="time of each provider at each density")
    add("--json", type=Path, help="keep the measurements here, beside those that it holds")
    add("--plot", type=Path)
    args = parser.parse_args(argv)
    labels = {layer.label: None for layer in CASE.presets[args.preset]}
    if unknown := sorted({*(args.layers or ())} - {*labels}):
        parser.error(f"--layers: expected some of {', '.join(labels)}; got {', '.join(unknown)}")
    if min(args.batch) < 1:
        parser.error(f"--batch: expected positive numbers; got {args.batch}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds: expected a positive number; got {args.seconds}")
    if args.backend != "cpu" and not torch.cuda.is_available():
        parser.error(
            f"--backend: expected one that runs here; got {args.backend!r}, but torch finds no CUDA device"
        )
    try:
        for field in (*(f"block={b}" for b in args.block), *(f"density={d}" for d in args.density)):
            CASE.parse_shape(field)
        outputs.check("json", args.json)
        outputs.check_plot("plot", args.plot)
        if not curves_of(kept_rows(args.json).values()) and not args.density:
            raise ValueError(
                "density: expected some, or --json with a file that holds measurements; got neither"
            )
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict[Key, Curve]:
    args = parse(argv)
    device = torch.device("cpu" if args.backend == "cpu" else "cuda")
    settings = runner.Settings(device, getattr(torch, args.dtype), seconds=args.seconds)
    if note := timing.busy():
        print(note)
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    names = ["dense", *(["torch-bsr"] if args.bsr else []), OURS + args.backend]
    providers = select(CASE, device, names)[1:]
    layers = {layer.label: layer for layer in CASE.presets[args.preset]}
    rows = kept_rows(args.json)
    blocks = [(int(height), int(width)) for height, width in (text.split("x") for text in args.block)]
    chosen = [layer for name, layer in layers.items() if not args.layers or name in args.layers]
    for layer, block, pattern, batch, mode in itertools.product(
        chosen, blocks, args.pattern, args.batch, args.mode
    ):
        measured = []
        for density in args.density:
            problem = labelled(layer, block, pattern, density)
            measured += runner.run_problem(CASE, args.preset, problem, batch, mode, providers, settings, None)
        for row in measured:
            if row.ours and row.status == "wrong":  # a peer's is kept without a time
                raise SystemExit(f"WRONG: {row.provider}: {row.problem}: {row.reason}")
            rows[identity(row)] = row
        for key, curve in curves_of(measured).items():
            print(show(key, curve, layer.tokens), flush=True)
        if args.json and measured:
            options = {"dtype": args.dtype, "seconds": args.seconds, "preset": args.preset, "busy": note}
            report.write_json(
                args.json, report.document(list(rows.values()), [], info.collect(), None, options)
            )
    curves, tokens = curves_of(rows.values()), next(iter(layers.values())).tokens
    if not args.density:
        for key, curve in curves.items():
            print(show(key, curve, tokens))
    print("speed-up over the dense layer (share of 1 / density)")
    if args.plot and curves:
        plot(args.plot, curves, tokens)
    return curves


if __name__ == "__main__":
    main()
