"""Which layers of a model `apply` can replace, and the proof that the replacement computes the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitkernels.core.backends import backend as backend_scope
from vitkernels.nn.cascaded_group_attention import bias_side
from vitkernels.nn.conv_norm import is_plain_conv, is_plain_norm
from vitkernels.patching.folding import (
    FoldedChain,
    FoldedConvNorm,
    FoldedLinearNorm,
    FoldedNormLinear,
    FusedFFN,
    FusedPatchMerging,
    chain_of,
)
from vitkernels.patching.layers import (
    Patched,
    WindowedCascade,
    WindowPartition,
    patched_class,
    signature_of,
    trial_copy,
    why_no_values,
)
from vitkernels.patching.neighborhood import Neighborhood, rank_of, why_not_neighborhood
from vitkernels.patching.perception import FusedPerceptionBlock, FusedStem, is_block, is_stem
from vitkernels.patching.polyline import PolylinePath, is_polyline, why_not_polyline
from vitkernels.patching.residuals import FusedBlock, FusedResidual, FusedSequence
from vitkernels.patching.windows import (
    AbsoluteBias,
    SignedBias,
    has_absolute_bias,
    has_signed_bias,
    why_not_absolute_bias,
    why_not_signed_bias,
)


@dataclass(frozen=True)
class Match:
    """What apply can do with a layer: a mixin and what to call it, or the reason why not.

    Attributes:
        covered: children that the replaced forward does not call, as a rule; None: all.
    """

    mixin: type[Patched] | None
    kernel: str = ""
    reason: str = ""
    covered: tuple[nn.Module, ...] | None = None


def match_attention(module: nn.Module, proven: dict[Any, str]) -> Match | None:
    """The match of an attention layer; None for any other layer.

    Args:
        proven: signature -> outcome of the proof, shared between the layers of a model.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    mixin: type[Patched]
    if "CascadedGroupAttention" in names:
        mixin, kernel, reason = WindowedCascade, "cascaded_group_attention", _why_not_cascade(module)
    elif "LocalWindowAttention" in names:
        mixin, kernel, reason = WindowPartition, "window partition", _why_not_windows(module)
    elif rank_of(module):
        mixin, kernel, reason = Neighborhood, "neighborhood_attention", why_not_neighborhood(module)
    elif is_polyline(module):
        mixin, kernel, reason = PolylinePath, "polyline_path_attention", why_not_polyline(module)
    elif has_absolute_bias(module):
        mixin, kernel, reason = AbsoluteBias, "window_attention", why_not_absolute_bias(module)
    elif has_signed_bias(module):
        mixin, kernel, reason = SignedBias, "window_attention", why_not_signed_bias(module)
    elif "attention" in type(module).__name__.lower() or "attn" in type(module).__name__.lower():
        ours = type(module).__module__.startswith("vitkernels.")
        return Match(None, reason="calls its kernel itself" if ours else "no kernel for this class")
    else:
        return None
    if not reason and "forward" in module.__dict__:
        reason = "its forward was already replaced on the instance, by another tool"
    reason = reason or _prove(module, mixin, proven)
    return Match(None, reason=reason) if reason else Match(mixin, kernel)


def _prove(module: nn.Module, mixin: type[Patched], proven: dict[Any, str]) -> str:
    if isinstance(module, Patched) or type(module).__module__.startswith("vitkernels."):
        return ""
    signature = signature_of(module)
    if signature not in proven:
        proven[signature] = _why_different(module, mixin)
    return proven[signature]


def match_fold(module: nn.Module, proven: dict[Any, str]) -> Match | None:
    """The match of layers that fold or fuse into fewer; None for any other layer."""
    children: list[Any] = list(module._modules.values())
    norms = [child for child in children if isinstance(child, _BatchNorm)]
    if not norms:
        return _match_container(module, children, proven)
    if _is_linear_norm(module, children):
        reason = _why_no_constants(*children) or _prove(module, FoldedLinearNorm, proven)
        return Match(None, reason=reason) if reason else Match(FoldedLinearNorm, "batch norm folded")
    chain = None if "forward" in module.__dict__ else chain_of(module)
    if chain is None:
        return Match(None, reason="its batch norm is not in a plain sequence of layers")
    if not all(_is_plain_norm(norm) for norm in norms):
        return Match(None, reason="its batch norm has a forward of its own")
    if not _is_sequence(module):
        if reason := _prove(module, FoldedChain, proven):
            return Match(None, reason=reason)
        return _match_chain(chain)
    if _is_conv_norm(children):
        match, norm, layer = Match(FoldedConvNorm, "batch norm folded"), children[1], children[0]
    elif _is_norm_linear(children):
        match, norm, layer = Match(FoldedNormLinear, "batch norm folded"), children[0], children[-1]
    elif is_stem(children):
        return Match(FusedStem, "GELU in place")
    else:
        return _match_chain(chain)
    reason = _why_no_constants(layer, norm)
    return Match(None, reason=reason) if reason else match


def _match_chain(chain: tuple[nn.Module, ...]) -> Match:
    pairs = [pair for pair in itertools.pairwise(chain) if _is_conv_norm([*pair])]
    reasons = [_why_no_constants(*pair) for pair in pairs] or [
        "not a Conv2d + batch norm or BatchNorm1d + Linear pair"
    ]
    if all(reasons):
        return Match(None, reason=reasons[0])
    covered = tuple(
        itertools.chain(*(pair for pair, reason in zip(pairs, reasons, strict=True) if not reason))
    )
    kernel = "batch norm folded" if len(covered) == 2 else "batch norms folded"
    return Match(FoldedChain, kernel, covered=covered)


def _why_no_constants(layer: Any, norm: Any) -> str:
    if norm.running_mean is None:
        return "its batch norm keeps no running statistics"
    if any(name not in part._parameters for part in (layer, norm) for name in ("weight", "bias")):
        return "its weight or bias is parametrised"
    return ""


def _match_container(module: nn.Module, children: list[Any], proven: dict[Any, str]) -> Match | None:
    """A container whose children run in fewer calls: a plain sequence, or one of EfficientViT's."""
    name, parts = _class_name(module), set(module._modules)
    mixin: type[Patched]
    kernel = "ReLU fused"
    if _is_sequence(module):
        pairs = list(itertools.pairwise(children))
        if any(_is_residual(a, _folds) and _is_residual(b, _is_ffn) for a, b in pairs):
            kernel = "residual fused"
        elif not any(_folds(a) and type(b) is nn.ReLU for a, b in pairs):
            return None
        mixin = FusedSequence
    elif _is_ffn(module):
        mixin = FusedFFN
    elif name == "PatchMerging" and {"conv1", "act", "conv2", "se", "conv3"} <= parts:
        mixin = FusedPatchMerging
    elif _is_residual(module, lambda inner: _folds(inner) or _is_ffn(inner) or _is_mixer(inner)):
        mixin, kernel = FusedResidual, "residual fused"
    elif is_block(module):
        mixin, kernel = FusedPerceptionBlock, "GELU and residual in place"
    elif name.lower() == "efficientvitblock" and parts == {"dw0", "ffn0", "mixer", "dw1", "ffn1"}:
        mixin, kernel = FusedBlock, "residual fused"
    else:
        return None
    if "forward" in module.__dict__ or (mixin is not FusedSequence and _prove(module, mixin, proven)):
        return None
    return Match(mixin, kernel)


def _class_name(module: nn.Module) -> str:
    return (module.vitkernels_original if isinstance(module, Patched) else type(module)).__name__


def _is_ffn(module: nn.Module) -> bool:
    parts = module._modules
    return (
        _class_name(module) in ("ConvMlp", "FFN")
        and set(parts) == {"pw1", "act", "pw2"}
        and _folds(parts["pw1"])
    )


def _is_mixer(module: nn.Module) -> bool:
    return _class_name(module) in ("LocalWindowAttention", "CascadedGroupAttention")


def _is_residual(module: nn.Module, accepts: Callable[[Any], bool]) -> bool:
    named = _class_name(module) in ("Residual", "ResidualDrop")
    return named and set(module._modules) == {"m"} and accepts(module._modules["m"])


def _folds(module: Any) -> bool:
    """Whether it is a pair of Conv2d and batch norm that folds."""
    children = list(module._modules.values())
    return _is_sequence(module) and _is_conv_norm(children) and not _why_no_constants(*children)


def _is_conv_norm(children: list[Any]) -> bool:
    if len(children) != 2 or not _is_plain_norm(children[1]):
        return False
    return is_plain_conv(children[0]) and "forward" not in children[0].__dict__


def _is_norm_linear(children: list[Any]) -> bool:
    if len(children) < 2:
        return False
    norm, *between, last = children
    return (
        isinstance(norm, nn.BatchNorm1d)
        and _is_plain_norm(norm)
        and all(_is_plain(m, nn.Dropout) or _is_plain(m, nn.Identity) for m in between)
        and _is_plain(last, nn.Linear)
        and norm.num_features == last.in_features
    )


def _is_linear_norm(module: nn.Module, children: list[Any]) -> bool:
    """Whether it is one of LeViT's, whose norm takes all tokens for one batch."""
    return (
        _class_name(module) in ("LinearNorm", "Linear_BN")
        and "forward" not in module.__dict__
        and len(children) == 2
        and _is_plain(children[0], nn.Linear)
        and isinstance(children[1], nn.BatchNorm1d)
        and _is_plain_norm(children[1])
    )


def _is_sequence(module: nn.Module) -> bool:
    cls = module.vitkernels_original if isinstance(module, Patched) else type(module)
    return cls.forward is nn.Sequential.forward and "forward" not in module.__dict__


def _is_plain(module: Any, cls: type[nn.Module]) -> bool:
    if not isinstance(module, cls) or "forward" in module.__dict__:
        return False
    return type(module).forward is cls.forward


def _is_plain_norm(module: Any) -> bool:
    return is_plain_norm(module) and "forward" not in module.__dict__


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

    A copy with random weights, in fp32 on the CPU, is run both ways, in eval and in train mode: freshly initialised
    layers return 0 whatever their forward does, and a layer's own code may differ from what its class name says.
    """
    if reason := why_no_values(module):
        return reason
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), backend_scope("reference"):
            trial = trial_copy(module).to("cpu", torch.float32)
            original, replaced = type(trial), patched_class(type(trial), mixin, None)
            generator = torch.Generator().manual_seed(0)
            _randomise(trial, generator)
            inputs = _trial_inputs(trial, mixin, generator)
            # Through train mode, for layers that keep something derived from their weights in eval mode.
            trial.train()
            for mode in ("eval", "train"):  # in this order: training moves the statistics of norms
                trial.train(mode == "train")
                trial.__class__ = original
                expected = _seeded(trial, inputs)
                trial.__class__ = replaced
                error = (_seeded(trial, inputs) - expected).norm() / expected.norm()
                if not error < 1e-4:
                    return (
                        f"computes something else in {mode} mode than its class name says "
                        f"(relative difference {error:.1e})"
                    )
    except Exception as exception:
        said = str(exception).partition("\n")[0]
        said = said if len(said) <= 100 else f"{said[:97]}..."
        return f"could not be compared with the kernel: {type(exception).__name__}: {said}"
    return ""


def _seeded(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a layer returns, the same values dropped in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return layer(*inputs)


def _trial_inputs(trial: Any, mixin: Any, generator: torch.Generator) -> tuple[Any, ...]:
    """What a mixin says that its layers are tried on: inputs, or the shape of the only one."""
    if hasattr(mixin, "vitkernels_trial_inputs"):
        return mixin.vitkernels_trial_inputs(trial, generator)
    shape_of = getattr(mixin, "vitkernels_trial_shape", _trial_shape)
    return (torch.randn(shape_of(trial), generator=generator, dtype=torch.float32),)


def _trial_shape(trial: Any) -> tuple[int, int, int, int]:
    first = next(m for m in trial.modules() if isinstance(m, nn.Conv2d))
    attention = next((m for m in trial.modules() if hasattr(m, "attention_biases")), None)
    if attention is None:
        return 2, first.in_channels, 6, 6
    side = bias_side(attention.attention_biases)
    windows = next((m for m in trial.modules() if m._modules.get("attn") is attention), None)
    size = side if windows is None else getattr(windows, "resolution", side)
    share = any(m is first for m in attention.modules())  # the convolution of one head
    return 2, first.in_channels * (len(attention.qkvs) if share else 1), size, size


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.ndim == 4 or (tensor.ndim == 2 and name.endswith("weight")):
            spread = tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        elif name.endswith(("running_var", "weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
