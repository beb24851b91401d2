"""Reading files of weights, and the layouts they come in."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkernels.nn.cascaded_group_attention import resize_attention_biases

# What a pickled numpy number, as an accuracy computed by scikit-learn, is made of.
_NUMPY_NUMBERS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
]
_STEM = [(f"patch_embed.{2 * i}.", f"patch_embed.conv{i + 1}.") for i in range(4)]
_DOWNSAMPLE = ["res1", "patchmerge", "res2"]


def to_timm_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EfficientViT weights of the official layout (ours too) in timm's."""
    return {_timm_key(key): value for key, value in state_dict.items() if not _is_index(key)}


def to_official_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EfficientViT weights of timm's layout in the official one; those of the official layout as they are."""
    convert = _official_key if is_timm_layout(state_dict) else str
    return {convert(key): value for key, value in state_dict.items() if not _is_index(key)}


def is_timm_layout(keys: Iterable[str]) -> bool:
    return any(key.startswith(("stages.", "patch_embed.conv")) for key in keys)


def _is_index(key: str) -> bool:
    return key.endswith("attention_bias_idxs")


def _timm_key(key: str) -> str:
    for official, timm in _STEM:
        if key.startswith(official):
            key = timm + key.removeprefix(official)
    if match := re.match(r"blocks(\d+)\.(\d+)\.(.*)", key):
        stage, index, rest = int(match[1]) - 1, int(match[2]), match[3]
        if stage == 0:
            key = f"stages.0.blocks.{index}.{rest}"
        elif index < len(_DOWNSAMPLE):
            key = f"stages.{stage}.downsample.{_DOWNSAMPLE[index]}.{rest}"
        else:
            key = f"stages.{stage}.blocks.{index - len(_DOWNSAMPLE)}.{rest}"
    key = re.sub(r"^(head|head_dist)\.l\.", r"\1.linear.", key)
    return re.sub(r"\.c\.(weight|bias)$", r".conv.\1", key)


def _official_key(key: str) -> str:
    for official, timm in _STEM:
        if key.startswith(timm):
            key = official + key.removeprefix(timm)
    if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", key):
        stage, index, rest = int(match[1]), int(match[2]), match[3]
        key = f"blocks{stage + 1}.{index + (len(_DOWNSAMPLE) if stage else 0)}.{rest}"
    elif match := re.match(r"stages\.(\d+)\.downsample\.(\w+)\.(.*)", key):
        key = f"blocks{int(match[1]) + 1}.{_DOWNSAMPLE.index(match[2])}.{match[3]}"
    key = re.sub(r"^(head|head_dist)\.linear\.", r"\1.l.", key)
    return re.sub(r"\.conv\.(weight|bias)$", r".c.\1", key)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors by name from a `.safetensors` file, or from what `torch.load(weights_only=True)` reads.

    An `argparse.Namespace` and numpy's numbers beside the weights, which many training scripts save, are read
    too.
    A checkpoint's "model_ema", "model", "models" or "state_dict" entry is taken where it has one, and the prefix
    "module." of a model wrapped for data parallelism is removed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"argument `weights`: no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
        content: Any = _load(load_file, path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY_NUMBERS]):
            content = _load(torch.load, path, map_location="cpu", weights_only=True)
    for entry in ("model_ema", "model", "models", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        found = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"argument `weights`: expected a state_dict, or a checkpoint with one under 'model', 'models', "
            f"'state_dict' or 'model_ema'; {path} holds {found}."
        )
    return {key.removeprefix("module."): value for key, value in content.items()}


def _load(read: Callable[..., Any], path: Path, **options: Any) -> Any:
    try:
        return read(path, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the readers raise a dozen kinds for damaged or foreign files
        raise ValueError(
            f"argument `weights`: expected a file that {read.__module__}.{read.__name__} reads without running "
            f"code from it; got {path}, which fails with {type(error).__name__}: {error}\n"
            "Save its weights alone: where the file is trusted, "
            'torch.save(torch.load(path, weights_only=False)["model"], new_path).'
        ) from error


def load_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: object) -> None:
    """Loads what `read_state_dict` returned into a model of the official layout; see `create_model`.

    A model with other layouts of its own has a method `convert_state_dict`.

    Args:
        source: where it came from, for the message.

    Raises:
        ValueError: keys or shapes differ; the message lists them and the model is unchanged.
    """
    loaded = to_official_state_dict(state_dict)
    convert: Any = getattr(model, "convert_state_dict", dict)
    loaded = convert(loaded)
    own = model.state_dict()
    classifiers = tuple(f"{name}." for name in getattr(model, "classifiers", ("head", "head_dist")))
    if not any(key.startswith(classifiers) for key in own):
        loaded = {key: value for key, value in loaded.items() if not key.startswith(classifiers)}
    for key, value in loaded.items():
        if key.endswith("attention_biases") and key in own and value.shape[1:] != own[key].shape[1:]:
            loaded[key] = resize_attention_biases(value, round(own[key].shape[1] ** 0.5))
    problems = [
        *_listing("missing from the file", sorted(own.keys() - loaded.keys())),
        *_listing("not of this model", sorted(loaded.keys() - own.keys())),
        *_listing(
            "of another shape",
            [
                f"{key}: file {list(loaded[key].shape)}, model {list(own[key].shape)}"
                for key in own
                if key in loaded and loaded[key].shape != own[key].shape
            ],
        ),
    ]
    if problems:
        head = any(
            key.startswith(classifiers) and key in own and own[key].shape != loaded[key].shape
            for key in loaded
        )
        fix = "Build it with the file's num_classes, then call model.reset_classifier(n)." if head else ""
        lines = [f"argument `weights`: {source} does not fit {type(model).__name__}:", *problems, fix]
        raise ValueError("\n".join(line for line in lines if line))
    model.load_state_dict(loaded)


def _listing(what: str, keys: list[str], most: int = 20) -> list[str]:
    if not keys:
        return []
    shown = [f"    {key}" for key in keys[:most]]
    rest = [f"    and {len(keys) - most} more"] if len(keys) > most else []
    return [f"  {len(keys)} {what}:", *shown, *rest]
