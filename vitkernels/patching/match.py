"""Which layers of a model `apply` can replace, and the proof that the replacement computes the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitkernels.core.backends import backend as backend_scope
from vitkernels.nn.cascaded_group_attention import bias_side
from vitkernels.patching.layers import (
    FoldedConvNorm,
    FoldedNormLinear,
    Patched,
    WindowedCascade,
    WindowPartition,
    patched_class,
)


@dataclass(frozen=True)
class Match:
    """What apply can do with a layer: a mixin and what to call it, or the reason why not."""

    mixin: type[Patched] | None
    kernel: str = ""
    reason: str = ""


def match_attention(module: nn.Module, proven: dict[Any, str]) -> Match | None:
    """The match of an attention layer; None for any other layer.

    Args:
        proven: signature -> outcome of the proof, shared between the layers of a model.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if "CascadedGroupAttention" in names:
        mixin, kernel, reason = WindowedCascade, "window_attention", _why_not_cascade(module)
    elif "LocalWindowAttention" in names:
        mixin, kernel, reason = WindowPartition, "window partition", _why_not_windows(module)
    elif "attention" in type(module).__name__.lower() or "attn" in type(module).__name__.lower():
        return Match(None, reason="no kernel for this class")
    else:
        return None
    if not reason and "forward" in module.__dict__:
        reason = "its forward was already replaced on the instance, by another tool"
    if not reason and not isinstance(module, Patched) and not _is_ours(module):
        signature = (type(module), *((name, p.shape) for name, p in module.named_parameters()))
        if signature not in proven:
            proven[signature] = _why_different(module, mixin)
        reason = proven[signature]
    return Match(None, reason=reason) if reason else Match(mixin, kernel)


def match_fold(module: nn.Module) -> Match | None:
    """The match of a pair of layers that folds into one; None where there is no batch norm."""
    children = list(module._modules.values())
    is_norm = [isinstance(child, _BatchNorm) for child in children]
    if not any(is_norm):
        return None
    if type(module).forward is not nn.Sequential.forward and not isinstance(module, Patched):
        return Match(None, reason="its batch norm is not in a plain sequence of layers")
    if len(children) == 2 and is_norm[1] and _is_plain(children[0], nn.Conv2d):
        match, norm, layer = Match(FoldedConvNorm, "batch norm folded"), children[1], children[0]
    elif is_norm[0] and _is_linear_tail(children[1:]):
        match, norm, layer = Match(FoldedNormLinear, "batch norm folded"), children[0], children[-1]
    else:
        return Match(None, reason="not a Conv2d + batch norm or batch norm + Linear pair")
    if norm.running_mean is None:
        return Match(None, reason="its batch norm keeps no running statistics")
    if layer._parameters.get("weight") is None:
        return Match(None, reason="its weight is parametrised")
    return match


def _is_plain(module: Any, cls: type[nn.Module]) -> bool:
    return isinstance(module, cls) and type(module).forward is cls.forward and "forward" not in module.__dict__


def _is_linear_tail(children: list[Any]) -> bool:
    *between, last = children or [None]
    return _is_plain(last, nn.Linear) and all(isinstance(m, (nn.Dropout, nn.Identity)) for m in between)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("vitkernels.")


def _why_not_cascade(module: Any) -> str:
    needed = ("qkvs", "dws", "proj", "attention_biases", "key_dim", "scale")
    if missing := [name for name in needed if not hasattr(module, name)]:
        return f"has no attribute {', '.join(missing)}"
    table = module.attention_biases
    if not isinstance(table, torch.Tensor) or table.ndim != 2 or bias_side(table) ** 2 != table.shape[1]:
        return "attention_biases is not a table [heads, R * R]"
    if not len(module.qkvs) == len(module.dws) == len(table):
        return "qkvs, dws and attention_biases differ in the number of heads"
    return ""


def _why_not_windows(module: Any) -> str:
    if not hasattr(module, "attn"):
        return "has no attribute attn"
    return _why_not_cascade(module.attn)


@torch.no_grad()
def _why_different(module: Any, mixin: type[Patched]) -> str:
    """Why the mixin would not compute what the layer computes; empty when it does.

    A copy with random weights, in fp64 on the CPU, is run both ways: freshly initialised layers return 0
    whatever their forward does, and a layer's own code may differ from what its class name says.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its parameters are on the meta device; apply after loading them"
    try:
        trial = copy.deepcopy(module).to("cpu", torch.float64)
        for part in trial.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                hooks.clear()
        generator = torch.Generator().manual_seed(0)
        _randomise(trial, generator)
        # Through train mode, for layers that keep something derived from their weights in eval mode.
        trial.train()
        trial.eval()
        attention = trial.attn if mixin is WindowPartition else trial
        side = bias_side(attention.attention_biases)
        conv = next(m for m in attention.qkvs[0].modules() if isinstance(m, nn.Conv2d))
        channels = conv.in_channels * len(attention.qkvs)
        size = getattr(module, "resolution", side) if mixin is WindowPartition else side
        x = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
        with torch.autocast("cpu", enabled=False), backend_scope("reference"):
            expected = trial(x)
            trial.__class__ = patched_class(type(trial), mixin, None)
            error = (trial(x) - expected).norm() / expected.norm()
    except Exception as exception:
        return f"could not be compared with the kernel: {type(exception).__name__}: {exception}"
    if not error < 1e-6:
        return f"computes something else than its class name says (relative difference {error:.1e})"
    return ""


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.ndim == 4:
            spread = tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * spread)
        elif name.endswith(("running_var", "weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
