"""`apply` and `revert`: kernels for a model that already exists."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitkernels.core import backends
from vitkernels.core.checks import fail
from vitkernels.nn.kept import drop
from vitkernels.patching.layers import Patched, patched_class, set_class
from vitkernels.patching.match import match_attention, match_fold
from vitkernels.patching.merging import (
    REFUSED,
    MergedBlocks,
    find_stacks,
    merged_source,
    merging_for,
    why_not_stack,
)
from vitkernels.patching.patches import PatchProjection, cuts_patches

__all__ = ["Report", "apply", "merged_source", "revert"]


@dataclass
class Report:
    """What `apply` did.

    Attributes:
        replaced: (name, class, kernel) of each layer that now runs a replaced forward.
        skipped: (name, class, reason) of each layer of interest that was left as it is.
        others: number of layers with parameters of their own that no kernel is meant for.
    """

    model: str
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    others: int = 0

    def __str__(self) -> str:
        rows = [("layer", "class", "count", "now"), *_rows(self.replaced, ""), *_rows(self.skipped, "left: ")]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        title = f"vitkernels: {len(self.replaced)} layers of {self.model} replaced, {len(self.skipped)} left"
        rest = f"{self.others} other layers with parameters have no kernel and run as before."
        return "\n".join([title, *(lines if len(rows) > 1 else []), rest])


def _rows(entries: list[tuple[str, str, str]], prefix: str) -> list[tuple[str, str, str, str]]:
    groups = Counter((cls, what) for _, cls, what in entries)
    first = {(cls, what): name for name, cls, what in reversed(entries)}
    return [
        (first[group] + (", ..." if count > 1 else ""), group[0], str(count), prefix + group[1])
        for group, count in groups.items()
    ]


def apply(
    model: nn.Module,
    *,
    fold_bn: bool | None = None,
    backend: str | None = None,
    token_merging: int | list[int] | tuple[int, float] | None = None,
    proportional_attention: bool = True,
    trace_source: bool = False,
    verbose: bool = True,
) -> Report:
    """Replaces the forward of the layers that have a kernel, in place and reversibly.

    Supported: cascaded group attention and its windows (EfficientViT of timm, of the official code, and copies of
    it); neighborhood attention on sequences and maps (NATTEN of every version, and copies of it); polyline path
    attention (the official code of PPMA, and copies of it); attention with a table of relative biases (TinyViT, LeViT
    and Swin of timm, and copies of them; Swin's shifted windows run as before). A layer matched by its name or
    attributes is compared with the kernel on random weights first. While their norms are in eval mode, the pairs of
    Conv2d + batch norm and of batch norm + Linear in plain sequences of layers, and those in the blocks of MedViTV2
    and LeViT, run as one layer each, EfficientViT's residual units around the mixer as one kernel, and S2AFormer's
    GELUs and residual sums in place where no gradient is asked for. In train mode pairs run as before, and under
    torch.compile, which fuses norms itself.
    Parameters, children, hooks and `state_dict` stay as they are (of hooks and token_merging see there); the model
    trains, compiles, copies, pickles and exports as before. Calling it again changes nothing. `revert` undoes it.

    Folded weights follow their sources through training, loading, moving and edits of any kind. On the CPU their
    contents are looked at in every call; on a GPU, and without the compiled extension, an edit in place through
    `parameter.data` is not seen: call apply again after those. They take up to the memory of one more copy of the
    weights that are folded, and in fp32 on the CPU one more for each of up to three shapes of the input. There, and on
    GPUs in half precision in sequences with a depthwise convolution, the maps behind folded layers are channels-last:
    code that reads one by `view` may have to do so by `reshape`.

    Args:
        model: a model or a part of one.
        fold_bn: whether to fold batch norms. Default: yes, for the times that the model is in eval mode. True is that
            too, and refuses a model that is in train mode now. False replaces attention layers only.
        backend: backend forced for the replaced attention layers; default: chosen call by call.
        token_merging: merge tokens in the transformer blocks of a plain ViT (timm's ViT and DeiT, MAE, DINOv2 and
            copies of them), between attention and MLP, by the similarity of the keys: r tokens in each block; [r,
            ...], block by block, 0 beyond the end; or (r, inflect), r on average, falling from block to block for
            inflect < 0, rising for > 0. No parameter is added, and LayerScale, key norms and fused attention stay.
            A model that pools its class token goes on with the merged tokens; any other gets them spread back over
            their places after the last block, so that its mean weighs them by their sizes. Call apply again after
            changing how it pools. Register tokens, intermediate features, masks, gradient checkpointing and hooks on
            blocks or their attention, forwards set on them included, are refused; of hooks that come later a warning
            says that they are not called.
        proportional_attention: with token_merging, a merged token counts in attention as often as the tokens that
            it stands for. Models that were trained without masks and are not fine-tuned want it; MAE's do not.
        trace_source: with token_merging, keep for `vitkernels.merged_source` where each token went.
        verbose: print the report.

    Returns:
        what was replaced, and why the rest was left; print it for a table.

    Raises:
        TypeError: model is not a module, or token_merging is of another type.
        ValueError: an unknown backend; fold_bn for a model in train mode; token_merging for a model without a stack
            of transformer blocks that can merge.
    """
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", model, kind=TypeError)
    backends.requested(backend)
    if fold_bn and model.training:
        fail(
            "fold_bn",
            "False for a model in train mode, where batch norms use the batch's statistics",
            fold_bn,
            "Call model.eval() first.",
        )
    report = Report(type(model).__name__)
    proven: dict[Any, str] = {}
    covered: set[nn.Module] = set()
    merging: set[Any] = set()
    if token_merging is not None:
        _merge_tokens(model, token_merging, proportional_attention, trace_source, backend)
    for name, module in list(model.named_modules()):
        if isinstance(module, MergedBlocks):
            r = module.vitkernels_merging.schedule  # type: ignore[union-attr]
            report.replaced.append((name, module.vitkernels_original.__name__, f"token merging, r = {[*r]}"))
            merging.update(block.attn for block in module._modules.values())  # type: ignore[attr-defined]
            continue
        if module in merging:
            continue
        if isinstance(module, PatchProjection):
            row = (
                name,
                module.vitkernels_original.__name__,
                "patches by a matrix product in half precision on GPUs",
            )
            report.replaced.append(row)
            continue
        match = match_attention(module, proven)
        folds = match is None
        if match is None and fold_bn is not False:
            match = match_fold(module, proven)
        if match is None:
            own = bool(module._parameters) and module not in covered
            report.others += own
            continue
        original = module.vitkernels_original if isinstance(module, Patched) else type(module)
        if match.mixin is None:
            report.skipped.append((name, original.__name__, match.reason))
            continue
        drop(module)
        set_class(module, patched_class(original, match.mixin, None if folds else backend))
        report.replaced.append((name, original.__name__, match.kernel))
        if folds:
            covered.update(module.children() if match.covered is None else match.covered)
    if fold_bn is not False and isinstance(model, _BatchNorm):
        report.skipped.append(("", type(model).__name__, "a batch norm alone folds into nothing"))
    if verbose:
        print(report)
    return report


def _merge_tokens(model: nn.Module, value: Any, proportional: bool, trace: bool, backend: str | None) -> None:
    stacks = list(find_stacks(model))
    reasons = [why_not_stack(stack, owner) for _, stack, owner in stacks]
    fitting = [found for found, reason in zip(stacks, reasons, strict=True) if not reason]
    if not fitting:
        fix = next(filter(None, reasons), "It has no sequence of blocks with norm1, attn, norm2 and mlp")
        fail("model", "a model with a stack of plain transformer blocks", type(model).__name__, f"{fix}.")
    plans = [merging_for(stack, owner, value, proportional, trace) for _, stack, owner in fitting]
    for (_, stack, owner), merging in zip(fitting, plans, strict=True):
        original: Any = stack.vitkernels_original if isinstance(stack, Patched) else type(stack)
        stack.__class__ = patched_class(original, MergedBlocks, backend)
        stack.__dict__["vitkernels_merging"] = merging
        for name, refuse in REFUSED.items():
            if hasattr(type(owner), name):
                owner.__dict__[name] = refuse
        projection: Any = getattr(getattr(owner, "patch_embed", None), "proj", None)
        if cuts_patches(projection) and not isinstance(projection, Patched):
            set_class(projection, patched_class(type(projection), PatchProjection, None))


def revert(model: nn.Module) -> int:
    """Undoes `apply`: every layer runs its own forward again. Returns the number of layers restored."""
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", model, kind=TypeError)
    restored = 0
    for module in model.modules():
        if isinstance(module, Patched):
            drop(module)
            set_class(module, module.vitkernels_original)
            for name in ("vitkernels_merging", "vitkernels_source", "vitkernels_steps"):
                module.__dict__.pop(name, None)
            restored += 1
        for name, refuse in REFUSED.items():
            if module.__dict__.get(name) is refuse:
                del module.__dict__[name]
    return restored
