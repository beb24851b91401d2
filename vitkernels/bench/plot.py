"""Plots of a benchmark's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

from vitkernels.bench.runner import Row

OURS = ("#c2410c", "#ea8a4f", "#f6c49c")
OTHERS = ("#334155", "#64748b", "#94a3b8", "#cbd5e1", "#e2e8f0")


def colours(providers: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Ours in one warm family, everything else in greys."""
    ours = [name for name, is_ours in providers if is_ours]
    others = [name for name, is_ours in providers if not is_ours]
    chosen = {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
    return chosen | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _label(value: float) -> str:
    if math.isnan(value):
        return "wrong"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if value else ""


def grouped_bars(
    axes: Any,
    groups: Sequence[str],
    providers: Sequence[tuple[str, bool]],
    values: dict[tuple[str, str], float],
    colour: dict[str, str],
) -> None:
    """One bar a provider in every group, its value above it; "wrong" for NaN, nothing where it is absent."""
    width = 0.84 / max(1, len(providers))
    for i, (provider, _) in enumerate(providers):
        positions = [g + (i - (len(providers) - 1) / 2) * width for g in range(len(groups))]
        shown = [values.get((group, provider), 0.0) for group in groups]
        heights = [0.0 if math.isnan(value) else value for value in shown]
        bars = axes.bar(positions, heights, width * 0.94, color=colour[provider], label=provider)
        axes.bar_label(bars, [_label(value) for value in shown], fontsize=6.5, padding=1.5)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.14)


def plot_operator(path: Path, rows: Sequence[Row], title: str) -> None:
    """One panel per mode and timing method: speed-up over eager at every shape."""
    timed = [row for row in rows if row.speedup is not None]
    panels = list(dict.fromkeys((row.mode, row.method) for row in timed))
    groups = list(dict.fromkeys((row.problem, row.batch, row.shape) for row in timed))
    colour = colours(list(dict.fromkeys((row.provider, row.ours) for row in rows)))
    width = max(7.0, 1.6 + 0.34 * len(groups) * max(3, len({row.provider for row in timed})))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, 0.9 + 3.1 * len(panels)), squeeze=False, layout="constrained"
    )
    for (mode, method), axis in zip(panels, axes[:, 0], strict=True):
        shown = [row for row in timed if (row.mode, row.method) == (mode, method)]
        names = {(row.problem, row.batch): f"{row.problem}, batch {row.batch}\n{row.shape}" for row in shown}
        values = {(names[row.problem, row.batch], row.provider): row.speedup or 0.0 for row in shown}
        values |= {
            (names[row.problem, row.batch], row.provider): math.nan
            for row in rows
            if row.mode == mode and row.status == "wrong"
        }
        judged = [row for row in rows if row in shown or (row.mode == mode and row.status == "wrong")]
        providers = list(dict.fromkeys((row.provider, row.ours) for row in judged))
        grouped_bars(axis, list(names.values()), providers, values, colour)
        axis.axhline(1.0, color="black", linewidth=0.7)
        axis.set_ylabel("speed-up over eager")
        axis.set_title(f"{mode} ({method})", fontsize=10, loc="left")
        axis.legend(fontsize=7.5, ncols=len(providers), loc="upper left", frameon=False)
        axis.margins(y=0.24)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def throughput_bars(axis: Any, rows: Sequence[Row]) -> None:
    """Images per second by batch size; used by the model benchmark and the demo."""
    timed = [row for row in rows if row.images_per_second is not None]
    wrong = [row for row in rows if row.status == "wrong"]
    groups = list(dict.fromkeys(f"batch {row.batch}" for row in timed))
    providers = list(dict.fromkeys((row.provider, row.ours) for row in rows if row in timed or row in wrong))
    values = {(f"batch {row.batch}", row.provider): row.images_per_second or 0.0 for row in timed}
    values |= {(f"batch {row.batch}", row.provider): math.nan for row in wrong}
    grouped_bars(axis, groups, providers, values, colours(providers))
    axis.set_ylabel("images per second")
    axis.legend(fontsize=7.5, loc="upper left", frameon=False)
    axis.margins(y=0.3)


def plot_models(path: Path, rows: Sequence[Row], title: str) -> None:
    figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    throughput_bars(axis, rows)
    axis.set_title(title, fontsize=11, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
