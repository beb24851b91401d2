"""The list of models, and `create_model`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from vitkernels.models.weights import load_weights

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


def register_model(build: _Builder) -> _Builder:
    """Makes a function that builds a model known to `create_model` by its name."""
    _MODELS[build.__name__] = build
    return build


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return sorted(_MODELS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    weights: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model, randomly initialised or from a file of weights.

    Args:
        name: one of `list_models()`.
        num_classes: width of the classifier; 0 returns pooled features.
        in_chans: channels of the image.
        weights: a `.pth` or `.safetensors` file in the official or in timm's layout, which is recognised.
            Bias tables are resized to the model's windows; with num_classes=0 the file's classifier is
            left out. Nothing is ever downloaded.
        **kwargs: the model's other arguments, as in `EfficientViT`.

    Raises:
        ValueError: an unknown name, or weights whose keys or shapes are not the model's (all are listed).
        FileNotFoundError: no such file of weights.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"argument `name`: expected one of {', '.join(list_models())}; got {name!r}.{hint}")
    model = _MODELS[name](num_classes=num_classes, in_chans=in_chans, **kwargs)
    if weights is not None:
        load_weights(model, weights)
    return model
