"""Trains a network of vitkernels.models on a folder of images, or on the digits that come with scikit-learn.

    python examples/train.py --model medvit_tiny --data digits --size 112 --epochs 5
    python examples/train.py --model dinat_mini --data photos --checkpoint mini.pth --resume --autocast bfloat16
    torchrun --nproc-per-node 4 examples/train.py --model dinat_mini --data photos

A folder holds one folder of images a class, or two such folders `train` and `val`. A checkpoint is written after
every epoch, and its weights are read by `models.create_model(name, weights=PATH)`. A run is a function of its
arguments: what is drawn at random follows from the seed, the epoch and the image, so that a resumed run, and one
on several processes, takes the same images in the same order. Needs `pip install 'vitkernels[examples]'`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitkernels import models

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class Images(Dataset):
    """Images as tensors in [-1, 1] with their classes; a random crop and flip where `key` is given."""

    def __init__(self, samples: list, args: argparse.Namespace, key: str | None = None) -> None:
        self.samples, self.args, self.key = samples, args, key

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        source, label = self.samples[index]
        image = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
        image = image.convert("RGB")
        left, top, (width, height), flip = 0.0, 0.0, image.size, False
        if self.key is not None:
            draw = random.Random(f"{self.key}/{index}")
            share = draw.uniform(self.args.crop, 1)
            left, top = width * (1 - share) * draw.random(), height * (1 - share) * draw.random()
            width, height = width * share, height * share
            flip = self.args.flip and draw.random() < 0.5
        side = self.args.size
        image = image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return (pixels.flip(2) if flip else pixels), label


def read_folder(folder: Path) -> list[tuple[Path, int]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    return [
        (path, label)
        for label, entry in enumerate(classes)
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def load_data(name: str) -> tuple[list, list]:
    """Training and validation samples, each an image (a path or an array) and its class."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        samples: list = list(
            zip((digits.images * 15.9375).astype(np.uint8), digits.target.tolist(), strict=True)
        )
    elif (Path(name) / "train").is_dir():
        return read_folder(Path(name) / "train"), read_folder(Path(name) / "val")
    else:
        samples = read_folder(Path(name))
    random.Random(0).shuffle(samples)
    held_out = len(samples) // 6
    return samples[held_out:], samples[:held_out]


def batches(count: int, size: int, key: str) -> list[list[int]]:
    """This process's share of every batch of an epoch; the last, smaller batch is left out."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return [order[start + RANK : start + size : WORLD] for start in range(0, count - size + 1, size)]


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Without decay: norms, biases, and what the model names."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def learning_rate(args: argparse.Namespace, step: int, steps: int) -> float:
    """A linear rise over the first epochs, then half a cosine; `step` counts from 0 over the whole run."""
    warmup = args.warmup * steps / args.epochs
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def accuracy(model: nn.Module, samples: list, args: argparse.Namespace, device: torch.device) -> float:
    model.eval()
    loader = DataLoader(Images(samples[RANK::WORLD], args), args.batch_size, num_workers=args.workers)
    right = torch.zeros((), device=device)
    for images, labels in loader:
        with autocast(args, device):
            right += (model(images.to(device)).argmax(1) == labels.to(device)).sum()
    return mean_over_processes(right).item() * WORLD / max(1, len(samples))


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, args.autocast or "bfloat16")
    return torch.autocast(device.type, dtype, enabled=args.autocast is not None)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    args: argparse.Namespace,
    device: torch.device,
    rates: Iterator[float],
    progress: Progress,
    title: str,
) -> list[float]:
    model.train()
    losses = []
    task = progress.add_task(title, total=len(loader), loss="")
    for (images, labels), rate in zip(loader, rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(args, device):
            logits = model(images.to(device, non_blocking=True))
        target = labels.to(device, non_blocking=True)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(mean_over_processes(loss.detach().clone()).item())
        progress.update(task, advance=1, loss=f"loss {losses[-1]:.4f}")
    progress.remove_task(task)
    return losses


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, should the run be stopped now."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="medvit_tiny",
        choices=models.list_models(),
        metavar="NAME",
        help="of vitkernels.models",
    )
    add("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="further arguments of the model")
    add("--weights", help="file of pretrained weights to start from; the classifier is made anew")
    add("--data", default="digits", help="'digits' or a folder")
    add("--limit", type=int, help="use only that many training images")
    add("--size", type=int, default=224, help="side that images are resized to")
    add(
        "--crop",
        type=float,
        default=0.8,
        help="smallest share of the sides that a random crop keeps; 1: no crop",
    )
    add("--flip", action="store_true", help="mirror images at random")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.5, help="epochs over which the learning rate rises")
    add("--weight-decay", type=float, default=0.05)
    add("--label-smoothing", type=float, default=0.0)
    add("--autocast", choices=["bfloat16", "float16"], help="run the forward in this dtype where it is safe")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that load images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--checkpoint", type=Path, help="file written after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint, where there is one")
    add("--log", type=Path, help="file that gets one line of JSON an epoch")
    args = parser.parse_args(argv)
    if args.batch_size % WORLD:
        parser.error(f"--batch-size: expected a multiple of the {WORLD} processes; got {args.batch_size}")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    console = Console(quiet=RANK != 0, highlight=False)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    training, validation = load_data(args.data)
    training = training[: args.limit]
    classes = 1 + max(label for _, label in (*training, *validation))
    torch.manual_seed(args.seed)
    extra = {
        key: ast.literal_eval(value) for key, _, value in (pair.partition("=") for pair in args.model_args)
    }
    if args.weights:
        model = models.create_model(args.model, num_classes=0, weights=args.weights, **extra)
        model.reset_classifier(classes)
    else:
        model = models.create_model(args.model, num_classes=classes, **extra)
    model.to(device)
    if hasattr(model, "unused_parameters"):  # DistributedDataParallel would wait for their gradients
        for name in model.unused_parameters():
            model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.autocast == "float16")

    history: list[dict[str, Any]] = []
    if args.resume and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history = state["history"]
    parallel = model
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(
            nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{args.model}: {count / 1e6:.1f} M parameters, {len(training)} + {len(validation)} images of {classes} "
        f"classes, {WORLD} process(es) on {device.type}, from epoch {len(history) + 1} of {args.epochs}"
    )

    steps = args.epochs * (len(training) // args.batch_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=RANK != 0) as progress:
        for epoch in range(len(history), args.epochs):
            start, key = time.perf_counter(), f"{args.seed}/{epoch}"
            torch.manual_seed(hash((args.seed, epoch, RANK)))
            order = batches(len(training), args.batch_size, key)
            loader = DataLoader(Images(training, args, key), batch_sampler=order, num_workers=args.workers)
            rates = (learning_rate(args, epoch * len(order) + i, steps) for i in range(len(order)))
            title = f"epoch {epoch + 1}/{args.epochs}"
            losses = train_epoch(parallel, optimizer, scaler, loader, args, device, rates, progress, title)
            right = accuracy(model, validation, args, device)
            history.append({"epoch": epoch + 1, "losses": losses, "accuracy": right})
            seconds = time.perf_counter() - start
            mean = sum(losses) / max(1, len(losses))
            progress.print(f"{title}: loss {mean:.4f}, validation accuracy {right:.2%}, {seconds:.0f} s")
            if RANK == 0 and args.checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save(args.checkpoint, {**state, "scaler": scaler.state_dict(), "history": history})
            if RANK == 0 and args.log:
                args.log.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    if WORLD > 1:
        dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
