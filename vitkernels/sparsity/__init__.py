"""`sparsify` and `densify`: block-sparse linear layers in a model that already exists."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.core import backends
from vitkernels.core.checks import check_positive_ints, fail
from vitkernels.nn.block_sparse_linear import BlockSparseLinear
from vitkernels.sparsity.allocation import allocate, describe_layer, keep_mask, lowest_density
from vitkernels.sparsity.criterion import Blocks, Observed, observe
from vitkernels.sparsity.masks import block_mask, block_shape_of, read_masks
from vitkernels.sparsity.report import SparseLayer, SparsityReport, measure_speed
from vitkernels.sparsity.select import Skipped, patterns_of, prunable, replace

__all__ = ["SparseLayer", "SparsityReport", "densify", "sparsify"]

_Chosen = dict[str, tuple[nn.Linear, Tensor]]


def sparsify(
    model: nn.Module,
    block_shape: tuple[int, int] | int | None = None,
    *,
    density: float | None = None,
    flops: float | None = None,
    masks: Any = None,
    criterion: str = "taylor",
    calibration: Any = None,
    include: Any = None,
    exclude: Any = None,
    hardware: str | None = "macs",
    measure: bool = False,
    backend: str | None = None,
    verbose: bool = True,
) -> SparsityReport:
    """Prunes blocks of a model's Linear layers, as LPViT does, and puts `nn.BlockSparseLinear`s in their places.

    In place: a layer `name` with the parameters `name.weight` and `name.bias` becomes one with `name.values` and the
    same `name.bias`, and the buffers `name.crow_indices` and `name.col_indices`. Training keeps the pattern; a
    state_dict loads into any model whose layers of those names are block-sparse, whatever their pattern. Make
    optimizers afterwards. `densify` turns all layers back into dense ones with zeros.

    Left dense: subclasses of Linear, classifiers unless included by name, layers smaller than a block, with shared
    weights, with hooks, whose forward the calibration never called, or of which every block is kept. The report says
    why. Works on timm's ViT, DeiT and Swin, and on any other model that calls its Linear layers.

    What goes: a block's score is its mean \\|w g\\|, g the average gradient of mean(net(x)^2) over the calibration data
    in the mode that the model is in (the published code: train mode). How much goes from which layer: see
    `vitkernels.sparsity.allocation`.

    Args:
        model: a module that holds Linear layers.
        block_shape: (bh, bw), height over the output features, or one number for both. Beside masks it may be left
            out: the largest one that fits them is taken.
        density: share of the weights that remains over all prunable layers together.
        flops: or the share of the FLOPs of all Linear layers (those left dense are part of the whole).
        masks: or LPViT's own masks: a file or dict of `<module>.weight_mask`, dense 0 and 1. Masked convolutions have
            zeros put into their weights, once.
        criterion: "taylor" as above, or "magnitude": mean \\|w\\|, distortion half the squares that go.
        calibration: images: a tensor, or an iterable of tensors or of tuples that begin with one. Needed for "taylor"
            and for `flops`; LPViT takes about 2000.
        include, exclude: names of layers, of modules that hold them, or patterns such as "blocks.*.mlp.*". By default
            all but the classifiers.
        hardware: cost of a layer's remaining blocks against which its distortion is weighed: "macs", multiply-adds
            with its tokens (without calibration one a layer); "lpvit", blocks * floor(in_features / 16); None, the
            share of the blocks, so that all layers stop at the same slope.
        measure: time each layer, dense and sparse, on the rows of one image. Else the report states what a model of
            other measurements expects, or the bound 1 / density where there is none (`SparseLayer.expected`).
        backend: as in `ops.block_sparse_linear`, kept by the layers.
        verbose: print the report.

    Returns:
        the layers' densities and expected speeds, which of them the dense layer is expected to beat (they become sparse
        all the same, since the target counts on them), and why the rest was left.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: not exactly one of density, flops and masks; a target out of reach (the model is unchanged), masks
            that are not constant inside the blocks, a missing calibration, an unknown name.

    Paper: LPViT: Low-Power Semi-structured Pruning for Vision Transformers (Xu et al., ECCV 2024).

    Example:
        >>> images = torch.randn(2, 3, 224, 224)
        >>> model = vitkernels.models.create_model("deit_small_bsr", density=1.0)
        >>> report = sparsify(model, 32, flops=0.5, calibration=images, verbose=False)
        >>> round(report.flops, 2)
        0.5
    """
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", model, kind=TypeError)
    backends.requested(backend)
    targets = {name: value for name, value in (("density", density), ("flops", flops)) if value is not None}
    if len(targets) + (masks is not None) != 1:
        fail("density", "exactly one of density, flops and masks", {**targets, "masks": masks})
    for name, value in targets.items():
        if not isinstance(value, (int, float)) or not 0 < value <= 1:
            fail(name, "a share in (0, 1]", value)
    if criterion not in ("taylor", "magnitude"):
        fail("criterion", "'taylor' or 'magnitude'", criterion)
    if hardware not in ("macs", "lpvit", None):
        fail("hardware", "'macs', 'lpvit' or None", hardware)
    if calibration is None and masks is None and (criterion == "taylor" or flops is not None):
        what = "criterion='taylor'" if criterion == "taylor" else "flops"
        fail("calibration", f"images beside {what}", None, "criterion='magnitude' with density needs none.")
    if block_shape is not None:
        block_shape = check_positive_ints("block_shape", block_shape, 2)  # type: ignore[assignment]
    elif masks is None:
        fail("block_shape", "(bh, bw) beside density or flops", None)
    block: Any = block_shape

    include, exclude = patterns_of(model, "include", include), patterns_of(model, "exclude", exclude)
    given = None if masks is None else read_masks(masks, model)
    if given is not None:
        block = block or block_shape_of(given)
        include = list(given)
    layers, skipped = prunable(model, None if given else block, include, exclude)
    if not layers and not given:
        some = "; ".join(f"{name}: {reason}" for name, _, reason in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        left = f"Left are {some}{more}." if skipped else ""
        fail("model", "at least one Linear layer to prune", type(model).__name__, left)
    taylor = criterion == "taylor" and given is None
    if density is not None:
        lowest = lowest_density([Blocks.elements_of(x.weight, block) for x in layers.values()], density)
        _check_reached("density", lowest, density)
    seen = Observed()
    if calibration is not None:
        seen = observe(model, layers, _linears(model), calibration, gradients=taylor)
        _drop_unseen(layers, skipped, seen, taylor)
    before = _cost(model, seen), sum(layer.weight.numel() for layer in layers.values())
    chosen = (
        _masked(model, layers, skipped, given, block)
        if given is not None
        else _allocated(layers, seen, taylor, block, hardware, targets, before[0])
    )
    report = SparsityReport(type(model).__name__)
    made: dict[nn.Module, nn.Module] = {}
    for name, (linear, keep) in chosen.items():
        if keep.all():
            skipped.append((name, "Linear", "all of its blocks are kept"))
            continue
        sparse = made[linear] = BlockSparseLinear.from_linear(linear, block, keep, backend=backend)
        rows = seen.rows.get(name)
        elements = int((Blocks.elements_of(linear.weight, block) * keep).sum())
        layer = SparseLayer(
            name,
            (linear.out_features, linear.in_features),
            block,
            keep.numel(),
            int(keep.sum()),
            elements,
            rows,
            device=linear.weight.device.type,
            dtype=linear.weight.dtype,
        )
        if measure:
            layer.speed = measure_speed(linear, sparse, math.ceil(rows or 1))
        report.layers.append(layer)
    pruned = sum(math.prod(layer.shape) - layer.elements for layer in report.layers)
    report.density = 1 - pruned / max(1, before[1])
    replace(model, made)
    if before[0]:
        saved = sum((math.prod(layer.shape) - layer.elements) * (layer.rows or 0) for layer in report.layers)
        report.flops = 1 - saved / before[0]
    report.skipped = skipped
    if verbose:
        print(report)
    return report


def densify(model: nn.Module) -> int:
    """Turns every `nn.BlockSparseLinear` of a model into a Linear, zeros where nothing was stored. Returns how many."""
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", model, kind=TypeError)
    made: dict[nn.Module, nn.Module] = {
        module: module.to_linear() for module in model.modules() if isinstance(module, BlockSparseLinear)
    }
    replace(model, made)
    return len(made)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, BlockSparseLinear))
    }


def _cost(model: nn.Module, seen: Observed) -> float:
    """Multiply-adds an image of all linear layers; 0 where none was observed."""
    return sum(
        seen.rows.get(name, 0) * (m.values if isinstance(m, BlockSparseLinear) else m.weight).numel()  # type: ignore
        for name, m in _linears(model).items()
    )


def _drop_unseen(layers: dict[str, nn.Linear], skipped: Skipped, seen: Observed, taylor: bool) -> None:
    for name in list(layers):
        if name not in seen.rows:
            reason = "its forward was not called; its weight may be used directly"
        elif taylor and name not in seen.gradients:
            reason = "no gradient reaches it"
        else:
            continue
        del layers[name]
        skipped.append((name, "Linear", reason))


def _allocated(
    layers: dict[str, nn.Linear],
    seen: Observed,
    taylor: bool,
    block: tuple[int, int],
    hardware: str | None,
    targets: dict[str, float],
    whole: float,
) -> _Chosen:
    """The blocks to keep for a density or a share of the FLOPs."""
    ((argument, target),) = targets.items()
    described, shapes = {}, {}
    for name, linear in layers.items():
        blocks = Blocks.of(linear.weight, seen.gradients.pop(name, None) if taylor else None, block)
        if not blocks.square.isfinite().all():
            fail("calibration", "finite weights and gradients", f"others in {name}")
        rows, count = seen.rows.get(name, 1.0), blocks.score.numel()
        costs = {
            "macs": linear.weight.numel() * rows,
            "lpvit": count * max(1, linear.in_features // 16),
            None: 1.0,
        }
        unit = rows if argument == "flops" else 1.0
        described[name] = describe_layer(blocks, taylor, costs[hardware], unit)
        shapes[name] = blocks.score.shape
    prunable_units = sum(float(layer.kept[0]) * layer.unit for layer in described.values())
    fixed = max(0.0, whole - prunable_units) if argument == "flops" else 0.0
    levels = allocate(described, target, fixed)
    remaining = sum(float(layer.kept[levels[name]]) * layer.unit for name, layer in described.items())
    reached = (remaining + fixed) / (prunable_units + fixed)
    _check_reached(argument, reached, target)
    return {
        name: (linear, keep_mask(described[name], levels[name], shapes[name]))
        for name, linear in layers.items()
    }


def _check_reached(argument: str, reached: float, target: float) -> None:
    if reached > target * (1 + 1e-9):
        fail(
            argument,
            f"at least {reached:.4f}, where every layer is at its lowest",
            target,
            "Classifiers and small layers are left dense unless included." if argument == "flops" else "",
        )


def _masked(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    skipped: Skipped,
    given: dict[str, Tensor],
    block: tuple[int, int],
) -> _Chosen:
    """The blocks that masks keep. Convolutions are masked here, after all masks are known to fit."""
    chosen: _Chosen = {}
    skipped[:] = [
        (name, cls, "has no mask" if reason == "not included" else reason) for name, cls, reason in skipped
    ]
    for name, linear in layers.items():
        keep = block_mask(given[name], block)
        if keep is None:
            fail("masks", f"{name}.weight_mask constant inside each block {block}", given[name])
        else:
            chosen[name] = linear, keep.to(linear.weight.device)
    for name, mask in given.items():
        conv = model.get_submodule(name)
        if isinstance(conv, nn.Conv2d):
            with torch.no_grad():
                conv.weight.mul_(mask.to(conv.weight))
            skipped.append(
                (name, "Conv2d", "a convolution: zeros are put into its weight, which stays dense")
            )
    return chosen
