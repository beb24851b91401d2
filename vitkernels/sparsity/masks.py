"""The masks of LPViT's pruning step: a dict of `<module>.weight_mask`, dense 0 and 1 in the weight's shape."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.core.checks import fail
from vitkernels.nn.block_sparse_linear import block_sums

SUFFIX = ".weight_mask"
# From the largest, the fastest, down.
BLOCK_SHAPES = ((128, 128), (64, 64), (64, 32), (32, 64), (32, 32), (16, 16))


def read_masks(masks: Any, model: nn.Module) -> dict[str, Tensor]:
    """Module name -> mask [out, in] or [out, in, h, w], checked against the model's modules.

    Entries of other names, as the weights in a fine-tuned checkpoint, are passed over.
    """
    if isinstance(masks, (str, os.PathLike)):
        masks = torch.load(masks, map_location="cpu", weights_only=True)
    for entry in ("model_ema", "model", "state_dict"):
        if isinstance(masks, Mapping) and isinstance(masks.get(entry), Mapping):
            masks = masks[entry]
            break
    if not isinstance(masks, Mapping):
        fail("masks", "a file or a dict of `<module>.weight_mask`", masks, kind=TypeError)
    modules, found = dict(model.named_modules()), {}
    for key, mask in masks.items():
        if not key.endswith(SUFFIX):
            continue
        name = key.removesuffix(SUFFIX).removeprefix("module.")
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            kind = "no module" if module is None else f"a {type(module).__name__}"
            fail("masks", f"a Linear or Conv2d of {type(model).__name__} under the name {name!r}", kind)
        elif not isinstance(mask, Tensor) or mask.shape != module.weight.shape:
            fail("masks", f"{key} in the weight's shape {list(module.weight.shape)}", mask)
        elif not ((mask == 0) | (mask == 1)).all():
            fail("masks", f"{key} of 0 and 1", mask)
        found[name] = mask
    if not found:
        fail("masks", "at least one entry `<module>.weight_mask`", sorted(masks)[:8])
    return found


def block_mask(mask: Tensor, block_shape: tuple[int, int]) -> Tensor | None:
    """Which blocks a mask keeps, [block rows, block columns]; None where it is not constant inside each block."""
    flat = mask.flatten(1)
    kept = block_sums(flat, block_shape)
    whole = kept == block_sums(torch.ones_like(flat), block_shape)
    return whole if (whole | (kept == 0)).all() else None


def block_shape_of(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """The largest block shape inside whose blocks all of the masks are constant."""
    for shape in BLOCK_SHAPES:
        if all(block_mask(mask, shape) is not None for mask in masks.values()):
            return shape
    shapes = ", ".join(f"{bh}x{bw}" for bh, bw in BLOCK_SHAPES)
    fail("masks", f"masks constant inside blocks of one of {shapes}", sorted(masks)[:8])
    raise AssertionError  # fail raises
