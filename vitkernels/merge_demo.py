"""``python -m vitkernels merge``: the tokens that a DeiT merges, drawn over a photograph."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vitkernels

DESCRIPTION = """\
Runs a DeiT with vitkernels.apply(model, token_merging=r) on a photograph, and draws each token that is left
as the patches that it is made of, in their mean color. Nothing is downloaded: without --weights the network
is random, and merges what its random keys find alike."""

SIZE, PATCH = 224, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, help="a photograph of yours (default: scikit-image's cat)")
    parser.add_argument(
        "--model", choices=["small", "base"], default="small", help="of DeiT (default: small)"
    )
    parser.add_argument("--weights", type=Path, help="a file of timm's or the official deit_*_patch16_224")
    parser.add_argument("--r", type=int, default=13, help="tokens merged in each block (default: 13)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("merged_tokens.png"),
        metavar="PLOT",
        help="default: merged_tokens.png",
    )


def paint(photo: Tensor, source: Tensor) -> Tensor:
    """The photograph `[3, H, W]` with every group of patches in its mean color, edged in white.

    Args:
        source: the group of each patch, `[rows, columns]`.
    """
    rows, columns = source.shape
    height, width = photo.shape[1] // rows, photo.shape[2] // columns
    patches = F.avg_pool2d(photo, (height, width)).flatten(1)
    groups = source.flatten().long()
    ones = torch.ones(len(groups))
    count = torch.zeros(int(groups.max()) + 1).index_add_(0, groups, ones)
    colors = torch.zeros(3, len(count)).index_add_(1, groups, patches) / count.clamp_min(1)
    whole = source.repeat_interleave(height, 0).repeat_interleave(width, 1).long()
    painted = colors[:, whole]
    edge = torch.zeros(whole.shape, dtype=torch.bool)
    edge[1:] |= whole[1:] != whole[:-1]
    edge[:, 1:] |= whole[:, 1:] != whole[:, :-1]
    return torch.where(edge, torch.ones(()), painted)


def execute(args: argparse.Namespace) -> int:
    from vitkernels.bench.extras import require

    require("matplotlib", "PIL")
    from vitkernels.bench.outputs import check_plot
    from vitkernels.bench.photo import center_crop, load_photo, normalize
    from vitkernels.bench.plot import plt

    check_plot("output", args.output)
    photo, origin = load_photo(args.image)
    shown = center_crop(photo, SIZE)
    torch.manual_seed(0)
    options: dict[str, Any] = {"density": 1.0, "weights": args.weights}
    model: Any = vitkernels.models.create_model(f"deit_{args.model}_bsr", **options).eval()
    if args.r < 1:
        raise ValueError(f"r: expected at least one token; got {args.r}")
    print(vitkernels.apply(model, token_merging=args.r, trace_source=True, verbose=False))
    with torch.no_grad():
        left = model.forward_features(normalize(shown[None])).shape[1]
    side = SIZE // PATCH
    source = vitkernels.merged_source(model)[0, 1:].view(side, side)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for axis, picture in zip(axes, (shown, paint(shown, source)), strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_axis_off()
    axes[0].set_title(f"{side * side + 1} tokens", fontsize=9, loc="left")
    axes[1].set_title(f"{left} tokens after the last block, r = {args.r}", fontsize=9, loc="left")
    figure.suptitle(f"DeiT-{args.model}, {'random weights' if args.weights is None else args.weights.name}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)
    plt.close(figure)
    print(f"photo {origin}; picture written to {args.output}")
    return 0


def run(args: argparse.Namespace) -> int:
    from vitkernels.bench.extras import MissingExtra

    try:
        return execute(args)
    except (MissingExtra, ValueError, OSError) as error:
        print(f"vitkernels merge: {error}", file=sys.stderr)
        return 2
