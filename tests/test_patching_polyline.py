from __future__ import annotations

import copy
import pickle

import plain_polyline as official
import pytest
import torch
from randomise import relative_error
from torch import nn

import vitkernels


class Model(nn.Module):
    """Blocks as of PPMA, on the official classes: a stage makes sines and cosines for its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.Relpos = official.RotaryPositionEmbedding2D(8)
        self.blocks = nn.ModuleList(
            cls(16, 2)
            for cls in (
                official.MambaAttentionChunkDouble,
                official.MambaAttentionChunkDouble,
                official.MambaAttentionAllDouble,
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rel_pos = self.Relpos(x.shape[1:3])
        for block in self.blocks:
            x = x + block(x, rel_pos)
        return x


def image(height: int = 5, width: int = 6) -> torch.Tensor:
    return torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(1))


def applied(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    assert not vitkernels.apply(model, verbose=False, **options).skipped
    return model


def test_the_official_layers_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = Model(), image(), []
    before, keys = model(x), list(model.state_dict())
    report = vitkernels.apply(model, backend="reference", verbose=False)
    assert report.skipped == []
    assert [entry[1:] for entry in report.replaced] == [
        *[("MambaAttentionChunkDouble", "polyline_path_attention")] * 2,
        ("MambaAttentionAllDouble", "polyline_path_attention"),
    ]
    original = vitkernels.ops.polyline_path_attention

    def spy(*args, **kwargs):
        calls.append((kwargs["mode"], kwargs["scale"], kwargs["backend"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(vitkernels.ops, "polyline_path_attention", spy)
    assert relative_error(model(x), before) < 1e-6
    assert calls == [(mode, 8**-0.5, "reference") for mode in ("criss_cross", "criss_cross", "whole")]
    assert list(model.state_dict()) == keys
    assert str(vitkernels.apply(model, backend="reference", verbose=False)) == str(report)
    assert all(isinstance(block, official.Attention) for block in model.blocks)
    assert vitkernels.revert(model) == 3
    assert torch.equal(model(x), before)
    assert len(calls) == 3


@pytest.mark.parametrize("train", [True, False])
def test_gradients_and_copies(train: bool) -> None:
    theirs = Model().double().train(train)
    ours = applied(theirs)
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert ours.training is train
    for model in (theirs, ours):
        model(image().double()).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-10, name


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 3), (14, 14)], ids=str)
def test_maps_of_any_size(size: tuple[int, int]) -> None:
    model, x = Model(), image(*size)
    assert relative_error(applied(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, x = Model(), image()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype):
        got, baseline = applied(model)(x), model(x)
    assert got.dtype is baseline.dtype
    assert relative_error(got, exact) < 2 * relative_error(baseline, exact)


def test_compiles_as_one_graph() -> None:
    model, x = applied(Model()), image()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_a_fresh_copy_has_the_parameters_of_ours() -> None:
    theirs = official.MambaAttentionChunkDouble(16, 2)
    ours = vitkernels.nn.PolylinePathAttention(16, 2, mode="criss_cross")
    ours.load_state_dict(theirs.state_dict())
    x = image()
    rel_pos = official.RotaryPositionEmbedding2D(8)(x.shape[1:3])
    assert relative_error(ours(x, rel_pos), theirs(x, rel_pos)) < 1e-6


class PathMixer(official.Attention):
    """A copy under another name."""

    def __init__(self, chunks: bool = True) -> None:
        self.chunks = chunks
        super().__init__(16, 2)


class OnePath(PathMixer):
    """Only the path that goes vertically first, as in the paper's ablation."""

    def mix(self, q, k, v, a, b):
        rows, columns = official.tables(a, b)
        scores = torch.einsum("biknd,bjlnd->bnikjl", q, k)
        mask = rows.unsqueeze(4) + columns.permute(0, 1, 3, 4, 2).unsqueeze(3)
        p = (scores + mask).flatten(-2).softmax(-1).view(scores.shape)
        return torch.einsum("bnikjl,bjlnd->biknd", p, v)


class HalvesTurned(PathMixer):
    """The rotary embedding that pairs a channel with the one half a head further."""

    def turn(self, x, rel_pos):
        order = torch.arange(x.shape[-1]).view(2, -1).t().flatten()
        return super().turn(x[..., order], rel_pos)[..., order.argsort()]


class Unscaled(PathMixer):
    def mix(self, q, k, v, a, b):
        return super().mix(q, k / self.scaling, v, a, b)


class DecaysSwapped(PathMixer):
    def mix(self, q, k, v, a, b):
        return super().mix(q, k, v, b, a)


class Dropping(PathMixer):
    """Dropout, which eval mode does not show."""

    def mix(self, q, k, v, a, b):
        return nn.functional.dropout(super().mix(q, k, v, a, b), 0.1, self.training)


class WrongWhenWhole(PathMixer):
    def mix(self, q, k, v, a, b):
        return super().mix(q, k, v, a, b if self.chunks else 2 * b)


@pytest.mark.parametrize("chunks", [True, False])
def test_a_copy_of_another_name_is_known_by_its_parameters(chunks: bool) -> None:
    layer, x = PathMixer(chunks), image()
    rel_pos = official.RotaryPositionEmbedding2D(8)(x.shape[1:3])
    expected = layer(x, rel_pos)
    report = vitkernels.apply(layer, verbose=False)
    assert report.replaced == [("", "PathMixer", "polyline_path_attention")]
    assert relative_error(layer(x, rel_pos), expected) < 1e-6


@pytest.mark.parametrize("cls", [OnePath, HalvesTurned, Unscaled, DecaysSwapped, Dropping])
def test_a_layer_that_computes_something_else_is_left(cls: type) -> None:
    report = vitkernels.apply(nn.Sequential(cls(cls is not OnePath)), verbose=False)
    assert report.replaced == []
    assert "computes something else" in report.skipped[0][2]


def test_layers_of_the_same_parameters_but_other_modes_are_proven_one_by_one() -> None:
    report = vitkernels.apply(nn.Sequential(WrongWhenWhole(True), WrongWhenWhole(False)), verbose=False)
    assert [name for name, *_ in report.replaced] == ["0"]
    assert [name for name, *_ in report.skipped] == ["1"]


def test_reasons() -> None:
    def reason(layer: nn.Module) -> str:
        return vitkernels.apply(nn.Sequential(layer), verbose=False).skipped[0][2]

    layer = PathMixer()
    del layer.path_embed.chunkwise_recurrent
    assert reason(layer) == "whether it is whole or criss-cross attention cannot be told"
    layer.q_proj = nn.Identity()
    assert reason(layer) == "q_proj is not a Linear"
    named = official.MambaAttentionAllDouble(16, 2)
    named.path_embed.dt_linear = nn.Linear(8, 2)
    assert reason(named) == "path_embed.dt_linear is not a Linear to two decays without a bias"
    del named.path_embed.A_log
    assert reason(named) == "path_embed has no attribute A_log"
    del named.lepe
    assert reason(named) == "has no attribute lepe"
    named = official.MambaAttentionAllDouble(16, 2)
    named.forward = named.forward
    assert "already replaced on the instance" in reason(named)


def test_models_of_this_package_take_a_backend_and_fold_nothing_wrong() -> None:
    small = {"embed_dims": (16,) * 4, "depths": (1, 1, 1, 1), "num_heads": (2, 1, 2, 1), "num_classes": 10}
    model, x = vitkernels.models.create_model("ppma_t", **small).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        report = vitkernels.apply(model, backend="reference", verbose=False)
        attention = [entry for entry in report.replaced if entry[2] == "polyline_path_attention"]
        assert [entry[1] for entry in attention] == ["PolylinePathAttention"] * 4
        assert relative_error(model(x), before) < 1e-5
        assert vitkernels.revert(model) == len(report.replaced)
        assert torch.equal(model(x), before)
