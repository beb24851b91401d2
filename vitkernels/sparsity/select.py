"""Which Linear layers of a model are pruned, and why the others are left."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vitkernels.core.checks import fail
from vitkernels.nn.block_sparse_linear import BlockSparseLinear

Skipped = list[tuple[str, str, str]]


def prunable(
    model: nn.Module,
    block_shape: tuple[int, int] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[dict[str, nn.Linear], Skipped]:
    """Layers by their first name, and (name, class, reason) of the Linear layers that are left."""
    heads, weights = classifiers(model), _owners(model)
    layers: dict[str, nn.Linear] = {}
    skipped: Skipped = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, BlockSparseLinear)):
            continue
        reason = ""
        if name == "":
            fail(
                "model",
                "a module that holds Linear layers",
                module,
                "For one layer: BlockSparseLinear.from_linear.",
            )
        if isinstance(module, BlockSparseLinear):
            reason = "block-sparse already; its to_linear() makes it dense again"
        elif type(module) is not nn.Linear:
            reason = "a subclass of Linear, which may use its weight otherwise"
        elif _matches(name, exclude):
            reason = "excluded"
        elif include and not _matches(name, include):
            reason = "not included"
        elif not include and name in heads:
            reason = "classifier; name it in `include` to prune it"
        elif weights[id(module.weight)] > 1:
            reason = "shares its weight with another module"
        elif module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            reason = "has hooks, which a new module would lose"
        elif block_shape and (module.out_features < block_shape[0] or module.in_features < block_shape[1]):
            reason = f"{module.out_features}x{module.in_features}, smaller than a block"
        if reason:
            skipped.append((name, type(module).__name__, reason))
        elif isinstance(module, nn.Linear):
            layers[name] = module
    return layers, skipped


def classifiers(model: nn.Module) -> set[str]:
    """Names of the classification heads: those that timm or this package states, else those of the usual names."""
    stated = getattr(model, "pretrained_cfg", None) or {}
    names = stated.get("classifier") or getattr(model, "classifiers", None)
    if not names:
        names = ("head", "head_dist", "heads", "fc", "classifier")
    names = (names,) if isinstance(names, str) else tuple(names)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == n or name.startswith(f"{n}.") for n in names)
    }


def replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts modules in the places of others, in all places where one module has several."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[key] = replacements[child]


def _owners(model: nn.Module) -> dict[int, int]:
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def patterns_of(model: nn.Module, argument: str, value: Any) -> Sequence[str]:
    """The names and patterns of an argument, each of which has to match a linear layer of the model."""
    patterns = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        fail(argument, "names or patterns such as 'blocks.*.mlp.*'", value, kind=TypeError)
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, BlockSparseLinear))]
    for pattern in patterns:
        if names and not any(_matches(name, [pattern]) for name in names):
            some = ", ".join(map(repr, get_close_matches(pattern, names, 3, cutoff=0)))
            fail(argument, f"names or patterns of Linear layers, such as {some}", pattern)
    return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)
