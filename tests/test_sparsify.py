from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from randomise import relative_error
from sparsify_calls import Network, batches
from timm_import import import_timm
from torch import nn

import vitkernels
from vitkernels.bench.photo import load_photo, normalize, random_crops
from vitkernels.nn import BlockSparseLinear
from vitkernels.sparsity import SparseLayer, SparsityReport
from vitkernels.sparsity.allocation import (
    LEVELS,
    allocate,
    describe_layer,
    distortion,
    kept_blocks,
    last_level,
    slopes,
    smooth,
)
from vitkernels.sparsity.criterion import Blocks, observe

timm = import_timm()


def photographs(count: int, size: int) -> torch.Tensor:
    return normalize(random_crops(load_photo()[0], count, size, torch.Generator().manual_seed(3)))


LAYERS = ("embed", "fc1", "fc2", "wide")


def densities(model: nn.Module) -> dict[str, float]:
    return {name: m.density for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def plain_blocks(weight: torch.Tensor, block: tuple[int, int]) -> list[tuple[tuple[int, int], torch.Tensor]]:
    return [
        ((i, j), part)
        for i, band in enumerate(weight.split(block[0], 0))
        for j, part in enumerate(band.split(block[1], 1))
    ]


def test_the_criterion_is_the_plain_computation() -> None:
    model, block = Network().double(), (8, 16)
    frozen = copy.deepcopy(model).requires_grad_(False)
    data = [batch.double() for batch in batches()]
    layers = {name: frozen.get_submodule(name) for name in LAYERS}
    seen = observe(frozen, layers, layers, [(batch, "label") for batch in data], gradients=True)
    (model(torch.cat(data)).square().mean()).backward()
    assert {name: round(rows) for name, rows in seen.rows.items()} == {
        "embed": 6,
        "fc1": 6,
        "fc2": 6,
        "wide": 1,
    }
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    for name, layer in layers.items():
        gradient = model.get_submodule(name).weight.grad
        assert relative_error(seen.gradients[name], gradient) < 1e-6
        product = layer.weight * gradient
        blocks = Blocks.of(layer.weight, gradient, block)
        for place, part in plain_blocks(product, block):
            assert blocks.score[place].item() == pytest.approx(part.abs().mean().item(), rel=1e-12)
            assert blocks.elements[place] == part.numel()
        # the blocks that stay are those of the highest scores
        described = describe_layer(blocks, True, 1.0, 1.0)
        scores = sorted((part.abs().mean().item(), place) for place, part in plain_blocks(product, block))
        order = [divmod(int(i), blocks.score.shape[1]) for i in described.order]
        assert order == [place for _, place in scores]
    magnitude = Blocks.of(layers["fc1"].weight, None, block)
    for place, part in plain_blocks(layers["fc1"].weight, block):
        assert magnitude.score[place].item() == pytest.approx(part.abs().mean().item(), rel=1e-12)


def test_the_distortion_is_the_second_order_form() -> None:
    """Against the quadratic form with the whole matrix g g^T + 1e-7 I."""
    weight, gradient, block = torch.randn(10, 9).double(), torch.randn(10, 9).double(), (4, 3)
    blocks = Blocks.of(weight, gradient, block)
    order = blocks.score.flatten().argsort(stable=True)
    pruned = torch.tensor([len(order) - kept_blocks(len(order), level) for level in range(LEVELS + 1)])
    curve = distortion(blocks, order, pruned)
    parts = dict(plain_blocks(weight.clone(), block))
    gone, fisher = torch.zeros_like(weight), torch.outer(gradient.flatten(), gradient.flatten())
    hessian, position = fisher + 1e-7 * torch.eye(90), 0
    places = dict(plain_blocks(gone, block))
    assert curve[0] == 0
    for level in range(LEVELS + 1):
        while position < pruned[level]:
            place = divmod(int(order[position]), blocks.score.shape[1])
            places[place].copy_(-parts[place])  # a view of gone
            position += 1
        flat = gone.flatten()
        expected = (gone * gradient).square().mean() + flat @ hessian @ flat / 2
        assert curve[level].item() == pytest.approx(expected.item(), rel=1e-9)


def test_smoothing_and_slopes() -> None:
    line = torch.arange(101).double() / 100
    assert torch.allclose(slopes(3 * line), torch.full((101,), 3.0).double())
    cubic = slopes(line**3)
    assert torch.allclose(cubic[4:-4], 3 * line[4:-4] ** 2)  # five points are exact up to the fourth degree
    constant = torch.full((101,), 2.0).double()
    assert torch.allclose(smooth(constant), constant)
    assert smooth(torch.tensor([1.0, 4.0]).double()).tolist() == pytest.approx([1.0, (0.25 + 2) / 0.75])


@pytest.mark.parametrize("hardware", ["macs", "lpvit", None])
@pytest.mark.parametrize("target", ["density", "flops"])
def test_targets_are_reached_and_monotone(target: str, hardware: str | None) -> None:
    source, block, before = Network(), (8, 12), None
    total = sum(source.get_submodule(name).weight.numel() for name in LAYERS)
    cost = {name: source.get_submodule(name).weight.numel() * (1 if name in ("wide", "head") else 6) for name in
            (*LAYERS, "head")}  # fmt: skip
    for share in (0.9, 0.7, 0.5, 0.3, 0.1):
        model = copy.deepcopy(source)
        report = vitkernels.sparsify(
            model, block, **{target: share}, calibration=batches(), hardware=hardware, verbose=False
        )
        kept = dict.fromkeys(LAYERS, 1.0) | densities(model)
        weights = {
            name: (m.to_linear() if isinstance(m, BlockSparseLinear) else m).weight
            for name, m in model.named_modules()
            if name in cost
        }
        remaining = {name: int((weight != 0).sum()) for name, weight in weights.items()}
        assert report.density == pytest.approx(sum(remaining[name] for name in LAYERS) / total)
        flops = sum(remaining[name] * cost[name] / weights[name].numel() for name in cost) / sum(
            cost.values()
        )
        assert report.flops == pytest.approx(flops)
        # At most the target, and no further from it than the largest block of a layer.
        assert share - 0.06 < getattr(report, target) <= share + 1e-9
        for name, density in kept.items():
            rows, columns = source.get_submodule(name).weight.shape
            count = -(-rows // 8) * -(-columns // 12)
            assert round(density * count) in {kept_blocks(count, level) for level in range(LEVELS + 1)}
            assert before is None or density <= before[name]
        before = kept


def test_keep_counts() -> None:
    assert kept_blocks(1152, 0) == 1152
    assert kept_blocks(2304, 50) == 1152  # DeiT-B's fc1 at half density, 32x32
    assert [kept_blocks(7, level) for level in (1, 15, 58, 99, 100)] == [6, 5, 2, 0, 0]


def test_cheaper_and_less_important_layers_go_first() -> None:
    def layer(scale: float, cost: float):
        weight = torch.full((64, 64), scale).double() * torch.linspace(0.5, 1.5, 4096).double().view(64, 64)
        return describe_layer(Blocks.of(weight, None, (8, 8)), False, cost, 1.0)

    levels = allocate({"small": layer(1.0, 1.0), "large": layer(2.0, 1.0)}, 0.5)
    assert levels["small"] > levels["large"]
    assert 98 <= sum(levels.values()) <= 100
    levels = allocate({"cheap": layer(1.0, 1.0), "dear": layer(1.0, 2.0)}, 0.5)
    assert levels["dear"] > levels["cheap"] > 0  # a costly layer saves more
    assert set(allocate({"one": layer(1.0, 1.0), "two": layer(1.0, 1.0)}, 1.0).values()) == {0}


def masked_copy(dense: nn.Module, sparse: nn.Module) -> nn.Module:
    """The dense model, zeros put where the sparse one stores nothing."""
    masked = copy.deepcopy(dense)
    for name, module in sparse.named_modules():
        if isinstance(module, BlockSparseLinear):
            ones = module.weight.with_values(torch.ones_like(module.values)).to_dense()
            masked.get_submodule(name).weight.data.mul_(ones)
    return masked


def test_deit_small_at_half_density(tmp_path) -> None:
    model = timm.create_model("deit_small_patch16_224", num_classes=4).eval()
    dense, images = copy.deepcopy(model), photographs(4, 224)
    report = vitkernels.sparsify(model, 32, density=0.5, calibration=images, verbose=False)
    assert 0.4995 < report.density <= 0.5
    assert len(report.layers) + len(report.skipped) == 49
    assert ("head", "Linear", "classifier; name it in `include` to prune it") in report.skipped
    patterns = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("indices")}
    assert len(patterns) == 2 * len(report.layers) > 80
    with torch.no_grad():
        assert relative_error(model(images), masked_copy(dense, model)(images)) < 1e-5

    labels, losses = torch.arange(4), []
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-4, weight_decay=0.05)
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in patterns.items())

    # A model that was sparsified otherwise takes over the pattern, where the same layers are block-sparse.
    torch.save(model.state_dict(), tmp_path / "sparse.pth")
    again = timm.create_model("deit_small_patch16_224", num_classes=4).eval()
    for layer in report.layers:
        linear = again.get_submodule(layer.name)
        again.set_submodule(layer.name, BlockSparseLinear.from_linear(linear, 32, density=0.1))
    again.load_state_dict(torch.load(tmp_path / "sparse.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(images[:1]), model.eval()(images[:1]))


def test_swin() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8),
        num_classes=4,
    ).eval()  # fmt: skip
    dense, images = copy.deepcopy(model), photographs(3, 56)
    report = vitkernels.sparsify(model, 16, flops=0.5, calibration=images, verbose=False)
    assert 0.49 < report.flops <= 0.5
    rows = {layer.name: layer.rows for layer in report.layers}
    assert any("downsample.reduction" in name for name in rows)
    # Tokens, those of padded windows included, fall from stage to stage.
    assert rows["layers.0.blocks.0.mlp.fc1"] == 4 * rows["layers.1.blocks.0.mlp.fc1"] == 196
    assert all(
        layer.kept for layer in report.layers
    )  # no layer goes entirely, though 5 % of 4 blocks are none
    masked = masked_copy(dense, model)
    with torch.no_grad():
        expected = masked(images)
        assert relative_error(model(images), expected) < 1e-5
    assert vitkernels.densify(model) == len(report.layers)
    with torch.no_grad():
        assert relative_error(model(images), expected) < 1e-5
    assert model.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 32)], ids=str)
def test_timm_models(name: str, block: tuple[int, int]) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    dense, images = copy.deepcopy(model), photographs(2, 224)
    report = vitkernels.sparsify(model, block, flops=0.5, calibration=images, verbose=False)
    assert 0.49 < report.flops <= 0.5
    with torch.no_grad():
        assert relative_error(model(images), masked_copy(dense, model)(images)) < 1e-5


def weight_masks(model: nn.Module, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """As LPViT's files have them."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            flat = module.weight.flatten(1)
            grid = -(-flat.shape[0] // block[0]), -(-flat.shape[1] // block[1])
            keep = (torch.rand(grid) < 0.5).float()
            if grid[0] > 1:
                keep[0], keep[1, 0] = 0, 1  # an empty block row
            else:
                keep[0, 0], keep[0, -1] = 1, 0
            spread = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            spread = spread[: flat.shape[0], : flat.shape[1]]
            masks[f"{name}.weight_mask"] = spread.reshape(module.weight.shape).contiguous()
    return masks


def small_vit(**options) -> nn.Module:
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2, depth=2, num_classes=40, **options
    ).eval()


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 32)], ids=str)
def test_masks_of_lpvit(tmp_path, block: tuple[int, int]) -> None:
    model, images = small_vit(), photographs(2, 64)
    masks, masked = weight_masks(model, block), copy.deepcopy(model)
    for key, mask in masks.items():
        masked.get_submodule(key.removesuffix(".weight_mask")).weight.data.mul_(mask)
    file = tmp_path / "masks.pt"
    torch.save(masks, file)
    other = copy.deepcopy(model)
    report = vitkernels.sparsify(model, masks=file, verbose=False)
    assert {layer.block_shape for layer in report.layers} == {block}
    assert {layer.name for layer in report.layers} >= {"blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"}
    assert [(name, cls) for name, cls, _ in report.skipped] == [("patch_embed.proj", "Conv2d")]
    with torch.no_grad():
        assert relative_error(model(images), masked(images)) < 1e-5
    # a fine-tuned checkpoint, wrapped and with its weights beside the masks; another, smaller block
    checkpoint = {"model": {f"module.{key}": value for key, value in {**masks, **other.state_dict()}.items()}}
    report = vitkernels.sparsify(other, (8, 8), masks=checkpoint, exclude="head", verbose=False)
    assert ("head", "Linear", "excluded") in report.skipped
    masked.head = other.head
    with torch.no_grad():
        assert relative_error(other(images), masked(images)) < 1e-5


@pytest.mark.parametrize(
    "out", [(), (torch.ones(2), None), {"logits": torch.ones(2)}], ids=["none", "some", "dict"]
)
def test_a_model_that_does_not_return_tensors_is_refused(out: object) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda *_: out)
    with pytest.raises(
        TypeError, match="argument `model`: expected a model that returns a tensor or a tuple of"
    ):
        observe(model, {"0": model[0]}, {}, torch.ones(2, 2), gradients=True)


def test_a_layer_keeps_a_twentieth_or_half_of_the_target() -> None:
    assert [last_level(target) for target in (0.9, 0.1, 0.05, 0.02, 0.001)] == [95, 95, 97, 99, 99]


def test_masks_that_do_not_fit() -> None:
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    masks = weight_masks(model, (16, 16))
    name = "blocks.0.attn.proj.weight_mask"
    mixed = masks[name].clone()
    mixed[3, 5] = 1 - mixed[3, 5]
    for changed, message in (
        ({**masks, name: mixed}, r"blocks\.0\.attn\.proj\.weight_mask constant inside each block \(16, 16\)"),
        ({**masks, name: masks[name][:32]}, r"weight's shape \[64, 64\]"),
        ({**masks, name: masks[name] * 0.5}, r"of 0 and 1"),
        ({**masks, "blocks.7.attn.proj.weight_mask": mixed}, r"under the name 'blocks\.7\.attn\.proj'"),
        ({"weight": mixed}, r"at least one entry"),
    ):
        with pytest.raises(ValueError, match=message):
            vitkernels.sparsify(model, 16, masks=changed, verbose=False)
    with pytest.raises(ValueError, match="constant inside blocks of one of 128x128"):
        vitkernels.sparsify(model, masks={**masks, name: mixed}, verbose=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Special(nn.Linear):
    pass


def test_what_is_left_and_why() -> None:
    model = Network()
    model.special, model.tied, model.tiny = Special(64, 64), nn.Linear(40, 70), nn.Linear(40, 4)
    model.tied.weight = model.fc1.weight
    model.hooked, model.unused = nn.Linear(64, 64), nn.Linear(64, 64)
    model.hooked.register_forward_hook(lambda *_: None)
    model.twice = model.fc2
    report = vitkernels.sparsify(
        model, 16, density=0.5, calibration=batches(), exclude=["embed"], verbose=False
    )
    reasons = {name: reason for name, _, reason in report.skipped}
    assert "smaller than a block" in reasons.pop("tiny")
    assert "classifier" in reasons.pop("head")
    assert "subclass" in reasons.pop("special")
    assert "hooks" in reasons.pop("hooked")
    assert "not called" in reasons.pop("unused")
    assert reasons.pop("embed") == "excluded"
    assert reasons.pop("fc1") == reasons.pop("tied") == "shares its weight with another module"
    assert model.twice is model.fc2
    assert isinstance(model.fc2, BlockSparseLinear)
    assert set(reasons) | {layer.name for layer in report.layers} == {"fc2", "wide"}
    again = vitkernels.sparsify(
        model, 16, density=0.5, criterion="magnitude", include="unused", verbose=False
    )
    assert "block-sparse already" in {name: reason for name, _, reason in again.skipped}["fc2"]


def test_the_report_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = Network()
    report = vitkernels.sparsify(model, (8, 16), flops=0.5, calibration=batches())
    text = str(report)
    assert capsys.readouterr().out == f"{text}\n"
    lines = text.splitlines()
    counts = (
        f"{len(report.layers)} layers of Network sparsified in blocks of 8x16, {len(report.skipped)} left"
    )
    assert lines[0] == f"vitkernels: {counts}"
    assert lines[1].split() == ["layer", "shape", "blocks", "kept", "density", "expected", "speed"]
    layer = report.layers[0]
    assert lines[2].split()[:4] == [layer.name, "x".join(map(str, layer.shape)), str(layer.kept), "of"]
    assert lines[2].endswith(f"at most {layer.blocks / layer.kept:.2f}x")
    assert lines[-1].endswith("of the FLOPs of its Linear layers.")
    timed = vitkernels.sparsify(
        Network(), 8, density=0.5, criterion="magnitude", include="fc1", measure=True, verbose=False
    )
    assert timed.layers[0].speed > 0
    assert "measured" in str(timed)


def test_the_report_says_which_layers_the_dense_one_beats() -> None:
    def layer(kept: int, **options: Any) -> SparseLayer:
        values = {"block_shape": (32, 32), "rows": 197.0, **options}
        return SparseLayer(f"at {kept}", (3072, 768), blocks=100, kept=kept, elements=1, **values)

    speeds = [layer(kept).expected for kept in (5, 20, 50, 95)]
    assert speeds == sorted(speeds, reverse=True)
    assert all(0.7 / d < speed < 1 / d for speed, d in zip(speeds[1:3], (0.2, 0.5), strict=True))
    assert [layer(kept).slower for kept in (5, 20, 50, 95)] == [False, False, False, True]
    unknown = [{"device": "cuda"}, {"dtype": torch.bfloat16}, {"block_shape": (16, 16)}, {"rows": 1.0}]
    assert all(layer(50, **options).expected is None for options in unknown)
    assert layer(50, speed=0.8).slower
    assert layer(50, speed=1.7, device="cuda").expected == 1.7
    report = SparsityReport("Network", [layer(20), layer(95), layer(50, device="cuda")])
    lines = str(report).splitlines()
    assert lines[2].endswith(f"about {speeds[1]:.2f}x")
    assert lines[4].endswith("at most 2.00x")
    assert lines[5] == "expected to be slower than dense: at 95; exclude them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"`density`: expected exactly one of density, flops and masks"),
        ({"density": 0.5, "flops": 0.5}, r"`density`: expected exactly one"),
        ({"density": 0.0}, r"`density`: expected a share in \(0, 1\]"),
        ({"density": 0.5, "criterion": "random"}, r"`criterion`"),
        ({"density": 0.5, "hardware": "gpu"}, r"`hardware`"),
        ({"density": 0.5}, r"`calibration`: expected images beside criterion='taylor'"),
        ({"flops": 0.5, "criterion": "magnitude"}, r"`calibration`: expected images beside flops"),
        ({"density": 0.5, "calibration": []}, r"`calibration`: expected at least one batch"),
        ({"density": 0.5, "calibration": ["text"]}, r"`calibration`: expected a tensor of images"),
        ({"density": 0.5, "criterion": "magnitude", "block_shape": None}, r"`block_shape`"),
        (
            {"density": 0.5, "criterion": "magnitude", "include": ["fc1", "f1"]},
            r"`include`: expected names or patterns of Linear layers, such as 'fc1', .*; got 'f1'\.$",
        ),
        ({"density": 0.5, "criterion": "magnitude", "exclude": "blocks.*"}, r"`exclude`: .*got 'blocks\.\*'"),
        (
            {"density": 0.5, "criterion": "magnitude", "exclude": ["*"]},
            r"`model`: expected at least one Linear.*Left are embed: excluded; .*; and 2 more\.",
        ),
        ({"density": 0.5, "criterion": "magnitude", "include": [3]}, r"`include`"),
        ({"flops": 0.5, "calibration": 3}, r"`calibration`: expected a tensor of images .*got 3\.$"),
        ({"flops": 1e-3, "calibration": torch.randn(2, 6, 12)}, r"`flops`: expected at least 0\.0"),
        (
            {"density": 0.5, "calibration": torch.full((2, 6, 12), torch.nan)},
            r"`calibration`: expected finite",
        ),
        ({"density": 0.5, "criterion": "magnitude", "backend": "cudnn"}, r"`backend`"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    model = Network()
    with pytest.raises((TypeError, ValueError), match=message):
        vitkernels.sparsify(model, **{"block_shape": 8, **options}, verbose=False)
    assert densities(model) == {}
    with pytest.raises(ValueError, match="For one layer"):
        vitkernels.sparsify(nn.Linear(64, 64), 8, density=0.5, criterion="magnitude", verbose=False)


def test_several_outputs_and_frozen_weights() -> None:
    class Pair(Network):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = super().forward(x)
            return out, 2 * out

    model = Pair().requires_grad_(False)
    with torch.no_grad():
        report = vitkernels.sparsify(model, 8, density=0.5, calibration=batches()[0], verbose=False)
    assert report.layers
    assert not any(p.requires_grad for p in model.parameters())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
