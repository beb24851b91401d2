"""What the polyline mask costs a whole PPMA: the network, and the same network with plain attention in its place.

    python benchmarks/ppma_mask_cost.py --model ppma_t --batch 1 8

Plain attention is what remains with all decays fixed at zero: one softmax over the map, or one over the rows and one
over the columns, by whichever of PyTorch's ways is faster. No decay is computed. Each network is first held to the
reference of its own function in float64, then they take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vitkernels
from vitkernels import info, models
from vitkernels.bench import gate, outputs, report, timing
from vitkernels.bench.host_model import clone, plain
from vitkernels.nn.polyline_path_attention import PolylinePathAttention, rotate, rotation_of

Attend = Callable[[torch.Tensor], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, scale: float) -> Attend:
    """Values to outputs, over the last axis but one, by PyTorch's fused attention."""
    return lambda values: F.scaled_dot_product_attention(q, k, values, scale=scale)


def matmuls(q: torch.Tensor, k: torch.Tensor, scale: float) -> Attend:
    """The same with the probabilities in memory: criss-cross attention needs each of them twice."""
    probabilities = (q * scale @ k.transpose(-1, -2)).softmax(-1)
    return lambda values: probabilities @ values


class PlainAttention(PolylinePathAttention):
    """The layer without decays."""

    way: Callable[[torch.Tensor, torch.Tensor, float], Attend]

    def forward(self, x: torch.Tensor, rel_pos: Any = None) -> torch.Tensor:
        q, k, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        local = self.lepe(values)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, values))
        table = rotation_of(rel_pos, x, self.head_dim)
        q, k = rotate(q, table), rotate(k, table)
        if self.mode == "whole":
            q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
            out = self.way(q, k, self.scaling)(v).transpose(1, 2).reshape(x.shape)
        else:
            along = self.way(*(t.transpose(2, 3) for t in (q, k)), self.scaling)
            down = self.way(*(t.permute(0, 2, 3, 1, 4) for t in (q, k)), self.scaling)

            def rows(values: torch.Tensor) -> torch.Tensor:
                return along(values.transpose(2, 3)).transpose(2, 3)

            def columns(values: torch.Tensor) -> torch.Tensor:
                return down(values.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)

            out = (0.5 * columns(rows(v)) + 0.5 * rows(columns(v))).reshape(x.shape)
        return self.out_proj(out + local)


def without_mask(model: nn.Module, way: Any) -> nn.Module:
    twin = clone(model)
    for module in twin.modules():
        if isinstance(module, PolylinePathAttention):
            module.__class__ = type("PlainAttention", (PlainAttention,), {"way": staticmethod(way)})
    return twin


def with_zero_decays(model: nn.Module) -> nn.Module:
    twin = clone(model)
    for module in twin.modules():
        if isinstance(module, PolylinePathAttention):
            nn.init.constant_(module.path_embed.A_log, float("-inf"))
    return twin


def networks(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each network, and one that computes its function by the reference."""
    bare = plain(with_zero_decays(model))
    applied = clone(model)
    vitkernels.apply(applied, verbose=False)
    return {
        "vitkernels": (model, plain(model)),
        "vitkernels, norms folded": (applied, plain(model)),
        "eager reference": (plain(model), plain(model)),
        "no mask, SDPA": (without_mask(model, sdpa), bare),
        "no mask, matmuls": (without_mask(model, matmuls), bare),
    }


def held_to_the_truth(network: nn.Module, reference: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        truth = clone(reference, torch.float64)(images.double())
        verdict = gate.check("logits", network(images), reference(images), truth, factor=gate.FORWARD_FACTOR)
    if not verdict.ok:
        raise SystemExit(f"WRONG: {verdict}")


def step_of(network: nn.Module, images: torch.Tensor, mode: str) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            network(images)

    def both() -> None:
        network.zero_grad()
        network(images).sum().backward()

    return forward if mode == "fwd" else both


def main(argv: list[str] | None = None) -> dict[tuple[int, str], dict[str, timing.Timing]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="ppma_t", choices=["ppma_t", "ppma_s", "ppma_b"])
    add("--size", type=int, nargs="+", default=[224], help="side, or height and width")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--mode", nargs="+", choices=["fwd", "fwd+bwd"], default=["fwd"])
    add("--networks", nargs="+", help="only these, beside 'vitkernels'")
    add("--seconds", type=float, default=3.0, help="CPU time of each network")
    add("--json", type=Path, metavar="F", help="environment, settings and times")
    args = parser.parse_args(argv)
    if min(args.batch) < 1:
        parser.error(f"--batch: expected positive numbers; got {args.batch}")
    if len(args.size) > 2 or min(args.size) < 1:
        parser.error(f"--size: expected one or two positive numbers; got {args.size}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds: expected a positive number; got {args.seconds}")
    try:
        outputs.check("json", args.json)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    model = models.create_model(args.model).eval()
    chosen = networks(model)
    if args.networks:
        if unknown := sorted({*args.networks} - {*chosen}):
            parser.error(f"--networks: expected some of {', '.join(chosen)}; got {', '.join(unknown)}")
        wanted = ("vitkernels", *args.networks)
        chosen = {name: pair for name, pair in chosen.items() if name in wanted}
    if note := timing.busy():
        print(note)
    results, rows = {}, []
    for batch in args.batch:
        images = torch.randn(batch, 3, args.size[0], args.size[-1])
        for network, reference in chosen.values():
            held_to_the_truth(network, reference, images[:1])
        for mode in args.mode:
            steps = {name: step_of(network, images, mode) for name, (network, _) in chosen.items()}
            times = results[batch, mode] = timing.time_on_cpu(steps, seconds=args.seconds)
            bare = [t.median for name, t in times.items() if name.startswith("no mask")]
            print(f"{args.model}, batch {batch}, {mode}, {torch.get_num_threads()} threads")
            for name, t in times.items():
                share = f"{t.median / min(bare):6.2f} x no mask" if bare else ""
                spread = f"({t.p20 * 1e3:.1f} .. {t.p80 * 1e3:.1f})"
                print(f"  {name:26s} {t.median * 1e3:8.1f} ms {spread:20s} {share}")
                rows.append({"network": name, "batch": batch, "mode": mode, **dataclasses.asdict(t)})
    if args.json:
        settings = {**vars(args), "json": str(args.json), "busy": note, "threads": torch.get_num_threads()}
        content = report.document((), (), info.collect(), None, settings)
        report.write_json(args.json, {**content, "rows": rows})
    return results


if __name__ == "__main__":
    main()
