"""What the blocks of a weight are worth, and what a model tells about its layers on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from vitkernels.core.checks import fail
from vitkernels.nn.block_sparse_linear import block_sums


@dataclass(frozen=True)
class Blocks:
    """Sums over the blocks of one weight, [block rows, block columns] each, in float64.

    With w the weight and g the average gradient; by magnitude, w stands in the place of w * g.

    Attributes:
        score: mean |w g| of a block's elements; blocks of a low score go first.
        linear: sum of w g.
        square: sum of (w g)^2.
        energy: sum of w^2.
        elements: number of elements, fewer than bh * bw at the edges of the weight.
    """

    score: Tensor
    linear: Tensor
    square: Tensor
    energy: Tensor
    elements: Tensor

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor | None, block_shape: tuple[int, int]) -> Blocks:
        weight = weight.detach().double()
        product = weight if gradient is None else weight * gradient.double()
        elements = cls.elements_of(weight, block_shape)
        return cls(
            block_sums(product.abs(), block_shape) / elements,
            block_sums(product, block_shape),
            block_sums(product.square(), block_shape),
            block_sums(weight.square(), block_shape),
            elements,
        )

    @staticmethod
    def elements_of(weight: Tensor, block_shape: tuple[int, int]) -> Tensor:
        return block_sums(torch.ones_like(weight), block_shape)


@dataclass
class Observed:
    """What running a model on calibration data told.

    Attributes:
        rows: layer name -> rows of its input an image (its tokens); a layer that was not called is absent.
        gradients: layer name -> average over the images of the gradient of mean(net(x)^2) in its weight, float32.
    """

    rows: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    counted: Mapping[str, nn.Module],
    calibration: Any,
    gradients: bool,
) -> Observed:
    """Runs the model, in the mode it is in, on every batch; without gradients on the first alone.

    Gradients are those of `layers`, rows those of all `counted`. The parameters' `.grad` and `requires_grad`, the
    norms' running statistics and the state of PyTorch's random numbers stay as they are.
    """
    seen, images = Observed(), 0
    device = next(model.parameters()).device
    weights = {name: layer.weight for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in counted.items():
            stack.callback(layer.register_forward_pre_hook(_counts(name, seen.rows), with_kwargs=True).remove)
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(_kept_statistics(model))
        stack.enter_context(_trainable(weights.values()))
        for batch in _batches(calibration):
            out = _outputs(model(batch.to(device)))
            images += len(batch)
            if not gradients:
                break
            loss = torch.stack([part.float().square().mean() for part in out]).sum()
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    mean = seen.gradients.setdefault(name, torch.zeros_like(gradient, dtype=torch.float32))
                    mean.add_(gradient.float() - mean, alpha=len(batch) / images)
    if not images:
        fail("calibration", "at least one batch of images", calibration)
    seen.rows = {name: rows / images for name, rows in seen.rows.items()}
    return seen


def _counts(
    name: str, rows: dict[str, float]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (x,) = (*args, *kwargs.values())  # a layer's only argument, which may come by its name
        rows[name] = rows.get(name, 0) + x.numel() / max(1, x.shape[-1])

    return hook


@contextmanager
def _trainable(weights: Iterable[Tensor]) -> Any:
    """Frozen weights, too, have a gradient while this lasts."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _kept_statistics(model: nn.Module) -> Any:
    """What norms in train mode do to their running statistics is undone."""
    kept = [
        (statistic, statistic.clone())
        for module in model.modules()
        if isinstance(module, _NormBase)
        for statistic in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for statistic, before in kept:
                statistic.copy_(before)


def _batches(calibration: Any) -> Iterable[Tensor]:
    expected = "a tensor of images [batch, ...], or an iterable of those or of tuples that begin with one"
    if not (isinstance(calibration, Iterable) or hasattr(calibration, "__getitem__")):
        fail("calibration", expected, calibration, kind=TypeError)
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
        if not isinstance(images, Tensor) or images.ndim < 2 or not len(images):
            fail("calibration", expected, images, kind=TypeError)
        yield images


def _outputs(out: Any) -> list[Tensor]:
    """The logits: the output, or all of them where a model has several heads."""
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"argument `model`: expected a model that returns a tensor or a tuple of tensors; got {type(out)}. "
            "Wrap it in a module that returns its logits."
        )
    return parts
