"""``python -m vitkernels demo``: an EfficientViT on a photograph, before and after ``vitkernels.apply``."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitkernels

DESCRIPTION = """\
Takes timm's EfficientViT (ours where timm cannot be imported), a real photograph, and compares the
network before and after vitkernels.apply: what was replaced, how far the logits move, images per second.
Nothing is downloaded: the weights are random, so the logits mean nothing, but their differences do."""

SIZE = 224
BATCHES = (1, 16)
EAGER, UNFOLDED, APPLIED = "before", "apply, BN not folded", "after apply"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, help="a photograph of yours (default: scikit-image's cat)")
    parser.add_argument("--model", default="efficientvit_m5", help="default: efficientvit_m5")
    parser.add_argument("--output", type=Path, metavar="PLOT", help="default: <model>_demo.png")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well (takes minutes)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per measurement (default: 1)")


def differences(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the norm of the difference over the norm."""
    change = logits.double() - expected.double()
    return change.abs().max().item(), (change.norm() / expected.double().norm()).item()


def prepare(name: str, photo: Tensor, console: Any) -> nn.Module:
    """The network with random but sane weights."""
    from vitkernels.bench import host_model
    from vitkernels.bench.photo import normalize, random_crops

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    host = host_model.create_host_model(name)
    parameters = sum(parameter.numel() for parameter in host.model.parameters())
    console.print(f"model    {name} of {host.source}, {parameters / 1e6:.1f} M parameters", markup=False)
    if host.note:
        console.print(f"         not timm's: {host.note}", markup=False)
        console.print("         'before' is this model in plain PyTorch, without our kernels")
    host_model.randomize(host.model, generator)
    batches = [normalize(random_crops(photo, 16, SIZE, generator)) for _ in range(2)]
    host_model.calibrate(host.model, batches)
    console.print(
        "weights  random (nothing is downloaded), batch norms and attention biases too: at their initial\n"
        "         values the mixers add exactly 0; norm statistics are calibrated on crops of the photo"
    )
    return host.model


def measure(variants: dict[str, Any], photo: Tensor, args: argparse.Namespace, name: str) -> list[Any]:
    """Interleaved images/s of all variants at both batch sizes."""
    from vitkernels.bench.models import forward
    from vitkernels.bench.photo import normalize, random_crops
    from vitkernels.bench.runner import Row, Settings, record, time_steps

    device = torch.device(args.device)
    settings = Settings(device, torch.float32, seconds=args.seconds)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for batch in BATCHES:
        images = normalize(random_crops(photo, batch, SIZE, generator)).to(device)
        steps = {key: partial(forward, model, images) for key, model in variants.items()}
        timings, _ = time_steps(steps, settings)
        measured = timings.get("wall") or timings["call"]
        for variant, spent in measured.items():
            row = Row(
                subject=name,
                preset=name,
                problem="photo",
                shape="x".join(map(str, images.shape)),
                batch=batch,
                dtype="float32",
                device=args.device,
                mode="fwd",
                provider=variant,
                ours=variant in (UNFOLDED, APPLIED),
            )
            row = record(row, "wall", spent, measured[EAGER])
            row.images_per_second = batch / spent.median
            rows.append(row)
    return rows


def draw(path: Path, shown: Tensor, rows: list[Any], title: str, caption: str) -> None:
    from vitkernels.bench.plot import plt, throughput_bars

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1, 2.1), layout="constrained")
    left.imshow(shown.permute(1, 2, 0).numpy())
    left.set_axis_off()
    left.set_title(caption, fontsize=9, loc="left")
    throughput_bars(right, rows)
    right.set_title("inference, fp32", fontsize=9, loc="left")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def execute(args: argparse.Namespace) -> int:
    from vitkernels.bench.extras import require

    require("rich", "matplotlib", "PIL")
    from rich.console import Console

    from vitkernels.bench import report
    from vitkernels.bench.host_model import plain
    from vitkernels.bench.models import forward
    from vitkernels.bench.outputs import check_plot
    from vitkernels.bench.peaks import device_name
    from vitkernels.bench.photo import center_crop, load_photo, normalize
    from vitkernels.bench.timing import busy

    begin = time.perf_counter()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is there; got 'cuda', but torch finds no CUDA device")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1; got {args.threads}")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"seconds: expected a positive number; got {args.seconds}")
    output = args.output or Path(f"{args.model}_demo.png")
    check_plot("output", output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    photo, source = load_photo(args.image)
    console.print(f"photo    {source}, {photo.shape[2]} x {photo.shape[1]}", markup=False)
    device = torch.device(args.device)
    model = prepare(args.model, photo, console).to(device)

    shown = center_crop(photo, SIZE)
    image = normalize(shown[None]).to(device)
    original = plain(model)
    before = forward(original, image)
    applied, unfolded = copy.deepcopy(model), copy.deepcopy(model)
    console.print("\n[bold]vitkernels.apply(model)[/bold]")
    console.print(str(vitkernels.apply(applied, verbose=False)), markup=False, highlight=False)
    vitkernels.apply(unfolded, fold_bn=False, verbose=False)
    reverted = copy.deepcopy(applied)
    vitkernels.revert(reverted)

    rms = before.square().mean().sqrt().item()
    console.print(f"\nlogits of the photo: {before.numel()} values, rms {rms:.3g}")
    truth = forward(copy.deepcopy(original).double(), image.double())
    _, own = differences(before, truth)
    console.print(
        f"  {EAGER:<24} norm-relative {own:.2e} from itself in float64, which is float32's own rounding"
    )
    for label, changed in ((UNFOLDED, unfolded), (APPLIED, applied)):
        after = forward(changed, image)
        largest, relative = differences(after, before)
        _, from_truth = differences(after, truth)
        console.print(
            f"  {label:<24} norm-relative {from_truth:.2e} from float64, {relative:.2e} from eager (at most "
            f"{largest:.2e})"
        )
    same = torch.equal(forward(plain(reverted), image), before)
    console.print(f"  {'after revert':<24} {'bit for bit the same' if same else 'NOT the same'}")

    variants: dict[str, Any] = {EAGER: original, UNFOLDED: unfolded, APPLIED: applied}
    if args.compile:
        variants["torch.compile"] = torch.compile(copy.deepcopy(original), dynamic=False)
    threads = f", {torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else ""
    machine = f"{device_name(device)}{threads}"
    console.print(f"\ntiming on {machine} ...", markup=False)
    if note := busy():
        console.print(note, style="yellow")
    rows = measure(variants, photo, args, args.model)
    console.print(report.model_table(rows))
    caption = "input: " + (source.partition(" (")[0] if args.image is None else Path(source).name)
    draw(output, shown, rows, f"{args.model} before and after vitkernels.apply, {machine}", caption)
    console.print(f"plot written to {output}; {time.perf_counter() - begin:.0f} s in all", markup=False)
    return 0 if same else 1


def run(args: argparse.Namespace) -> int:
    from vitkernels.bench.extras import MissingExtra

    try:
        return execute(args)
    except (MissingExtra, ValueError) as error:
        print(f"vitkernels demo: {error}", file=sys.stderr)
        return 2
