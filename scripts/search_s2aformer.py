#!/usr/bin/env python3
"""Widths, depths and heads of the S2AFormer-shaped models: the search that found those of vitkernels.models.

    python scripts/search_s2aformer.py

The paper publishes numbers of parameters and of multiply-accumulates (MACs) of five sizes, at 224 and 256 pixels a
side, and no table of the layers. This enumerates regular networks, counts both, and keeps those within 3 % of every
published number, MACs counted with and without the attention's products (profilers differ in that). Of the families
whose members do not get narrower or shallower with size it prints the one whose largest deviation is smallest.
Deterministic; the counts are checked against the modules by tests/models/test_s2aformer.py.

What every candidate has: heads of one width, that of the first stage, a multiple of 8; widths in ratios of CMT, PVT and
their like; depths that do not fall over the first three stages; reductions 8, 4, 2 and 1; and what
vitkernels/models/s2aformer.py says of stem, patch embeddings, blocks and head. What one family shares: the ratio of the
MLPs, whether there is a projection in front of the classifier, whether the stem is as wide as the first stage or half.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

# Parameters in millions, MACs in billions at 224 and at 256, of the paper's tables.
PUBLISHED = {
    "s2aformer_mini": (5.02, 0.430, 0.560),
    "s2aformer_t": (5.80, 0.655, 0.855),
    "s2aformer_xs": (6.54, 0.786, 1.03),
    "s2aformer_s": (10.69, 1.38, 1.80),
    "s2aformer_m": (24.87, 4.12, 5.38),
}
TOLERANCE = 0.03
REDUCTIONS = (8, 4, 2, 1)
CLASSES = 1000

HEADS = (
    (1, 2, 4, 8),
    (1, 2, 5, 8),
    (1, 2, 4, 10),
    (1, 2, 5, 10),
    (1, 2, 4, 12),
    (1, 2, 5, 12),
    (1, 2, 6, 12),
    (1, 3, 6, 12),
)
HEAD_DIMS = range(16, 81, 8)
DEPTHS = [
    depths
    for depths in itertools.product(range(1, 4), range(1, 5), range(2, 17), range(1, 5))
    if depths[0] <= depths[1] <= depths[2]
]


@dataclass(frozen=True)
class Family:
    """What the members of a family share."""

    mlp_ratio: int
    projection: int  # 0: none
    narrow_stem: bool


@dataclass(frozen=True)
class Count:
    """Parameters, MACs of convolutions and linear layers, and MACs of the attention's products."""

    parameters: int
    layers: int
    attention: int

    @property
    def macs(self) -> int:
        return self.layers + self.attention

    def __add__(self, other: Count) -> Count:
        return Count(
            self.parameters + other.parameters, self.layers + other.layers, self.attention + other.attention
        )

    def __mul__(self, times: int) -> Count:
        return Count(self.parameters * times, self.layers * times, self.attention * times)


def linear(tokens: int, before: int, after: int) -> Count:
    """A linear layer or convolution with bias, `before` inputs to each output."""
    return Count(before * after + after, tokens * before * after, 0)


def norm(width: int) -> Count:
    return Count(2 * width, 0, 0)


def block(side: int, width: int, heads: int, reduction: int, mlp_ratio: int) -> Count:
    """A hybrid perception block on a square map, with the defaults of its class."""
    tokens, keys = side**2, (side // reduction) ** 2
    # Three depthwise 3 x 3 convolutions, LIM's batch norm, three layer norms.
    total = linear(tokens, 9, width) * 3 + norm(width) * 4
    if reduction > 1:
        total += linear(keys, reduction**2, width) + norm(width)
    total += linear(tokens, width, heads) + linear(keys, width, heads) + linear(keys, width, width)
    total += Count(0, 0, tokens * keys * (heads + width)) + linear(tokens, width, width)
    return total + linear(tokens, width, mlp_ratio * width) + linear(tokens, mlp_ratio * width, width)


def parts(
    widths: tuple[int, ...], heads: tuple[int, ...], family: Family, size: int
) -> tuple[Count, list[Count]]:
    """What a network has but for its blocks, and the block of each stage; sizes are multiples of 32."""
    width = widths[0] // 2 if family.narrow_stem else widths[0]
    rest = Count(0, 0, 0)
    for before in (3, width, width):
        rest += linear((size // 2) ** 2, 9 * before, width) + norm(width)
    blocks = []
    for stage, dim in enumerate(widths):
        side = size // (4 << stage)
        rest += linear(side**2, 4 * width, dim) + norm(dim)
        blocks.append(block(side, dim, heads[stage], REDUCTIONS[stage], family.mlp_ratio))
        width = dim
    rest += norm(width)
    if family.projection:
        rest += linear(1, width, family.projection)
        width = family.projection
    return rest + linear(1, width, CLASSES), blocks


def count(
    widths: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], family: Family, size: int
) -> Count:
    """All of a network at an image of that size."""
    total, blocks = parts(widths, heads, family, size)
    for depth, one in zip(depths, blocks, strict=True):
        total += one * depth
    return total


@dataclass(frozen=True)
class Candidate:
    worst: float  # of the deviations
    deviations: tuple[float, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]

    def may_precede(self, larger: Candidate) -> bool:
        wider = all(a <= b for a, b in zip(self.widths, larger.widths, strict=True))
        return wider and sum(self.depths) <= sum(larger.depths)


def candidates(name: str, family: Family) -> Iterator[Candidate]:
    parameters, *billions = PUBLISHED[name]
    for head_dim, heads in itertools.product(HEAD_DIMS, HEADS):
        widths = tuple(head_dim * n for n in heads)
        small, large = (parts(widths, heads, family, size) for size in (224, 256))
        rows = []
        for (rest, blocks), published in zip((small, large), billions, strict=True):
            for kind in ("macs", "layers"):
                rows.append(
                    [getattr(part, kind) / (published * 1e9) for part in (rest, *blocks)],
                )
        rows.insert(0, [part.parameters / (parameters * 1e6) for part in (small[0], *small[1])])
        for depths in DEPTHS:
            deviations = []
            for rest, *blocks in rows:
                deviations.append(rest + sum(map(float.__mul__, blocks, map(float, depths))) - 1)
                if abs(deviations[-1]) > TOLERANCE:
                    break
            else:
                worst = max(map(abs, deviations))
                yield Candidate(worst, tuple(deviations), widths, depths, heads)


def best(family: Family) -> list[Candidate] | None:
    """The family's members from small to large, or None where a size has no candidate."""
    chains: list[tuple[float, list[Candidate]]] = [(0.0, [])]
    for name in PUBLISHED:
        longer = []
        for candidate in candidates(name, family):
            before = [chain for chain in chains if not chain[1] or chain[1][-1].may_precede(candidate)]
            if before:
                worst, members = min(before, key=lambda chain: (chain[0], sum(c.worst for c in chain[1])))
                longer.append((max(worst, candidate.worst), [*members, candidate]))
        chains = longer
    return min(chains, key=lambda chain: (chain[0], sum(c.worst for c in chain[1])))[1] if chains else None


FAMILIES = [Family(*choice) for choice in itertools.product((3, 4), (0, 1280), (True, False))]


def search() -> tuple[Family, list[Candidate]]:
    found = [(family, members) for family in FAMILIES if (members := best(family))]
    return min(found, key=lambda pair: max(member.worst for member in pair[1]))


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    family, members = search()
    print(family)
    print("deviation in %: parameters, MACs at 224, without attention's products, both at 256")
    for name, member in zip(PUBLISHED, members, strict=True):
        deviations = " ".join(f"{100 * deviation:+.1f}" for deviation in member.deviations)
        print(f"{name}: widths {member.widths} depths {member.depths} heads {member.heads}: {deviations}")


if __name__ == "__main__":
    main()
