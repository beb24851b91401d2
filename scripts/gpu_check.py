"""The parts of gpu_check.sh that are Python: every kernel against float64, and the closing table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

from vitkernels.bench import gate
from vitkernels.bench.case import Case, Unavailable, load_case, operators
from vitkernels.bench.cli import DTYPES
from vitkernels.bench.providers import ours
from vitkernels.bench.runner import evaluate, judge, truth_and_baseline


def check(args: argparse.Namespace) -> int:
    """Forward and every gradient at the house tolerance, and bit for bit the same when repeated."""
    device = torch.device(args.device)
    known = {name: None for operator in operators() for name in load_case(operator).check_shapes}
    if unknown := [name for name in args.shapes or () if name not in known]:
        print(f"shapes: expected some of {', '.join(known)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    shares: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    failures = []
    try:
        for operator in operators():
            for backend in args.backends:
                for dtype in args.dtypes:
                    shares_here, failures_here = check_backend(
                        load_case(operator), backend, DTYPES[dtype], device, args
                    )
                    shares[operator, backend, dtype] += shares_here
                    failures += failures_here
    except KeyboardInterrupt:
        failures.append("out of time: not every shape was checked")
    for (operator, backend, dtype), values in shares.items():
        worst = f"worst error {100 * max(values):.0f} % of what is allowed" if values else "nothing ran"
        print(f"{operator} {backend:<9} {dtype:<9} {len(values)} shapes, {worst}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures or not any(shares.values()) else 0


def check_backend(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> tuple[list[float], list[str]]:
    shares: list[float] = []
    failures: list[str] = []
    refused: dict[str, int] = defaultdict(int)
    for name, text in case.check_shapes.items():
        if args.shapes and name not in args.shapes:
            continue
        problem = case.parse_shape(text)
        generator = torch.Generator().manual_seed(0)
        inputs = case.make_inputs(problem, 3, dtype=dtype, device=device, generator=generator)
        where = f"{case.operator} {backend} {dtype} {name} ({text})"
        try:
            function = ours(case, backend).prepare(inputs, True)
        except Unavailable as error:
            refused[str(error)] += 1
            continue
        truth, baseline = truth_and_baseline(case, inputs, True)
        try:
            got = evaluate(function, inputs, True)
            worst = judge(case, problem, 3, inputs, got, baseline, truth)
            # Inference takes other paths: nothing is kept for a backward pass, lse may be left out.
            alone = evaluate(function, inputs, False)
            expected = [{name: results[name] for name in alone} for results in (baseline, truth)]
            worst = max(worst, judge(case, problem, 3, inputs, alone, *expected), key=gate.rank)
            for _ in range(args.repeats):
                again = evaluate(function, inputs, True)
                different = [result for result in got if not torch.equal(got[result], again[result])]
                if different:
                    failures.append(f"{where}: a repeat changed {', '.join(different)}")
                    break
        except Exception as error:
            failures.append(f"{where}: {type(error).__name__}: {error}")
            continue
        shares.append(worst.share)
        if not worst.ok:
            failures.append(f"{where}: {worst}")
    for reason, count in refused.items():
        print(f"{case.operator} {backend} {dtype}: {count} shapes not run: {reason}")
    return shares, failures


def summary(args: argparse.Namespace) -> int:
    """A short table of every benchmark file."""
    for path in sorted(args.directory.glob("bench_*.json")):
        content = json.loads(path.read_text())
        gpus = [gpu["name"] for gpu in content["environment"]["gpus"]] or [
            content["environment"]["cpu"]["name"]
        ]
        print(f"\n{path.stem} on {gpus[0]}, {content['settings']['dtype'] or 'default dtype'}")
        for entry in content["summary"]:
            floor = f"{100 * entry['floor_share']:4.0f} % of floor" if entry["floor_share"] else ""
            print(
                f"  {entry['mode']:<8}{entry['method']:<6}{entry['provider']:<22}"
                f"{entry['speedup']:6.2f} x eager  {floor}  ({entry['count']} shapes)"
            )
        wrong = [row for row in content["rows"] if row["status"] == "wrong"]
        for row in wrong[:5]:
            where = f"{row['problem']} batch {row['batch']} {row['mode']}"
            print(f"  WRONG {row['provider']} {where}: {row['reason']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser("check", help=check.__doc__)
    checking.add_argument("--device", default="cuda")
    checking.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    checking.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    checking.add_argument("--shapes", nargs="+", metavar="NAME", help="only the shapes of these names")
    checking.add_argument("--repeats", type=int, default=5)
    checking.set_defaults(run=check)
    closing = commands.add_parser("summary", help=summary.__doc__)
    closing.add_argument("directory", type=Path)
    closing.set_defaults(run=summary)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
