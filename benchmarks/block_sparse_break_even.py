"""From which density on a block-sparse layer is faster than the dense one, and how much of 1 / density it reaches.

    python benchmarks/block_sparse_break_even.py --preset deit_base --batch 1 8 --plot break_even.png

Every layer of the preset is timed at each density, beside F.linear with a dense weight; results are held to the rule
of the benchmark first. The break-even density lies between the last density that wins and the first that does not.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import torch

from vitkernels.bench import runner, timing
from vitkernels.bench.case import Inputs, load_case
from vitkernels.bench.cases.block_sparse_linear import DENSITIES, SparseLayer
from vitkernels.bench.providers import select

CASE = load_case("block_sparse_linear")
MODES = ("fwd", "fwd+bwd")
Curve = list[tuple[float, float]]  # (density, speed-up over dense)


def crossing(curve: Curve) -> str:
    """Where the speed-up falls through 1, interpolated along the density."""
    if curve[0][1] < 1:
        return f"below {curve[0][0]:g}"
    for (low, before), (high, after) in itertools.pairwise(curve):
        if after < 1:
            return f"{low + (before - 1) / (before - after) * (high - low):.2f}"
    return f"above {curve[-1][0]:g}"


def steps_of(
    inputs: Inputs, problem: SparseLayer, batch: int, mode: str, backend: str
) -> dict[str, timing.Step]:
    training = mode == "fwd+bwd"
    truth, baseline = runner.truth_and_baseline(CASE, inputs, training)
    steps = {}
    device = inputs.grad_out.device
    for provider in select(CASE, device, ["dense", f"vitkernels-{backend}"])[1:]:
        function = provider.prepare(inputs, training)
        got = runner.evaluate(function, inputs, training)
        verdict = runner.judge(CASE, problem, batch, inputs, got, baseline, truth)
        if not verdict.ok:
            raise SystemExit(f"WRONG: {provider.name}: {verdict}")
        steps[provider.name.partition("-")[0]] = runner.make_step(function, inputs, training)
    return steps


def plot(path: Path, curves: dict[str, Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for label, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=label)
    densities = [d for d, _ in next(iter(curves.values()))]
    axis.plot(densities, [1 / d for d in densities], color="black", linestyle=":", label="1 / density")
    axis.axhline(1.0, color="black", linewidth=0.7)
    axis.set(xlabel="density", ylabel="speed-up over the dense layer", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Curve]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="deit_base", choices=list(CASE.presets))
    add("--layers", nargs="+", help="only these labels")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--density", type=float, nargs="+", default=list(DENSITIES))
    add("--mode", nargs="+", choices=MODES, default=list(MODES))
    add("--backend", default="cpu", choices=["cpu", "cuda", "triton"])
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--seconds", type=float, default=0.5, help="time of each provider at each density")
    add("--plot", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.backend == "cpu" else "cuda")
    settings = runner.Settings(device, getattr(torch, args.dtype), seconds=args.seconds)
    if note := timing.busy():
        print(note)
    layers = {(layer.label, layer.block): layer for layer in CASE.presets[args.preset]}
    curves: dict[str, Curve] = {}
    for layer in layers.values():
        if args.layers and layer.label not in args.layers:
            continue
        for batch in args.batch:
            for mode in args.mode:
                label = (
                    f"{layer.label} {'x'.join(map(str, layer.block))}, {batch * layer.tokens} tokens, {mode}"
                )
                curve: Curve = []
                for density in sorted(args.density):
                    problem = replace(layer, density=density)
                    generator = torch.Generator().manual_seed(settings.seed)
                    inputs = CASE.make_inputs(
                        problem, batch, dtype=settings.dtype, device=device, generator=generator
                    )
                    steps = steps_of(inputs, problem, batch, mode, args.backend)
                    times = next(iter(runner.time_steps(steps, settings)[0].values()))
                    curve.append((density, times["dense"].median / times["vitkernels"].median))
                curves[label] = curve
                points = "  ".join(f"{d:g}: {s:.2f}x ({s * d:.0%})" for d, s in curve)
                print(f"{label:36s} break-even {crossing(curve):10s} {points}", flush=True)
    print("speed-up over the dense layer (share of 1 / density)")
    if args.plot:
        plot(args.plot, curves)
    return curves


if __name__ == "__main__":
    main()
