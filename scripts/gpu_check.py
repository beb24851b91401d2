"""The parts of gpu_check.sh that are Python: every kernel against float64, and the closing table."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import vitkernels
from vitkernels.bench import cli, gate, models
from vitkernels.bench.case import Case, Inputs, Problem, Provider, Unavailable, load_case, operators
from vitkernels.bench.cli import DTYPES
from vitkernels.bench.host_model import calibrate, create_host_model, randomize
from vitkernels.bench.providers import ours
from vitkernels.bench.runner import Draws, Settings, evaluate
from vitkernels.bench.timing import CudaTimer, time_on_cpu
from vitkernels.core.operator import REGISTRY

# An exit code: the kernel takes none of the shapes in this dtype.
NOTHING_RAN = 3


def check(args: argparse.Namespace) -> int:
    """Forward and every gradient at the house tolerance, and bit for bit the same when repeated.

    With several jobs every operator, backend and dtype has a process of its own: after an illegal access a
    process can only fail.
    """
    known = {name: None for operator in operators() for name in load_case(operator).check_shapes}
    if unknown := [name for name in args.shapes or () if name not in known]:
        print(f"shapes: expected some of {', '.join(known)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    chosen = [name for name in args.operators or operators() if chosen_shapes(load_case(name), args)]
    # Triton compiles for long; what takes longest goes first.
    backends = sorted(args.backends, key=lambda name: name != "triton")
    kernels = []
    for operator, backend in ((operator, backend) for backend in backends for operator in chosen):
        if backend == "reference" or backend in REGISTRY[operator].backends:
            kernels.append((operator, backend))
        else:
            print(f"{operator} {backend}: the operator has no {backend} implementation")
    tasks = [(*kernel, dtype) for kernel in kernels for dtype in args.dtypes]
    if args.alone:
        return check_alone(*tasks[0], args)
    if args.jobs == 1:
        codes = [check_alone(*task, args) for task in tasks]
    else:
        deadline = time.monotonic() + args.seconds
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            codes = list(pool.map(lambda task: check_apart(*task, args, deadline), tasks))
    # A kernel may lack a dtype, but one that ran in none was not checked.
    by_kernel: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (operator, backend, _), code in zip(tasks, codes, strict=True):
        by_kernel[operator, backend].append(code)
    absent = [kernel for kernel, own in by_kernel.items() if all(code == NOTHING_RAN for code in own)]
    for operator, backend in absent:
        print(f"FAILED {operator} {backend}: nothing ran")
    ran = [code for code in codes if code != NOTHING_RAN]
    print(f"{ran.count(0)} of {len(ran)} passed")
    return 1 if any(ran) or absent or not ran else 0


def check_apart(operator: str, backend: str, dtype: str, args: argparse.Namespace, deadline: float) -> int:
    command = [*shlex.split(args.prefix), sys.executable, __file__, "check", "--device", args.device]
    command += ["--operators", operator, "--backends", backend, "--dtypes", dtype]
    command += ["--alone", "--repeats", str(args.repeats)]
    command += ["--shapes", *args.shapes] if args.shapes else []
    command += ["--most-shapes", str(args.most_shapes)] if args.most_shapes else []
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, deadline - begin),
            check=False,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = 1, (error.stdout or b"").decode(errors="replace")
        text += f"FAILED {operator} {backend} {dtype}: not done in the time there was\n"
    if code not in (0, NOTHING_RAN) and "FAILED" not in text:
        text += f"FAILED {operator} {backend} {dtype}: exit code {code}\n"
    took = f"({time.monotonic() - begin:.0f} s)"
    print("".join(f"{line}\n" for line in [*text.splitlines(), took]), end="", flush=True)
    return code


def check_alone(operator: str, backend: str, dtype: str, args: argparse.Namespace) -> int:
    shares, failures = check_backend(
        load_case(operator), backend, DTYPES[dtype], torch.device(args.device), args
    )
    worst = f"worst error {100 * max(shares):.0f} % of what is allowed" if shares else "nothing ran"
    print(f"{operator} {backend:<9} {dtype:<9} {len(shares)} shapes, {worst}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0 if shares else NOTHING_RAN


def chosen_shapes(case: Case, args: argparse.Namespace) -> list[tuple[str, str]]:
    shapes = [item for item in case.check_shapes.items() if not args.shapes or item[0] in args.shapes]
    return shapes[: args.most_shapes]


def check_backend(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> tuple[list[float], list[str]]:
    shares: list[float] = []
    failures: list[str] = []
    refused: dict[str, int] = defaultdict(int)
    provider = ours(case, backend)
    for name, text in chosen_shapes(case, args):
        where = f"{case.operator} {backend} {dtype} {name} ({text})"
        try:
            worst, different = check_shape(
                case, provider, case.parse_shape(text), dtype, device, args.repeats
            )
        except Unavailable as error:
            refused[str(error)] += 1
            continue
        except Exception as error:
            failures.append(f"{where}: {type(error).__name__}: {error}".splitlines()[0])
            # What an illegal access leaves behind cannot run another shape.
            if "CUDA error" in str(error):
                break
            continue
        shares.append(worst.share)
        if not worst.ok:
            failures.append(f"{where}: {worst}")
        if different:
            failures.append(f"{where}: a repeat changed {', '.join(different)}")
    for reason, count in refused.items():
        print(f"{case.operator} {backend} {dtype}: {count} shapes not run: {reason}")
    return shares, failures


def check_shape(
    case: Case, provider: Provider, problem: Problem, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[gate.Check, list[str]]:
    """The worst of all results, in training and in inference, and the results that a repeat changed."""
    verdicts = []
    settings = Settings(device, dtype)
    # Inference takes other paths: nothing is kept for a backward pass, lse may be left out.
    for training in (True, False):
        draws = Draws(case, problem, 3, training, settings)
        inputs = draws[0][0]
        function = provider.prepare(inputs, training)
        verdicts.append(draws.judge(provider, function))
        if training:
            got = evaluate(function, inputs, True)
            repeated = [evaluate(function, inputs, True) for _ in range(repeats)]
            different = [name for name in got if any(not torch.equal(got[name], r[name]) for r in repeated)]
    return gate.worst(verdicts), different


def far(args: argparse.Namespace) -> int:
    """Results past element 2^31: the first and the last images of a batch so large, against those images alone."""
    failures = 0
    for operator in args.operators or operators():
        case = load_case(operator)
        for backend in args.backends if case.check_shapes else ():
            verdict = far_verdict(case, backend, args, training=True)
            if verdict == OUT_OF_MEMORY:
                verdict = f"with backward {verdict}; {far_verdict(case, backend, args, training=False)}"
            failures += "FAILED" in verdict
            print(f"{operator} {backend}: {verdict}", flush=True)
    return 1 if failures else 0


OUT_OF_MEMORY = "not run: out of memory"


def far_verdict(case: Case, backend: str, args: argparse.Namespace, training: bool) -> str:
    try:
        return far_case(case, backend, torch.device(args.device), args.elements, training)
    except Unavailable as error:
        return f"not run: {error}"
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:
        return f"FAILED {type(error).__name__}: {error}"
    finally:
        torch.cuda.empty_cache()


def far_case(case: Case, backend: str, device: torch.device, elements: int, training: bool) -> str:
    problem = case.presets[case.default_preset][0]

    def inputs_of(images: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return case.make_inputs(problem, images, dtype=torch.float16, device=device, generator=generator)

    one, two = inputs_of(1), inputs_of(2)
    prepare = ours(case, backend).prepare

    def all_of(inputs: Inputs) -> dict[str, Tensor]:
        options = {name: value for name, value in inputs.options.items() if isinstance(value, Tensor)}
        return inputs.tensors | options | inputs.grad_more | {"out": inputs.grad_out}

    tensors, alone = all_of(two), all_of(one)
    batched = {name for name, tensor in tensors.items() if tensor.shape[0] != alone[name].shape[0]}
    largest = max(tensors[name].numel() for name in batched)
    copies = elements // largest + 2

    def widen(name: str, tensor: Tensor) -> Tensor:
        return tensor.repeat(copies, *(1,) * (tensor.dim() - 1)) if name in batched else tensor

    many = Inputs(
        {name: widen(name, tensor) for name, tensor in two.tensors.items()},
        two.options | {name: widen(name, two.options[name]) for name in batched & two.options.keys()},
        widen("out", two.grad_out),
        {name: widen(name, tensor) for name, tensor in two.grad_more.items()},
    )
    expected = evaluate(prepare(two, training), two, training)
    got = evaluate(prepare(many, training), many, training)
    wrong = []
    for name in sorted(batched & got.keys()):
        length, scale = expected[name].shape[0], expected[name].double().square().mean().sqrt()
        for where, part in (("first", got[name][:length]), ("last", got[name][-length:])):
            error = (part.double() - expected[name].double()).abs().max()
            if not error <= 2e-2 * scale:
                wrong.append(f"{where} of {name}: {error:.2e} off, RMS {scale:.2e}")
    size = max(tensor.numel() for tensor in got.values())
    return f"FAILED {'; '.join(wrong)}" if wrong else f"right, {size} elements in the largest result"


def bench(args: argparse.Namespace) -> int:
    """The benchmark of one operator after another in one process, each to a file of its own."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args.directory.mkdir(parents=True, exist_ok=True)
    failed = []
    for operator in args.operators or operators():
        if not load_case(operator).check_shapes:
            continue
        target = ["--json", f"{args.directory}/bench_{operator}.json"]
        print(f"=== {operator}", flush=True)
        try:
            code = cli.execute(
                parser.parse_args(["--op", operator, "--quiet", *target, *shlex.split(args.arguments)])
            )
        except Exception as error:
            print(f"FAILED {operator}: {type(error).__name__}: {error}")
            code = 1
        failed += [operator] if code else []
    return len(failed)


def networks(args: argparse.Namespace) -> int:
    """Benchmarks of whole networks, compiled side by side and then timed one after another.

    Most of the time goes to torch.compile, which needs processors, not the device.
    """
    args.directory.mkdir(parents=True, exist_ok=True)
    failed = 0
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as turns:
        children = []
        for index, text in enumerate(args.networks):
            name, _, more = text.partition(" ")
            label = "_".join([name, *(word for word in more.split() if word.isdigit())])
            command = [sys.executable, __file__, "network", f"{turns}/{index}", "--model", name, "--quiet"]
            command += [*shlex.split(args.arguments), *more.split()]
            command += ["--json", f"{args.directory}/bench_{label}.json"]
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            children.append((text, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log))
        compiled = set()
        while len(compiled) < len(children) and time.monotonic() < deadline - args.timing_seconds:
            compiled = {
                i
                for i, (_, child, _) in enumerate(children)
                if child.poll() is not None or Path(f"{turns}/{i}.ready").exists()
            }
            time.sleep(0.1)
        for i, (_, child, _) in enumerate(children):
            if i not in compiled:  # what still compiles would disturb the others; what is ready is timed
                child.send_signal(signal.SIGINT)
        for i, (text, child, log) in enumerate(children):
            Path(f"{turns}/{i}.turn").touch()
            try:
                code = child.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                code = child.wait()
            log.seek(0)
            print(f"=== {text}: exit code {code}\n{log.read()}", flush=True)
            failed += code != 0
    return failed


def network(args: argparse.Namespace) -> int:
    """One process of `networks`."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def wait_for_turn() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        Path(f"{args.turn}.ready").touch()
        while not Path(f"{args.turn}.turn").exists():
            time.sleep(0.05)

    return cli.execute(parser.parse_args(args.rest), wait_for_turn)


def profiled(args: argparse.Namespace) -> int:
    """One call of ours, forward and backward, per operator, with the profiler on only then."""
    for operator in args.operators or operators():
        case = load_case(operator)
        for problem in case.presets[args.preset or case.default_preset][: args.problems]:
            generator = torch.Generator().manual_seed(0)
            inputs = case.make_inputs(
                problem, args.batch, dtype=DTYPES[args.dtype], device="cuda", generator=generator
            )
            for backend in args.backends:
                try:
                    function = ours(case, backend).prepare(inputs, True)
                except Unavailable as error:
                    print(f"{operator} {backend}: {error}")
                    continue
                evaluate(function, inputs, True)
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                evaluate(function, inputs, True)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
    return 0


def breakdown(args: argparse.Namespace) -> int:
    """Whole networks after `apply`: the time of a forward, as a CUDA graph, and the kernels that take most of it."""
    device, failed = torch.device(args.device), 0
    for text in args.networks:
        try:
            name, batch, *merged = text.split()
            print(
                f"=== {text}: {breakdown_of(name, int(batch), [int(r) for r in merged], device, args)}",
                flush=True,
            )
        except Exception as error:
            print(f"=== {text}: FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
    return failed


def breakdown_of(
    name: str, batch: int, merged: list[int], device: torch.device, args: argparse.Namespace
) -> str:
    generator = torch.Generator().manual_seed(0)
    model = randomize(create_host_model(name).model, generator)
    image = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    calibrate(model, [torch.randn(4, *image, generator=generator)])
    model = model.to(device, DTYPES[args.dtype])
    vitkernels.apply(model, token_merging=merged[0] if merged else None, verbose=False)
    images = torch.randn(batch, *image, generator=generator).to(device, DTYPES[args.dtype])
    forward = functools.partial(models.forward, model, images)
    steps = {"forward": forward}
    for _ in range(3):
        forward()
    if device.type == "cuda":
        timings, uncaptured = CudaTimer(device, repeats=1).time_graphs(steps, rounds=args.rounds)
        if uncaptured:
            raise RuntimeError(f"CUDA graph capture: {uncaptured['forward']}")
    else:
        timings = time_on_cpu(steps, rounds=args.rounds)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if device.type == "cpu":
            spent[event.name].append(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name].append(event.time_range.elapsed_us())
    total = sum(map(sum, spent.values()))
    lines = [f"{1e3 * timings['forward'].median:.3f} ms, in kernels {1e-3 * total:.3f}"]
    for kernel, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[: args.most]:
        lines.append(
            f"{sum(times):10.1f} us {100 * sum(times) / total:3.0f} % {len(times):4d} x {kernel[:140]}"
        )
    return "\n".join(lines)


def summary(args: argparse.Namespace) -> int:
    """A short table of every benchmark file."""
    if not args.directory.is_dir():
        print(f"summary: there is no folder {args.directory}", file=sys.stderr)
        return 2
    paths = sorted(args.directory.glob("bench_*.json"))
    if not paths:
        print(f"nothing was benchmarked: no bench_*.json in {args.directory}")
    for path in paths:
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
    checking.add_argument("--operators", nargs="+", choices=operators())
    checking.add_argument("--most-shapes", type=int, metavar="N", help="only the first N of them")
    checking.add_argument("--repeats", type=int, default=5)
    checking.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time"
    )
    checking.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one of those processes
    checking.add_argument("--seconds", type=float, default=300, help="for all of them together")
    checking.add_argument("--prefix", default="", help="a command that runs each, such as compute-sanitizer")
    checking.set_defaults(run=check)
    distant = commands.add_parser("far", help=far.__doc__)
    distant.add_argument("--operators", nargs="+", choices=operators())
    distant.add_argument("--device", default="cuda")
    distant.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    distant.add_argument("--elements", type=int, default=2**31, help="that the largest tensor exceeds")
    distant.set_defaults(run=far)
    profile = commands.add_parser("profiled", help=profiled.__doc__)
    profile.add_argument("--operators", nargs="+", choices=operators())
    profile.add_argument("--backends", nargs="+", default=["cuda"])
    profile.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    profile.add_argument("--preset")
    profile.add_argument("--problems", type=int, default=2, help="the first so many of the preset")
    profile.add_argument("--batch", type=int, default=64)
    profile.set_defaults(run=profiled)
    parts = commands.add_parser("breakdown", help=breakdown.__doc__)
    parts.add_argument(
        "networks", nargs="+", metavar="'NAME BATCH [R]'", help="with R tokens merged in every block"
    )
    parts.add_argument("--device", default="cuda")
    parts.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parts.add_argument("--rounds", type=int, default=9)
    parts.add_argument("--most", type=int, default=20, help="kernels to list")
    parts.set_defaults(run=breakdown)
    timing = commands.add_parser("bench", help=bench.__doc__)
    timing.add_argument("directory", type=Path)
    timing.add_argument("--operators", nargs="+", choices=operators())
    timing.add_argument(
        "--arguments", default="", help="further ones of python -m vitkernels bench, in one string"
    )
    timing.set_defaults(run=bench)
    whole = commands.add_parser("networks", help=networks.__doc__)
    whole.add_argument("directory", type=Path)
    whole.add_argument("networks", nargs="+", metavar="'NAME [ARGUMENT ...]'", help="with its own arguments")
    whole.add_argument("--arguments", default="", help="those of all, in one string")
    whole.add_argument("--seconds", type=float, default=300, help="for all together")
    whole.add_argument("--timing-seconds", type=float, default=60, help="of these, for timing")
    whole.set_defaults(run=networks)
    one = commands.add_parser("network", help=network.__doc__)
    one.add_argument("turn")
    one.add_argument("rest", nargs=argparse.REMAINDER)
    one.set_defaults(run=network)
    closing = commands.add_parser("summary", help=summary.__doc__)
    closing.add_argument("directory", type=Path)
    closing.set_defaults(run=summary)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    code = main()
    # PyTorch's autograd threads drop Python objects at their own pace, and one that does so while the interpreter
    # is being torn down aborts the process: seen on a GPU in one process of twenty that ends after a backward pass.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
