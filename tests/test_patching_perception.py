"""`vitkernels.apply` on S2AFormer: what runs in place in inference, and when nothing does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomise import randomise
from torch import nn

import vitkernels
from vitkernels import models
from vitkernels.patching import perception

SMALL = {"embed_dims": (8, 16, 24, 40), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 5), "projection": 48}


def network(**options: Any) -> nn.Module:
    return randomise(models.create_model("s2aformer_t", **{**SMALL, "num_classes": 10, **options})).eval()


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the maps that a GELU was written over."""
    seen: list[torch.Size] = []
    run = perception._gelu_in_place

    def counted(x: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(x.shape)
        return run(x, **options)

    monkeypatch.setattr(perception, "_gelu_in_place", counted)
    return seen


@pytest.mark.parametrize("size", [(64, 64), (75, 97)], ids=str)
def test_computes_the_same(size: tuple[int, int], in_place: list[torch.Size]) -> None:
    model = network()
    x = torch.randn(2, 3, *size)
    applied = copy.deepcopy(model)
    report = vitkernels.apply(applied, verbose=False)
    kernels = [kernel for _, _, kernel in report.replaced]
    assert kernels.count("GELU in place") == 1
    assert kernels.count("GELU and residual in place") == 5
    with torch.no_grad():
        kept = x.clone()
        with vitkernels.backend("cpu"):
            assert torch.equal(applied(x), folded_alone(model)(x))
        assert torch.equal(x, kept)
    # Three in the stem, two in a block: the local module and the MLP.
    assert len(in_place) == 3 + 5 * 2


def folded_alone(model: nn.Module) -> nn.Module:
    """After `apply`, but that stem and blocks run their own forwards."""
    model = copy.deepcopy(model)
    vitkernels.apply(model, verbose=False)
    for module in model.modules():
        if isinstance(module, perception.FusedPerceptionBlock | perception.FusedStem):
            module.__class__ = module.vitkernels_original
    return model


def test_runs_as_before_where_gradients_casts_training_or_the_reference_are_asked_for(
    in_place: list[torch.Size],
) -> None:
    model = network()
    x = torch.randn(1, 3, 64, 64)
    vitkernels.apply(model, verbose=False)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        with vitkernels.backend("reference"):
            model(x)
        with torch.autocast("cpu"):
            model(x)
        model.train()(x.repeat(2, 1, 1, 1))
    assert in_place == []


@pytest.mark.parametrize(
    "name", ["stem.0", "stem.1", "local", "attn.proj", "lim", "lim.act", "mlp", "mlp.fc1"]
)
def test_what_hooks_have_seen_does_not_change(name: str) -> None:
    model = network()
    name = name if name.startswith("stem") else f"layers.2.blocks.1.{name}"
    vitkernels.apply(model, verbose=False)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    ((held, copied),) = seen
    assert torch.equal(held, copied)


def test_slices_of_the_stem_run() -> None:
    model, x = network(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = [nn.Sequential(*list(model.stem)[:end]).eval()(x) for end in range(9)]
        vitkernels.apply(model, verbose=False)
        for end, other in enumerate(expected):
            torch.testing.assert_close(model.stem[:end].eval()(x), other)


def test_a_drop_path_that_is_kept_on_or_watched_is_called() -> None:
    block = randomise(vitkernels.nn.HybridPerceptionBlock(16, 2, 2, scale=1.0, drop_path=0.5)).eval()
    x, seen = torch.randn(2, 4, 4, 16), []
    vitkernels.apply(block, verbose=False)
    with torch.no_grad():
        handle = block.drop_path.register_forward_hook(lambda *_: seen.append(1))
        expected = block(x)
        assert len(seen) == 3
        handle.remove()
        torch.testing.assert_close(block(x), expected)
        block.drop_path.train()
        assert any(not torch.equal(block(x), block(x)) for _ in range(20))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_their_own_weights_and_revert_restores(copied: Callable[[Any], Any]) -> None:
    model = network()
    x = torch.randn(1, 3, 64, 64)
    vitkernels.apply(model, verbose=False)
    twin = copied(model)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(twin(x), before)
        twin.layers[0].blocks[0].mlp.fc1.weight.mul_(2)
        assert not torch.allclose(twin(x), before)
        torch.testing.assert_close(model(x), before)
    assert vitkernels.revert(model) > 0
    assert type(model.stem) is nn.Sequential
    assert type(model.layers[0].blocks[0]) is vitkernels.nn.HybridPerceptionBlock
