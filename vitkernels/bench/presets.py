"""What published models hand to their token mixers at their usual input size.

The cases of all operators draw their shapes from here, so that one preset name means one model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowStage:
    """A stage of a model with windowed attention."""

    windows: int  # per image
    window: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    bias: str  # "absolute": table over (|dy|, |dx|); "signed": table over (dy, dx)
    layout: str  # "map": tokens are the dense axis of an NCHW map; "packed": slices of one qkv projection


def _efficientvit(value_dims: tuple[int, int, int]) -> tuple[WindowStage, ...]:
    # The cascade attends with one head at a time. 224 px: maps of 14 (2 x 2 windows of 7), 7 and 4.
    sides, windows = (7, 7, 4), (4, 1, 1)
    return tuple(
        WindowStage(count, (side, side), 1, 16, value_dim, "absolute", "map")
        for side, count, value_dim in zip(sides, windows, value_dims, strict=True)
    )


def _swin(heads: tuple[int, ...]) -> tuple[WindowStage, ...]:
    # 224 px: maps of 56, 28, 14, 7 in windows of 7; head dimension 32 throughout.
    windows = (64, 16, 4, 1)
    return tuple(
        WindowStage(count, (7, 7), stage_heads, 32, 32, "signed", "packed")
        for count, stage_heads in zip(windows, heads, strict=True)
    )


def _tinyvit(heads: tuple[int, int, int]) -> tuple[WindowStage, ...]:
    # 224 px, the three attention stages: maps of 28 (windows of 7), 14 (one window of 14), 7.
    windows, sides = (16, 1, 1), (7, 14, 7)
    return tuple(
        WindowStage(count, (side, side), stage_heads, 32, 32, "absolute", "packed")
        for count, side, stage_heads in zip(windows, sides, heads, strict=True)
    )


WINDOW_MODELS: dict[str, tuple[WindowStage, ...]] = {
    "efficientvit_m0": _efficientvit((16, 32, 48)),
    "efficientvit_m1": _efficientvit((64, 48, 64)),
    "efficientvit_m2": _efficientvit((32, 64, 112)),
    "efficientvit_m3": _efficientvit((32, 80, 80)),
    "efficientvit_m4": _efficientvit((32, 64, 96)),
    "efficientvit_m5": _efficientvit((64, 96, 96)),
    "swin_t": _swin((3, 6, 12, 24)),
    "tinyvit_5m": _tinyvit((4, 5, 10)),
    "tinyvit_21m": _tinyvit((6, 12, 18)),
}


@dataclass(frozen=True)
class MixerStage:
    """A stage of a model with cascaded group attention."""

    size: tuple[int, int]  # of the map
    channels: int
    window: int
    kernel_sizes: tuple[int, ...]  # one a head
    key_dim: int = 16

    @property
    def heads(self) -> int:
        return len(self.kernel_sizes)


def _mixers(
    channels: tuple[int, int, int], heads: tuple[int, int, int], kernel_sizes: tuple[int, ...]
) -> tuple[MixerStage, ...]:
    # 224 px: maps of 14, 7 and 4.
    return tuple(
        MixerStage((side, side), width, min(side, 7), kernel_sizes[:count])
        for side, width, count in zip((14, 7, 4), channels, heads, strict=True)
    )


def _detection(channels: tuple[int, int, int], kernel_sizes: tuple[int, ...]) -> tuple[MixerStage, ...]:
    # 1333 x 800 px: windows of 7 in every stage, none of which divides the map.
    return tuple(
        MixerStage(size, width, 7, kernel_sizes)
        for size, width in zip(((84, 50), (42, 25), (21, 13)), channels, strict=True)
    )


MIXER_MODELS: dict[str, tuple[MixerStage, ...]] = {
    "efficientvit_m0": _mixers((64, 128, 192), (4, 4, 4), (5, 5, 5, 5)),
    "efficientvit_m1": _mixers((128, 144, 192), (2, 3, 3), (7, 5, 3, 3)),
    "efficientvit_m2": _mixers((128, 192, 224), (4, 3, 2), (7, 5, 3, 3)),
    "efficientvit_m3": _mixers((128, 240, 320), (4, 3, 4), (5, 5, 5, 5)),
    "efficientvit_m4": _mixers((128, 256, 384), (4, 4, 4), (7, 5, 3, 3)),
    "efficientvit_m5": _mixers((192, 288, 384), (3, 3, 4), (7, 5, 3, 3)),
    "efficientvit_m4_detection": _detection((128, 256, 384), (7, 5, 3, 3)),
}


@dataclass(frozen=True)
class KanLayer:
    """A FasterKAN layer of a model."""

    rows: int  # per image
    channels: int
    outputs: int


def _medvit(widths: tuple[int, int, int]) -> tuple[KanLayer, ...]:
    # 224 px: the last block of stage 2 (28 x 28), every third of stage 3, all of stage 4 map C to 2 C and back.
    layers = []
    for side, width in zip((28, 14, 7), widths, strict=True):
        layers += [KanLayer(side * side, width, 2 * width), KanLayer(side * side, 2 * width, width)]
    return tuple(layers)


KAN_MODELS: dict[str, tuple[KanLayer, ...]] = {
    "medvit_tiny": _medvit((128, 192, 384)),
    "medvit_small": _medvit((128, 256, 512)),
    "medvit_base": _medvit((192, 384, 768)),
    "medvit_large": _medvit((256, 512, 1024)),
}


@dataclass(frozen=True)
class NeighborhoodLayer:
    """A layer of neighborhood attention and the map it sees."""

    sizes: tuple[int, ...]
    heads: int
    head_dim: int
    value_dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    rpb: bool = True
    is_causal: bool = False


def _maps(
    heads: tuple[int, ...],
    dilations: tuple[tuple[int, ...], ...],
    sides: tuple[int, ...] = (56, 28, 14, 7),
    rpb: bool = True,
) -> dict[str, NeighborhoodLayer]:
    # One layer of each dilation that a stage has; kernel 7 and head dimension 32 throughout.
    return {
        f"stage {stage}" + (f" d{d}" if d > 1 else ""): NeighborhoodLayer(
            (side, side), count, 32, 32, (7, 7), (d, d), rpb
        )
        for stage, (side, count, steps) in enumerate(zip(sides, heads, dilations, strict=False), 1)
        for d in steps
    }


_NAT_HEADS = {
    "mini": (2, 4, 8, 16),
    "tiny": (2, 4, 8, 16),
    "small": (3, 6, 12, 24),
    "base": (4, 8, 16, 32),
    "large": (6, 12, 24, 48),
}
_DINAT_STEPS = ((1, 8), (1, 4), (1, 2), (1,))
_MEDVIT_HEADS = {"tiny": (2, 4, 6), "small": (2, 4, 8), "base": (3, 6, 12), "large": (3, 8, 16)}

NEIGHBORHOOD_MODELS: dict[str, dict[str, NeighborhoodLayer]] = {
    # MedViTV2's released models attend without dilation, and not at all in stage 4.
    **{f"medvit_{size}": _maps(heads, ((1,),) * 3) for size, heads in _MEDVIT_HEADS.items()},
    **{f"nat_{size}": _maps(heads, ((1,),) * 4) for size, heads in _NAT_HEADS.items() if size != "large"},
    **{f"dinat_{size}": _maps(heads, _DINAT_STEPS) for size, heads in _NAT_HEADS.items()},
    # natten has had no bias since 0.20; these are for a comparison with it.
    **{
        f"dinat_{size}_no_bias": _maps(_NAT_HEADS[size], _DINAT_STEPS, rpb=False)
        for size in ("mini", "large")
    },
    "dinat_large_384": _maps(_NAT_HEADS["large"], ((1, 13), (1, 6), (1, 3), (1,)), (96, 48, 24, 12)),
}


@dataclass(frozen=True)
class PolylineStage:
    """A stage of a model with polyline path attention."""

    size: tuple[int, int]  # of the map
    heads: int
    head_dim: int
    whole: bool  # over all pairs of tokens; else within rows and columns


def _ppma(sizes: tuple[tuple[int, int], ...], heads: tuple[int, ...], whole: int) -> dict[str, PolylineStage]:
    # Head dimension 16 in the first stage, 32 in the others; the last `whole` stages attend to all tokens.
    return {
        f"stage {i + 1}": PolylineStage(size, count, 16 if i == 0 else 32, i >= 4 - whole)
        for i, (size, count) in enumerate(zip(sizes, heads, strict=True))
    }


_PPMA_224 = ((56, 56), (28, 28), (14, 14), (7, 7))
_PPMA_512 = ((128, 128), (64, 64), (32, 32), (16, 16))
_PPMA_DETECTION = ((200, 336), (100, 168), (50, 84), (25, 42))  # 800 x 1344 px
_PPMA_1024 = ((256, 256), (128, 128), (64, 64), (32, 32))

PPMA_MODELS: dict[str, dict[str, PolylineStage]] = {
    "ppma_t": _ppma(_PPMA_224, (4, 4, 8, 16), 2),
    "ppma_s": _ppma(_PPMA_224, (4, 4, 8, 16), 1),
    "ppma_b": _ppma(_PPMA_224, (5, 5, 10, 16), 1),
    "ppma_t_512": _ppma(_PPMA_512, (4, 4, 8, 16), 2),
    "ppma_t_detection": _ppma(_PPMA_DETECTION, (4, 4, 8, 16), 2),
    "ppma_t_1024": _ppma(_PPMA_1024, (4, 4, 8, 16), 2),
}


@dataclass(frozen=True)
class MergingModel:
    """A transformer that merges r tokens in each block."""

    tokens: int
    channels: int
    heads: int
    r: int
    depth: int
    class_token: bool = True


MERGING_MODELS: dict[str, MergingModel] = {
    "deit_s": MergingModel(197, 384, 6, 13, 12),
    "vit_b": MergingModel(197, 768, 12, 16, 12),
    "vit_l_384": MergingModel(577, 1024, 16, 23, 24),
    "vit_h_518": MergingModel(1370, 1280, 16, 40, 32),
    # The first level of Stable Diffusion 1.5 merges half of its tokens, and brings them back after the attention.
    "sd_512": MergingModel(4096, 320, 8, 2048, 1, class_token=False),
    "sd_1024": MergingModel(16384, 320, 8, 8192, 1, class_token=False),
}
