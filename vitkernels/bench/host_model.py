"""A whole network to measure on, made usable without downloaded weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import vitkernels


@dataclass(frozen=True)
class HostModel:
    model: nn.Module
    source: str  # "timm 1.0.31" or "vitkernels.models"
    note: str = ""  # why it is not timm's


def create_host_model(name: str) -> HostModel:
    """timm's model, as users have it; ours where timm cannot be imported, for whatever reason.

    Raises:
        ValueError: neither library knows the name.
    """
    try:
        # A torchvision built for another torch raises RuntimeError from inside `import timm`.
        import timm
    except Exception as error:
        reason = f"timm cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
        return HostModel(_ours(name, reason), "vitkernels.models", reason)
    if timm.is_model(name):
        return HostModel(timm.create_model(name, pretrained=False).eval(), f"timm {timm.__version__}")
    reason = f"timm {timm.__version__} has no model {name!r}"
    return HostModel(_ours(name, reason), "vitkernels.models", reason)


def _ours(name: str, reason: str) -> nn.Module:
    from vitkernels import models

    if name not in models.list_models():
        known = ", ".join(models.list_models())
        raise ValueError(f"model: expected one of timm's or one of {known}; got {name!r}, and {reason}")
    return models.create_model(name).eval()


def randomize(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random norm parameters and statistics, attention biases and layer scales, in place; returns the model.

    At their usual initial values EfficientViT's residual branches (norm weights of 0) add exactly nothing, and those
    with layer scale (1e-6 in PPMA-B) next to nothing, so that any mixer, right or wrong, would give the same logits.
    """

    def positive(tensor: Tensor | None) -> None:
        if tensor is not None:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))

    def centred(tensor: Tensor | None, spread: float) -> None:
        if tensor is not None:
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                positive(module.weight)
                centred(module.bias, 0.2)
                centred(module.running_mean, 0.2)
                positive(module.running_var)
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                centred(parameter, 1.0)
            elif name.rpartition(".")[2] in ("gamma", "gamma1", "gamma2", "gamma_1", "gamma_2"):
                positive(parameter)
    return model


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the running statistics of every batch norm to the average over these batches; leaves eval mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def clone(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in that dtype and in eval mode, without bias caches of the original's dtype."""
    twin = copy.deepcopy(model).to(dtype)
    return twin.train().eval()  # timm's layers drop their cached attention bias on train()


class Plain(nn.Module):
    """A model of ours without our kernels: the same maths in plain PyTorch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with vitkernels.backend("reference"):
            return self.model(x)


def plain(model: nn.Module) -> nn.Module:
    """What the model was before this package: itself, or, as ours run on our kernels, its plain form."""
    return Plain(model) if type(model).__module__.startswith("vitkernels.") else model


def fold_conv_bn(model: nn.Module) -> nn.Module:
    """The baseline: a copy in eval mode, every Conv2d + BatchNorm2d pair folded by PyTorch's own helper."""
    folded = clone(model)
    for module in list(folded.modules()):
        children = list(module.named_children())
        if not isinstance(module, nn.Sequential) or len(children) != 2:
            continue
        (conv_name, conv), (norm_name, norm) = children
        if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    return folded
