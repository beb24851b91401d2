"""Trains a network of vitkernels.models on a folder of images, or on the digits that come with scikit-learn.

    python examples/train.py --model medvit_tiny --data digits --size 112 --batch-size 16 --epochs 3
    python examples/train.py --model dinat_mini --data photos --checkpoint mini.pth --resume --autocast bfloat16
    torchrun --nproc-per-node 4 examples/train.py --model dinat_mini --data photos

A folder holds one folder of images a class, or two such folders `train` and `val`. A checkpoint is written after
every epoch; its weights are read by `models.create_model(name, weights=PATH)`. What is drawn at random follows from
the seed, the epoch and the image, so that a resumed run and a run on several processes see the same images in the
same order. Batch norms keep to their process on the CPU and span all processes on GPUs. Needs `vitkernels[examples]`.
"""

import argparse
import ast
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitkernels import models

STATEFUL = ("model", "optimizer", "scaler")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Images(Dataset):
    """Images as tensors in [-1, 1] with their classes; with a key, a random crop (and mirror image) of each."""

    def __init__(self, samples: list, args: argparse.Namespace, key: str | None = None) -> None:
        self.samples, self.args, self.key = samples, args, key

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        source, label = self.samples[index]
        image = (Image.open(source) if isinstance(source, Path) else Image.fromarray(source)).convert("RGB")
        draw = random.Random(f"{self.key}/{index}")
        share = draw.uniform(self.args.crop, 1) if self.key else 1.0
        width, height = image.width * share, image.height * share
        left, top = (image.width - width) * draw.random(), (image.height - height) * draw.random()
        side, box = self.args.size, (left, top, left + width, top + height)
        pixels = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC, box)))
        pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1
        return (pixels.flip(2) if self.key and self.args.flip and draw.random() < 0.5 else pixels), label


def read_folder(folder: Path, classes: list[str]) -> list:
    """(path, class) of every image in a folder of one folder a class."""
    files = (
        (path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*"))
    )
    return [(path, label) for path, label in files if path.suffix.lower() in Image.registered_extensions()]


def load_data(name: str) -> tuple[list, list]:
    """Training and validation samples, each an image (a path or an array) and its class."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # 8 x 8 pixels, values 0 to 16
        pixels = (digits.images * (255 / 16)).astype(np.uint8)
        samples, held_out = list(zip(pixels, digits.target.tolist(), strict=True)), []
    else:
        root = Path(name) / "train" if (Path(name) / "train").is_dir() else Path(name)
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        samples, held_out = read_folder(root, classes), []
        if root.name == "train":
            held_out = read_folder(root.with_name("val"), classes)
    random.Random(0).shuffle(samples)
    random.Random(0).shuffle(held_out)
    count = 0 if held_out else len(samples) // 6
    return samples[count:], held_out or samples[:count]


def batches(count: int, size: int, key: str) -> list[list[int]]:
    """This process's share of every batch of an epoch; the last, smaller batch is left out."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return [order[start + RANK : start + size : WORLD] for start in range(0, count - size + 1, size)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases, norms, and what the model names train without weight decay."""
    exempt = getattr(model, "no_weight_decay", set)()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and name not in exempt else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def sum_over_processes(value: torch.Tensor) -> float:
    if WORLD > 1:
        dist.all_reduce(value)
    return value.item()


class Trainer:
    def __init__(self, args: argparse.Namespace, training: list, validation: list) -> None:
        self.args, self.training, self.validation = args, training, validation
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        torch.manual_seed(args.seed)
        classes = 1 + max(label for _, label in (*training, *validation))
        extra = {key: ast.literal_eval(value) for key, value in (a.split("=", 1) for a in args.model_args)}
        self.model = models.create_model(args.model, num_classes=classes, **extra)
        self.model.to(self.device, memory_format=torch.channels_last)
        for name in getattr(self.model, "unused_parameters", set)():
            self.model.get_parameter(name).requires_grad_(False)  # else DDP would wait for their gradients
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, args.weight_decay), args.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.autocast == "float16")
        if WORLD > 1 and self.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.parallel = nn.parallel.DistributedDataParallel(self.model) if WORLD > 1 else self.model
        self.history: list[dict[str, Any]] = []

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.args.autocast or "bfloat16")
        return torch.autocast(self.device.type, dtype, enabled=self.args.autocast is not None)

    def learning_rate(self, step: float, steps: int) -> float:
        """A linear rise over the first epochs, then half a cosine."""
        warmup = self.args.warmup * steps / self.args.epochs
        if step < warmup:
            return self.args.lr * (step + 1) / (warmup + 1)
        return self.args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def train_epoch(self, progress: Progress) -> list[float]:
        """One epoch; the loss of every batch, over all processes."""
        args, epoch, losses = self.args, len(self.history), []
        torch.manual_seed((args.seed * 10_000 + epoch) * WORLD + RANK)
        order = batches(len(self.training), args.batch_size, f"{args.seed}/{epoch}")
        data = Images(self.training, args, f"{args.seed}/{epoch}")
        task = progress.add_task(f"epoch {epoch + 1}/{args.epochs}", total=len(order), loss="")
        self.model.train()
        for images, labels in DataLoader(data, batch_sampler=order, num_workers=args.workers):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(epoch * len(order) + len(losses), args.epochs * len(order))
            with self.autocast():
                logits = self.parallel(images.to(self.device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(self.device))
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(sum_over_processes(loss.detach() / WORLD))
            progress.update(task, advance=1, loss=f"loss {losses[-1]:.4f}")
        progress.remove_task(task)
        return losses

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the validation images classified correctly."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        data = Images(self.validation[RANK::WORLD], self.args)
        for images, labels in DataLoader(data, self.args.batch_size, num_workers=self.args.workers):
            with self.autocast():
                right += (self.model(images.to(self.device)).argmax(1) == labels.to(self.device)).sum()
        return sum_over_processes(right) / max(1, len(self.validation))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="medvit_tiny", choices=models.list_models(), metavar="NAME")
    add("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="further arguments of the model")
    add("--data", default="digits", help="'digits' or a folder")
    add("--limit", type=int, help="use only that many images of each kind")
    add("--size", type=int, default=224, help="side that images are resized to")
    add("--crop", type=float, default=0.8, help="smallest share of a side in a random crop; 1: no crops")
    add("--flip", action="store_true", help="mirror images at random")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.5, help="epochs over which the learning rate rises")
    add("--weight-decay", type=float, default=0.05)
    add("--autocast", choices=["bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that load images, for each that trains")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--checkpoint", type=Path, help="file written after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint, if it exists")
    add("--history", type=Path, help="file of losses and accuracies, one line of JSON an epoch")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.batch_size % WORLD:
        parser.error(
            f"--batch-size: expected a positive multiple of the processes, {WORLD}; got {args.batch_size}"
        )
    for name in ("size", "epochs", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1; got {getattr(args, name)}")
    if not 0 < args.crop <= 1:
        parser.error(f"--crop: expected a share above 0 and at most 1; got {args.crop}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected one that is there; got 'cuda', but torch finds no CUDA device")
    if bad := [argument for argument in args.model_args if "=" not in argument]:
        parser.error(f"--model-args: expected KEY=VALUE; got {bad[0]!r}")
    if args.data != "digits" and not Path(args.data).is_dir():
        parser.error(f"--data: expected 'digits' or a folder; got {args.data!r}")
    if args.resume and not args.checkpoint:
        parser.error("--resume: expected --checkpoint FILE beside it")
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    training, validation = (samples[: args.limit] for samples in load_data(args.data))
    if not training:
        raise SystemExit(f"--data: expected a folder of images a class in {args.data!r}; got no image")
    if len(training) < args.batch_size:
        raise SystemExit(f"--batch-size: expected at most {len(training)}, the images to train on")
    trainer = Trainer(args, training, validation)
    if args.resume and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=trainer.device, weights_only=True)
        for part in STATEFUL:
            getattr(trainer, part).load_state_dict(state[part])
        trainer.history = state["history"]
    size = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    console = Console(quiet=RANK != 0, highlight=False)
    images = f"{len(training)} + {len(validation)} images"
    console.print(f"{args.model}, {size:.1f} M parameters, {WORLD} x {args.device}, {images}", soft_wrap=True)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[loss]}"
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        while len(trainer.history) < args.epochs:
            start = time.perf_counter()
            losses, accuracy = trainer.train_epoch(progress), trainer.accuracy()
            seconds, mean = time.perf_counter() - start, sum(losses) / len(losses)
            trainer.history.append({"losses": losses, "accuracy": accuracy, "seconds": seconds})
            done = f"epoch {len(trainer.history)}/{args.epochs}"
            progress.print(f"{done}: loss {mean:.4f}, validation accuracy {accuracy:.2%}, {seconds:.0f} s")
            if RANK == 0 and args.checkpoint:
                partial = args.checkpoint.with_name(args.checkpoint.name + ".partial")
                state = {part: getattr(trainer, part).state_dict() for part in STATEFUL}
                torch.save({**state, "history": trainer.history}, partial)
                partial.replace(args.checkpoint)  # a run stopped meanwhile leaves the old one whole
            if RANK == 0 and args.history:
                args.history.write_text("".join(json.dumps(entry) + "\n" for entry in trainer.history))
    if WORLD > 1:
        # Gloo's threads need the GIL to let go of the last reduction's tensors, and its destructor, which waits for
        # them, may run with the GIL held (pytorch/pytorch#56297): they have let go once all have met here.
        dist.barrier()
        dist.destroy_process_group()
    return trainer.history


if __name__ == "__main__":
    main()
