"""Rows as tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vitkernels.bench.runner import SHORT_CALL, Row

SCHEMA = 1
FOLDED = 12  # characters a line that a shape needs at least
METHODS = {
    "wall": "wall clock, caches warm",
    "call": "events around one call, cold L2",
    "graph": "in a CUDA graph, cold L2",
}


def show_time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{seconds * 1e6:.2f} us"


def show_rate(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value / scale:.1f}"


def show_share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def environment_lines(environment: dict[str, Any], peaks: dict[str, Any] | None) -> list[str]:
    lines = [
        f"vitkernels {environment['vitkernels']}, torch {environment['torch']['version']}, "
        f"triton {environment['triton'] or 'absent'}, Python {environment['python']}",
        f"{environment['cpu']['name']}, {environment['torch']['threads']} threads, "
        f"ISA of the kernels: {environment['extension'].get('isa') or 'none (extension missing)'}",
    ]
    lines += [f"GPU {gpu['index']}: {gpu['name']}" for gpu in environment["gpus"]]
    if peaks:
        copies = ", ".join(
            f"{rate / 1e9:.0f} GB/s at {int(size) >> 20} MiB" for size, rate in peaks["copy"].items()
        )
        gemms = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks["gemm"].items())
        exps = f"{peaks['exp'] / 1e9:.1f} Gexp/s" if peaks["exp"] else "exp rate not measured"
        lines.append(f"measured peaks: copy {copies}; matmul {gemms}; {exps}")
    return lines


def operator_table(rows: Sequence[Row], mode: str, method: str) -> Table:
    memory = any(row.peak_memory is not None for row in rows)
    title = f"{rows[0].subject}, {mode}, {rows[0].dtype} ({METHODS[method]})"
    table = Table(title=title, title_justify="left")
    table.add_column("shape", overflow="fold")
    table.add_column("provider", no_wrap=True)
    for header in ("median", "p20 - p80", "x eager", "GFLOP/s", "GB/s", "of floor"):
        table.add_column(header, justify="right", no_wrap=True)
    if memory:
        table.add_column("peak MiB", justify="right")
    previous = None
    for row in rows:
        name = f"{row.problem}, batch {row.batch}: {row.shape}"
        first, previous = name if name != previous else "", name
        provider = f"[bold]{row.provider}[/bold]" if row.ours else row.provider
        if first and table.row_count:
            table.add_section()
        if row.status != "ok" or row.median is None:
            word = "[bold red]WRONG[/bold red]" if row.status == "wrong" else "skipped"
            table.add_row(first, provider, word, *[""] * (5 + memory))
            continue
        cells = [
            first,
            provider,
            show_time(row.median),
            f"{show_time(row.p20 or 0)} - {show_time(row.p80 or 0)}",
            f"{row.speedup:.2f}" if row.speedup else "",
            show_rate(row.flops_per_second, 1e9),
            show_rate(row.bytes_per_second, 1e9),
            f"{show_share(row.floor_share)} {row.bound}",
        ]
        if memory:
            cells.append(show_rate(row.peak_memory, 1 << 20))
        table.add_row(*cells)
    return table


def model_table(rows: Sequence[Row]) -> Table:
    table = Table(title=f"{rows[0].subject}, images/s, {rows[0].dtype}", title_justify="left")
    for header in ("batch", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("images/s", "median", "p20 - p80", "x eager"):
        table.add_column(header, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        first, previous = (str(row.batch) if row.batch != previous else ""), row.batch
        if first and table.row_count:
            table.add_section()
        provider = f"[bold]{row.provider}[/bold]" if row.ours else row.provider
        if row.median is None:
            table.add_row(first, provider, "WRONG" if row.status == "wrong" else "skipped", "", "", "")
            continue
        table.add_row(
            first,
            provider,
            f"{row.images_per_second:.1f}",
            show_time(row.median),
            f"{show_time(row.p20 or 0)} - {show_time(row.p80 or 0)}",
            f"{row.speedup:.2f}" if row.speedup else "",
        )
    return table


def fitted(table: Table, console: Console) -> Table:
    """The table less the columns that a narrow console has no room for, those that say least: none is cut short."""
    unbounded = console.options.update(max_width=10_000)

    def width(column: Column) -> int:
        return max(console.measure(c, options=unbounded).maximum for c in (column.header, *column.cells))

    for header in ("p20 - p80", "GB/s", "GFLOP/s"):
        first, *others = table.columns  # the first may wrap
        edges = 3 * len(table.columns) + 1
        if min(width(first), FOLDED) + sum(map(width, others)) + edges <= console.width:
            break
        table.columns = [column for column in table.columns if column.header != header]
    return table


def summary_table(summary: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="geometric mean over the shapes above", title_justify="left")
    for header in ("mode", "timing", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("x eager", "of floor", "shapes"):
        table.add_column(header, justify="right")
    for entry in summary:
        table.add_row(
            entry["mode"],
            entry["method"],
            entry["provider"],
            f"{entry['speedup']:.2f}",
            show_share(entry["floor_share"]),
            str(entry["count"]),
        )
    return table


def print_report(console: Console, rows: Sequence[Row], summary: Sequence[dict[str, Any]]) -> None:
    timed = {(row.mode, row.method): None for row in rows if row.median is not None}
    is_model = any(row.images_per_second is not None for row in rows)
    for mode, method in timed:
        # A row that failed its gate was never timed and belongs under every timing method.
        shown = [row for row in rows if row.mode == mode and row.method in (method, "")]
        table = model_table(shown) if is_model else operator_table(shown, mode, method)
        console.print(fitted(table, console))
    failures: dict[str, str] = {}
    for row in rows:
        if row.status != "ok":
            where = f"{row.problem}, batch {row.batch}, {row.mode}"
            failures.setdefault(f"{row.status} {row.provider}: {row.reason}", where)
    for text, where in failures.items():
        style = "red" if text.startswith("wrong") else None
        console.print(f"{text} [first at {where}]", markup=False, style=style)
    if (shared := max((row.calls for row in rows), default=1)) > 1:
        console.print(
            f"where eager takes less than {show_time(SHORT_CALL)}, {shared} calls on inputs of their own, as the "
            "layers of a network, share one backward pass; times are of one call"
        )
    if any(row.floor_share is not None and row.floor_share > 1 for row in rows):
        console.print(
            "a share of the floor above 100 %: the peak was measured too low (a busy machine does that), or the"
            " kernel gets by with less than the formula that the floor counts"
        )
    if summary:
        console.print(summary_table(summary))


def without_paths(value: Any) -> Any:
    """Facts of a machine less its absolute paths: results are kept and shared."""
    if isinstance(value, dict):
        cleaned = {key: without_paths(entry) for key, entry in value.items()}
        return {key: entry for key, entry in cleaned.items() if entry is not _PATH}
    return _PATH if isinstance(value, str) and os.path.isabs(value) else value


_PATH = object()


def document(
    rows: Sequence[Row],
    summary: Sequence[dict[str, Any]],
    environment: dict[str, Any],
    peaks: dict[str, Any] | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": without_paths(environment),
        "peaks": peaks,
        "settings": without_paths(settings),
        "summary": list(summary),
        "rows": [row.as_dict() for row in rows],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
