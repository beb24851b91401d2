from __future__ import annotations

import copy
import pickle

import plain_neighborhood as natten
import pytest
import torch
from randomise import relative_error
from torch import nn

import vitkernels


class Model(nn.Module):
    """Blocks as of DiNAT, on NATTEN's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            natten.NeighborhoodAttention2D(16, 2, 3, dilation=d, rel_pos_bias=True) for d in (1, 2, 1)
        )
        self.last = natten.NeighborhoodAttention1D(16, 2, 4, dilation=2, is_causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x.flatten(1, 2))


def image() -> torch.Tensor:
    return torch.randn(2, 7, 6, 16, generator=torch.Generator().manual_seed(1))


def test_nattens_layers_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = Model(), image(), []
    before = model(x)
    report = vitkernels.apply(model, backend="reference", verbose=False)
    assert report.skipped == []
    assert report.others == 8  # the projections
    assert [entry[1:] for entry in report.replaced] == [
        *[("NeighborhoodAttention2D", "neighborhood_attention")] * 3,
        ("NeighborhoodAttention1D", "neighborhood_attention"),
    ]
    original = vitkernels.ops.neighborhood_attention

    def spy(*args, **kwargs):
        calls.append((args[3], kwargs["dilation"], kwargs["is_causal"], kwargs["backend"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(vitkernels.ops, "neighborhood_attention", spy)
    assert relative_error(model(x), before) < 1e-6
    assert calls == [
        *(((3, 3), (d, d), (False, False), "reference") for d in (1, 2, 1)),
        ((4,), (2,), (True,), "reference"),
    ]
    assert vitkernels.revert(model) == 4
    assert torch.equal(model(x), before)
    assert len(calls) == 4


def test_training_and_copies() -> None:
    theirs = Model().double()
    ours = copy.deepcopy(theirs)
    vitkernels.apply(ours, verbose=False)
    ours = pickle.loads(pickle.dumps(ours))
    for model in (theirs, ours):
        model(image().double()).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-11, name
    assert ours.state_dict().keys() == theirs.state_dict().keys()


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_bias_that_is_parametrised_after_apply_stays_so() -> None:
    layer, x = vitkernels.nn.NeighborhoodAttention2D(32, 2, 3, rel_pos_bias=True), torch.randn(1, 5, 6, 32)
    vitkernels.apply(layer, verbose=False)
    nn.utils.parametrize.register_parametrization(layer, "rpb", Doubled())
    expected, twin = layer(x), copy.deepcopy(layer)
    vitkernels.apply(layer, verbose=False)
    assert torch.equal(layer(x), expected)
    assert vitkernels.revert(layer) == 1
    assert vitkernels.revert(layer) == 0
    torch.testing.assert_close(layer(x), expected)
    nn.utils.parametrize.remove_parametrizations(layer, "rpb")
    assert type(layer) is vitkernels.nn.NeighborhoodAttention2D
    assert vitkernels.revert(twin) == 1
    torch.testing.assert_close(twin(x), expected)


def test_a_small_map_runs_the_layers_own_forward() -> None:
    layer = natten.NeighborhoodAttention2D(16, 2, 5, rel_pos_bias=True)  # pads, as NATTEN 0.14
    model, x = nn.Sequential(layer), torch.randn(1, 4, 6, 16)
    before = model(x)
    vitkernels.apply(model, verbose=False)
    assert torch.equal(model(x), before)


def test_dropout_on_the_weights_in_training_runs_the_layers_own_forward() -> None:
    model, x = nn.Sequential(natten.NeighborhoodAttention2D(16, 2, 3, attn_drop=0.5)), image()
    expected = model.eval()(x)
    vitkernels.apply(model, verbose=False)
    assert relative_error(model(x), expected) < 1e-6
    assert (model.train()(x) == 0).any()


class Truncating(natten.NeighborhoodAttention2D):
    """Another border rule: zeros around the map instead of windows shifted inward."""

    def forward(self, x):
        around = self.kernel_size // 2 * self.dilation
        y = super().forward(nn.functional.pad(x, (0, 0, around, around, around, around)))
        return y[:, around:-around, around:-around]


class Unscaled(natten.NeighborhoodAttention2D):
    def attend(self, q, k, v, scale):
        return super().attend(q, k, v, 1.0)


class WrongWhenDilated(natten.NeighborhoodAttention2D):
    def attend(self, q, k, v, scale):
        return super().attend(q, k, v, scale if self.dilation == 1 else 2 * scale)


@pytest.mark.parametrize("cls", [Truncating, Unscaled])
def test_a_layer_that_computes_something_else_is_left(cls: type) -> None:
    report = vitkernels.apply(nn.Sequential(cls(16, 2, 3, rel_pos_bias=True)), verbose=False)
    assert report.replaced == []
    assert "computes something else" in report.skipped[0][2]


def test_layers_of_the_same_parameters_but_other_options_are_proven_one_by_one() -> None:
    model = nn.Sequential(WrongWhenDilated(16, 2, 3), WrongWhenDilated(16, 2, 3, dilation=2))
    report = vitkernels.apply(model, verbose=False)
    assert [name for name, *_ in report.replaced] == ["0"]
    assert [name for name, *_ in report.skipped] == ["1"]


def test_layers_that_differ_in_their_class_alone_are_proven_one_by_one() -> None:
    model = nn.Sequential(natten.NeighborhoodAttention2D(16, 2, 3), Unscaled(16, 2, 3))
    report = vitkernels.apply(model, verbose=False)
    assert [name for name, *_ in report.replaced] == ["0"]
    assert [name for name, *_ in report.skipped] == ["1"]


class NeighborhoodAttention3D(nn.Module):
    pass


def test_reasons() -> None:
    def reason(layer: nn.Module) -> str:
        return vitkernels.apply(nn.Sequential(layer), verbose=False).skipped[0][2]

    assert reason(natten.NeighborhoodAttention1D(16, 2, 4, stride=2)) == "stride = (2,) has no kernel"
    assert "three-dimensional" in reason(NeighborhoodAttention3D())
    layer = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    layer.rpb = nn.Parameter(torch.zeros(2, 5, 3))
    assert "rpb is not a table" in reason(layer)
    layer = natten.NeighborhoodAttention2D(16, 2, 3, is_causal=True, rel_pos_bias=True)
    assert "causal" in reason(layer)
    del layer.qkv
    assert reason(layer) == "has no attribute qkv"


def test_layers_of_this_package_take_a_backend() -> None:
    model = nn.Sequential(vitkernels.nn.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True))
    before = model(image())
    report = vitkernels.apply(model, backend="reference", verbose=False)
    assert [entry[2] for entry in report.replaced] == ["neighborhood_attention"]
    assert relative_error(model(image()), before) < 1e-5


def test_nattens_own_layers_if_installed() -> None:
    own = pytest.importorskip("natten", reason="natten is not installed")
    layer = own.NeighborhoodAttention2D(64, 2, 7, dilation=2).eval()
    model, x = nn.Sequential(layer), torch.randn(1, 15, 14, 64)
    with torch.no_grad():
        before = model(x)
        report = vitkernels.apply(model, verbose=False)
        assert report.skipped == []
        assert relative_error(model(x), before) < 1e-5
