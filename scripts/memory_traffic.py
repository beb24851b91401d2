"""What the CUDA kernels' accesses to memory take, counted on the host twin: no GPU needed (csrc/twin/traffic.h).

Of every kernel that a forward and backward call launches: wavefronts of shared memory beside the least that as many
bytes can take (more are bank conflicts), sectors of global memory beside the least (more are fetched and not used by
the request that fetched them), and the lines of the source where most of the excess is.

python scripts/memory_traffic.py window_attention --preset efficientvit_m5 --stage 0 --dtype float16
python scripts/memory_traffic.py strip_attention --shape queries=196,keys=49 --lines 5
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# Operators that save other things for the CPU's kernels than for CUDA's take this for CUDA's.
os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import twin  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vitkernels.bench.case import Case, load_case, operators  # noqa: E402
from vitkernels.core import backends, native  # noqa: E402

SPACES = {True: ("shared", "wavefronts"), False: ("global", "sectors")}


def run_on_twin() -> None:
    """From now on ``backend="cuda"`` takes CPU tensors."""
    backends._availability[("cuda", "cpu", -1)] = ""
    native.why_left_out = lambda operator: None
    for operator in twin.OPERATORS:
        launcher = importlib.import_module(f"vitkernels.kernels.{operator}.native")
        for direction in ("forward", "backward"):
            function = getattr(launcher, direction, None)
            # A direction without kernels is composed of PyTorch's operators.
            if function is not None and "module" in inspect.signature(function).parameters:
                setattr(launcher, direction, functools.partial(function, module=twin.load(), cuda=True))


def count(case: Any, problem: Any, batch: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = case.make_inputs(problem, batch, dtype=dtype, device=torch.device("cpu"), generator=generator)
    wanted = {
        name: tensor.requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.tensors.items()
    }
    module = twin.load()
    module.count_traffic(True)
    results = case.function(**wanted, **inputs.options, backend="cuda")
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results[: len(inputs.gradients)], inputs.gradients)
    rows = module.traffic()
    module.count_traffic(False)
    return rows


def report(rows: list[tuple[Any, ...]], lines: int, console: Console) -> float:
    """Prints the table and returns what all kernels together take of shared memory, of the least."""
    kernels: dict[tuple[str, bool], list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        kernels[row[0], row[2]].append(row)
    table = Table(show_lines=False)
    for name, justify in (("kernel", "left"), ("memory", "left"), ("requests", "right"), ("taken", "right")):
        table.add_column(name, justify=justify)
    table.add_column("of the least", justify="right")
    table.add_column("most of the excess at", justify="left")
    for (kernel, shared), parts in sorted(kernels.items()):
        requests, taken, least = (sum(part[i] for part in parts) for i in (4, 5, 6))
        space, unit = SPACES[shared]
        table.add_row(kernel, space, f"{requests:,}", f"{taken:,} {unit}", f"{taken / least:.2f}x")
        for _, line, _, writes, _, taken, least in sorted(parts, key=lambda p: p[6] - p[5])[:lines]:
            if taken > least:
                excess = f"{'write' if writes else 'read'} {line}"
                table.add_row("", "", "", f"{taken:,}", f"{taken / least:.2f}x", excess)
    console.print(table)
    shared_rows = [row for row in rows if row[2]]
    return sum(row[5] for row in shared_rows) / max(1, sum(row[6] for row in shared_rows))


def chosen(case: Case, arguments: argparse.Namespace) -> Any:
    """The problem that is asked for."""
    if arguments.batch < 1:
        raise ValueError(f"batch: expected a positive number; got {arguments.batch}")
    if arguments.shape:
        if arguments.preset:
            raise ValueError("preset: expected either --preset or --shape; got both")
        return case.parse_shape(arguments.shape)
    name = arguments.preset or case.default_preset
    if name not in case.presets:
        raise ValueError(f"preset: expected one of {', '.join(case.presets)}; got {name}")
    stages = case.presets[name]
    if not 0 <= arguments.stage < len(stages):
        raise ValueError(f"stage: expected one of {name}, 0 to {len(stages) - 1}; got {arguments.stage}")
    return stages[arguments.stage]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operator", choices=[name for name in operators() if name in twin.OPERATORS])
    parser.add_argument("--preset")
    parser.add_argument(
        "--stage", type=int, default=0, help="which of the preset's shapes (default: the first)"
    )
    parser.add_argument("--shape", help="key=value,...; as python -m vitkernels bench --shape takes them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument(
        "--most",
        type=float,
        help="exit with 1 where all kernels together take more than so many times the least of shared memory",
    )
    parser.add_argument("--lines", type=int, default=3, help="of the source, for each kernel and memory")
    arguments = parser.parse_args()
    case = load_case(arguments.operator)
    try:
        problem = chosen(case, arguments)
    except ValueError as error:
        parser.error(str(error))
    run_on_twin()
    console = Console(width=160)
    console.print(f"{arguments.operator}, {problem.describe(arguments.batch)}, {arguments.dtype}")
    rows = count(case, problem, arguments.batch, getattr(torch, arguments.dtype))
    share = report(rows, arguments.lines, console)
    return 1 if arguments.most is not None and share > arguments.most else 0


if __name__ == "__main__":
    raise SystemExit(main())
