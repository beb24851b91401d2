"""A real photograph and augmented crops of it, as the networks' input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkernels.bench.extras import MissingExtra

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load_photo(path: str | os.PathLike[str] | None = None) -> tuple[Tensor, str]:
    """``[3, H, W]`` in 0..1 and its origin. Without a path: one that scikit-image or scikit-learn ship.

    Raises:
        MissingExtra: no path, and neither package is installed.
        ValueError: the path is not a readable image.
    """
    if path is not None:
        pixels, source = _read(Path(path)), str(path)
    else:
        pixels, source = _shipped()
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255, source


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))  # a copy: PyTorch warns of memory that it may not write
    except OSError as error:
        raise ValueError(f"image: expected a readable image file; got {str(path)!r} ({error})") from error


def _shipped() -> tuple[np.ndarray, str]:
    try:
        from skimage import data

        return data.chelsea(), "scikit-image's photograph of the cat Chelsea (CC0)"
    except ImportError:
        pass
    try:
        from sklearn.datasets import load_sample_image

        return load_sample_image("china.jpg"), "scikit-learn's photograph china.jpg (CC BY 2.0)"
    except ImportError:
        raise MissingExtra(
            "no photograph: neither scikit-image nor scikit-learn can be imported. Give one with --image, or "
            "install it with: pip install 'vitkernels[bench]'"
        ) from None


def normalize(images: Tensor) -> Tensor:
    """ImageNet's statistics, which every model here is meant for."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (images - mean) / std


def center_crop(photo: Tensor, size: int) -> Tensor:
    _, height, width = photo.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(photo[:, top : top + side, left : left + side], size)


def random_crops(photo: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """``[count, 3, size, size]``: random places, scales, flips, brightness, contrast; not yet normalized."""
    _, height, width = photo.shape
    crops = []
    for _ in range(count):
        scale, y, x, brightness, contrast, flip = torch.rand(6, generator=generator).tolist()
        side = max(8, int((0.35 + 0.65 * scale) * min(height, width)))
        top, left = int(y * (height - side)), int(x * (width - side))
        crop = _resize(photo[:, top : top + side, left : left + side], size)
        crop = (crop - 0.5) * (0.7 + 0.6 * contrast) + 0.35 + 0.3 * brightness
        crops.append(crop.flip(-1) if flip < 0.5 else crop)
    return torch.stack(crops).clamp(0, 1)


def _resize(image: Tensor, size: int) -> Tensor:
    resized = F.interpolate(image[None], (size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)
