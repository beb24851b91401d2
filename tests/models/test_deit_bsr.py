from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from randomise import relative_error
from timm_import import import_timm
from torch import nn

import vitkernels
from vitkernels import models
from vitkernels.nn import BlockSparseLinear

timm = import_timm()
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "num_classes": 10, "block_shape": 16}


def timm_model(distilled: bool = False, **options) -> nn.Module:
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    sizes = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "num_classes": 10}
    model = timm.create_model(name, **{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    ("name", "theirs", "blocks"),
    [
        ("deit_small_bsr", "deit_small_patch16_224", 1_769_472),
        ("deit_base_bsr", "deit_base_patch16_224", 7_077_888),
        ("deit_small_bsr", "deit_small_distilled_patch16_224", 1_769_472),
    ],
)
def test_names_and_shapes_are_those_of_timm(name: str, theirs: str, blocks: int) -> None:
    with torch.device("meta"):
        dense = models.create_model(name, density=1.0, distilled="distilled" in theirs)
        expected = {key: value.shape for key, value in timm.create_model(theirs).state_dict().items()}
        sparse = models.create_model(name)
    assert {key: value.shape for key, value in dense.state_dict().items()} == expected
    stored = sum(m.values.numel() for m in sparse.modules() if isinstance(m, BlockSparseLinear))
    assert stored == 12 * blocks // 2
    assert sparse.get_submodule("blocks.0.attn.qkv").block_shape == (32, 32)


@pytest.mark.parametrize("distilled", [False, True])
def test_reads_a_dense_checkpoint_of_timm(tmp_path, distilled: bool) -> None:
    theirs, images = timm_model(distilled), torch.randn(2, 3, 64, 64)
    torch.save({"model": theirs.state_dict()}, tmp_path / "dense.pth")
    weights = {"weights": tmp_path / "dense.pth"}
    dense = models.create_model("deit_small_bsr", density=1.0, **weights, **SMALL).eval()
    with torch.no_grad():
        assert relative_error(dense(images), theirs(images)) < 1e-5
    model = models.create_model("deit_small_bsr", density=0.5, **weights, **SMALL).eval()
    vitkernels.sparsify(theirs, 16, density=0.5, criterion="magnitude", include="blocks", verbose=False)
    with torch.no_grad():
        assert relative_error(model(images), theirs(images)) < 1e-5
    assert model.state_dict().keys() == theirs.state_dict().keys()
    if distilled:
        first, second = model.train()(images)
        assert torch.allclose((first + second) / 2, model.eval()(images), atol=1e-6)


def test_reads_a_block_sparse_checkpoint(tmp_path) -> None:
    source, images = timm_model(), torch.randn(2, 3, 64, 64)
    report = vitkernels.sparsify(source, 16, flops=0.6, calibration=images, verbose=False)
    torch.save(source.state_dict(), tmp_path / "sparse.pth")
    for density in (0.5, 1.0):  # whatever the model would have had
        model = models.create_model(
            "deit_small_bsr", weights=tmp_path / "sparse.pth", density=density, **SMALL
        ).eval()
        found = {name for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
        assert found == {layer.name for layer in report.layers}
        with torch.no_grad():
            assert relative_error(model(images), source(images)) < 1e-5
    torch.save(model.state_dict(), tmp_path / "again.pth")
    again = models.create_model("deit_small_bsr", weights=tmp_path / "again.pth", **SMALL).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_files_that_do_not_fit(tmp_path) -> None:
    torch.save(timm_model(embed_dim=96).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match=r"(?s)does not fit DeiT.*cls_token: file \[1, 1, 96\], model \[1, 1, 64\]"
    ):
        models.create_model("deit_small_bsr", weights=tmp_path / "wide.pth", **SMALL)
    torch.save(timm_model().state_dict(), tmp_path / "ten.pth")
    with pytest.raises(
        ValueError, match=r"(?s)head\.weight: file \[10, 64\], model \[3, 64\].*reset_classifier"
    ):
        models.create_model("deit_small_bsr", weights=tmp_path / "ten.pth", **{**SMALL, "num_classes": 3})
    assert models.create_model("deit_small_bsr", weights=tmp_path / "ten.pth", **{**SMALL, "num_classes": 0})
    with pytest.raises(ValueError, match="`num_heads`: expected a divisor of embed_dim=64"):
        models.create_model("deit_small_bsr", **{**SMALL, "num_heads": 3})


def test_another_image_size_resizes_the_position_embeddings(tmp_path) -> None:
    theirs = timm_model()
    torch.save(theirs.state_dict(), tmp_path / "dense.pth")
    model = models.create_model(
        "deit_small_bsr", weights=tmp_path / "dense.pth", density=1.0, **{**SMALL, "img_size": (96, 64)}
    )
    from timm.layers import resample_abs_pos_embed

    expected = resample_abs_pos_embed(theirs.pos_embed, (6, 4), (4, 4), num_prefix_tokens=1)
    assert relative_error(model.pos_embed, expected) < 1e-5
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 10)


def test_trains_and_keeps_its_pattern() -> None:
    model = models.create_model("deit_small_bsr", drop_path_rate=0.1, **SMALL).train()
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    patterns = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("indices")}
    assert len(patterns) == 16
    images, labels, losses = torch.randn(8, 3, 64, 64), torch.arange(8), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in patterns.items())


def test_compiles_as_one_graph() -> None:
    model, images = models.create_model("deit_small_bsr", **SMALL).eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(images), model(images)) < 1e-5


def test_an_image_of_another_size_is_refused() -> None:
    model = models.create_model("deit_small_bsr", **{**SMALL, "img_size": (64, 32)})
    for shape in ((80, 32), (32, 64), (16, 128)):
        with pytest.raises(
            ValueError, match=r"argument `x`: expected images of 64 x 32.*img_size=\(\d+, \d+\)"
        ):
            model(torch.zeros(1, 3, *shape))
    assert model(torch.zeros(1, 3, 70, 40)).shape == (1, 10), "the edge beyond the last patch is cut"
