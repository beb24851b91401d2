"""How much of which layer goes: LPViT's rate-distortion curves, cut at one slope (Xu et al., ECCV 2024).

A layer's curve D(a) is the second-order estimate of what pruning the share a of its blocks, those of the lowest
score, does to the output::

    D(a) = mean((dw g)^2) + 1/2 dw^T (g g^T + 1e-7) dw,      dw = -w at the pruned elements, 0 elsewhere

and the layers minimise D + beta P together, P being the hardware's cost of what remains. Where this departs from
the published code as coded:

- P falls with pruning, (1 - a) times the layer's cost. There it is a times the cost, so that expensive layers are
  spared instead of pruned first.
- beta is what the bisection finds for the target. There beta is fixed beforehand by the curves' steepest slopes,
  which lie at their far ends and outweigh D elsewhere, and a slope common to all layers is bisected beside it.
- D is exact at every level: its terms are sums over the pruned blocks. There it is accumulated from level to level
  with the new dw in the place of the previous one.
- The slope that a layer stops at is the largest up to there. There it is the closest one, of which a curve that is
  not convex has several, and a lower target may keep more of a layer.
- The slope's window is even throughout. There it is 3 at two levels near the ends, for which the formula of five
  points gives 5/9 of the slope.
- The share that a layer keeps at least is min(0.05, target / 2), so that every target from 2 % on is in reach. There it
  is min(0.05, (1 - target) / 2). One block stays in any case.
- Only the layers asked for, all of them `nn.Linear`, are in the sums, with their own numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkernels.sparsity.criterion import Blocks

LEVELS = 100
DAMPING = 1e-7


@dataclass(frozen=True)
class Layer:
    """What the allocation knows of a layer.

    Attributes:
        order: its blocks by rising score.
        kept: elements that remain at each of the LEVELS + 1 levels of pruning.
        slope: of the distortion at each level, never falling; infinite where no block remains.
        cost: P of the whole layer.
        unit: what an element counts in the target: 1 for a density, the rows an image for FLOPs.
    """

    order: Tensor
    kept: Tensor
    slope: Tensor
    cost: float
    unit: float


def kept_blocks(blocks: int, level: int) -> int:
    """floor((1 - level / LEVELS) blocks), in integers."""
    return (LEVELS - level) * blocks // LEVELS


def describe_layer(blocks: Blocks, taylor: bool, cost: float, unit: float) -> Layer:
    order = blocks.score.flatten().argsort(stable=True)
    pruned = torch.tensor([len(order) - kept_blocks(len(order), level) for level in range(LEVELS + 1)])
    elements = _sums(blocks.elements, order, pruned)
    slope = slopes(smooth(distortion(blocks, order, pruned, taylor))).cummax(0).values
    slope[pruned == len(order)] = torch.inf
    return Layer(order, blocks.elements.sum().cpu() - elements, slope, cost, unit)


def distortion(blocks: Blocks, order: Tensor, pruned: Tensor, taylor: bool = True) -> Tensor:
    """D where the first pruned[i] blocks of the order are gone; by magnitude half the energy that is gone."""
    energy = _sums(blocks.energy, order, pruned)
    if not taylor:
        return energy / 2
    linear, square = _sums(blocks.linear, order, pruned), _sums(blocks.square, order, pruned)
    return square / blocks.elements.sum().cpu() + (linear.square() + DAMPING * energy) / 2


def _sums(values: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    running = values.flatten()[order].cumsum(0).cpu()
    return torch.cat([running.new_zeros(1), running])[counts]


def smooth(curve: Tensor, weight: float = 0.5) -> Tensor:
    """Exponential moving average along the curve, without the bias of its start."""
    average, out = 0.0, []
    for i, value in enumerate(curve.tolist()):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight ** (i + 1)))
    return torch.tensor(out, dtype=torch.float64)


def slopes(curve: Tensor, window: int = 4) -> Tensor:
    """Derivative in the share a = i / LEVELS: five points, fewer at the ends."""
    y, last = curve.tolist(), len(curve) - 1
    out = []
    for i in range(len(y)):
        h = min(window, i, last - i)
        if h >= 2:
            h -= h % 2
            half = h // 2
            out.append((-y[i + h] + 8 * y[i + half] - 8 * y[i - half] + y[i - h]) / (6 * h))
        elif i < 2:
            out.append(y[i + 1] - y[i])
        else:
            ahead = min(i + 1, last)
            out.append((y[ahead] - y[i - 1]) / (ahead - i + 1))
    return torch.tensor(out, dtype=torch.float64) * LEVELS


def allocate(layers: Mapping[str, Layer], target: float, fixed: float = 0.0) -> dict[str, int]:
    """The level of every layer at the smallest beta that brings what remains to at most the share `target`.

    A layer's level is the last one whose slope is at most beta * cost, so a larger beta prunes no layer less. What is
    bisected is the list of the betas at which any layer reaches any level. Levels that are reached at one beta
    together, as those behind a steep place of a curve are, are taken one by one as far as the target needs them.

    Args:
        target: share of the units of all elements that may remain.
        fixed: units that remain whatever is pruned; they count in the whole.

    Returns:
        levels by layer; all at their last where the target is out of reach.
    """
    last = last_level(target)
    betas = torch.stack([layer.slope[1 : last + 1] / layer.cost for layer in layers.values()]).flatten()
    savings = torch.stack(
        [-layer.kept[: last + 1].diff() * layer.unit for layer in layers.values()]
    ).flatten()
    order = betas.argsort(stable=True)  # stable: a layer's levels stay in order
    order = order[betas[order].isfinite()]
    saved = torch.cat([savings.new_zeros(1), savings[order].cumsum(0)])
    whole = fixed + sum(float(layer.kept[0]) * layer.unit for layer in layers.values())
    # The rounding of the sums must not cost a level more than the target needs.
    steps = int(torch.searchsorted(saved, (1 - target) * whole * (1 - 1e-12)))
    levels = torch.bincount(order[:steps] // last, minlength=len(layers))
    return dict(zip(layers, levels.tolist(), strict=True))


def last_level(target: float) -> int:
    """The level that no layer is pruned beyond."""
    return min(int(LEVELS * (1 - min(0.05, target / 2))), LEVELS - 1)


def lowest_density(elements: Sequence[Tensor], target: float) -> float:
    """A share of the elements that no pruning to the target goes below, whatever the scores are.

    Args:
        elements: of each layer, the number of elements in each of its blocks.
    """
    remaining = whole = 0.0
    for counts in elements:
        kept = max(1, kept_blocks(counts.numel(), last_level(target)))
        remaining += counts.flatten().sort().values[:kept].sum().item()
        whole += counts.sum().item()
    return remaining / whole


def keep_mask(layer: Layer, level: int, shape: torch.Size) -> Tensor:
    """Which blocks remain, [block rows, block columns]."""
    keep = torch.zeros(len(layer.order), dtype=torch.bool, device=layer.order.device)
    keep[layer.order[len(layer.order) - kept_blocks(len(layer.order), level) :]] = True
    return keep.view(shape)
