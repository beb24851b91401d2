"""The list of models, and `create_model`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import nn

from vitkernels.models.weights import load_state_dict, read_state_dict

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_ARGUMENTS_OF: dict[str, Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]] = {}
_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


@overload
def register_model(build: _Builder) -> _Builder: ...


@overload
def register_model(
    *, arguments_of: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]
) -> Callable[[_Builder], _Builder]: ...


def register_model(build: Any = None, *, arguments_of: Any = None) -> Any:
    """Makes a function that builds a model known to `create_model` by its name.

    Args:
        arguments_of: from a state_dict, the arguments of the model that only its shapes tell; what the user
            passes goes before.
    """

    def register(build: Any) -> Any:
        _MODELS[build.__name__] = build
        if arguments_of is not None:
            _ARGUMENTS_OF[build.__name__] = arguments_of
        return build

    return register if build is None else register(build)


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
            EfficientViT's bias tables are resized to the model's windows; NAT's and DiNAT's tell the numbers
            of heads and the kernel size; PPMA reads classifiers, detectors and segmenters; a block-sparse DeiT reads
            block-sparse files and dense ones; LTM's networks read those of a plain ViT or Swin; with num_classes=0 the
            file's classifier is left out. Nothing is ever downloaded.
        **kwargs: the model's other arguments, as in `EfficientViT`, `NAT`, `MedViT`, `PPMA`, `S2AFormer`, `DeiT`,
            `LTMViT` and `LTMSwin`.

    Raises:
        ValueError: an unknown name, or weights whose keys or shapes are not the model's (all are listed).
        FileNotFoundError: no such file of weights.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"argument `name`: expected one of {', '.join(list_models())}; got {name!r}.{hint}")
    state_dict = None if weights is None else read_state_dict(weights)
    if state_dict is not None and name in _ARGUMENTS_OF:
        kwargs = {**_ARGUMENTS_OF[name](state_dict), **kwargs}
    model = _MODELS[name](num_classes=num_classes, in_chans=in_chans, **kwargs)
    if state_dict is not None:
        load_state_dict(model, state_dict, weights)
    return model
