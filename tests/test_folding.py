"""What `apply(model, fold_bn=True)` does to a pair of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from randomise import randomise, relative_error
from torch import nn

import vitkernels
from vitkernels import models
from vitkernels.patching import packed


def folded_pair(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
    with torch.no_grad():
        for tensor in (*pair.parameters(), pair[1].running_mean, pair[1].running_var):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return pair.eval(), torch.randn(2, 4, 5, 5, generator=generator)


def _steps() -> dict[str, object]:
    other, _ = folded_pair(1)

    def step(pair):
        pair.train()
        pair(torch.randn(4, 4, 5, 5)).square().sum().backward()
        torch.optim.SGD(pair.parameters(), lr=0.01).step()
        pair.eval()

    def statistics_through_data(pair):
        pair.train()
        pair[1].running_var.data.mul_(3)
        pair.eval()

    def storage(pair):
        pair[0].weight.data = torch.rand(pair[0].weight.shape)

    return {
        "load_state_dict": lambda pair: pair.load_state_dict(other.state_dict()),
        "assign": lambda pair: pair.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        "optimizer": step,
        "statistics": lambda pair: pair[1].running_mean.add_(1),
        "train_eval": statistics_through_data,
        "half_and_back": lambda pair: pair.bfloat16().float(),
        "double": lambda pair: pair.double(),
        "child": lambda pair: (pair[0].bfloat16().float(), pair[1].bfloat16().float()),
        "storage": storage,
    }


@pytest.mark.parametrize("name", _steps())
def test_folded_weights_follow_their_sources(name: str) -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    with torch.no_grad():
        before = pair(x)
        assert torch.equal(pair(x), before)
    _steps()[name](pair)
    twin = copy.deepcopy(pair)
    vitkernels.revert(twin)
    with torch.no_grad():
        x = x.to(pair[0].weight.dtype)
        assert relative_error(before, twin(x)) > 1e-4 or name == "double"
        assert relative_error(pair(x), twin(x)) < 1e-6


def test_no_new_weight_can_come_to_lie_at_a_noted_address() -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    with torch.no_grad():
        pair(x)
        freed = {p.data_ptr() for p in pair.parameters()}
        for p in pair.parameters():
            p.data = p.data.clone()
    assert freed <= {alias.data_ptr() for alias in pair.__dict__["_vitkernels_kept"].aliases}


def test_folding_happens_once_and_leaves_gradients_right() -> None:
    pair, x = folded_pair()
    twin = copy.deepcopy(pair)
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    with torch.inference_mode():
        pair(x)
        kept = pair.__dict__["_vitkernels_kept"]
        pair(x)
        assert pair.__dict__["_vitkernels_kept"] is kept
    for model in (pair, twin):
        model(x).square().sum().backward()
    for a, b in zip(pair.parameters(), twin.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5
    pair.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    pair(leaf).sum().backward()  # on weights folded in inference mode
    assert leaf.grad.abs().max() > 0
    assert pair.__dict__["_vitkernels_kept"] is kept


def test_weights_are_packed_for_inference_in_fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_LEAST_WORK", 0)
    pair, x = folded_pair()
    sequence = nn.Sequential(copy.deepcopy(pair), nn.ReLU()).eval()
    with torch.no_grad():
        expected, rectified = pair(x), sequence(x)
    for model in (pair, sequence):
        vitkernels.apply(model, fold_bn=True, verbose=False)
    with torch.inference_mode():
        for size in (x, x[:1], x[:, :, :3]):  # packed for the first, run on all
            pair(size)
        assert pair.__dict__["_vitkernels_kept"].packed is not None
        assert relative_error(pair(x), expected) < 1e-6
        assert pair(x).is_contiguous(memory_format=torch.channels_last)
        assert relative_error(sequence(x), rectified) < 1e-6
        assert (sequence(x) == 0).any()
        assert pair(x[:0]).shape == (0, 6, 5, 5)
    pair.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    pair(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0
    monkeypatch.setattr(packed, "_convolve", None)
    pair.eval()
    with torch.no_grad():
        assert torch.allclose(pair(x), expected, rtol=1e-5, atol=1e-5)
        assert pair.__dict__["_vitkernels_kept"].packed is None


def test_hooks_of_a_folded_pair_still_run() -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    seen = []
    pair[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        pair(x)
    assert len(seen) == 1

    stem = randomise(models.efficientvit_m0()).eval().patch_embed
    vitkernels.apply(stem, fold_bn=True, verbose=False)
    for module in stem[:2]:
        module.register_forward_hook(lambda module, _, output: seen.append((module, output.min())))
    with torch.no_grad():
        stem(torch.randn(1, 3, 32, 32))
    assert [module for module, _ in seen[1:]] == [stem[0], stem[1]]
    assert seen[1][1] < 0 <= seen[2][1], "a hook saw the convolution's output after the ReLU"


def test_functional_calls_of_a_folded_pair() -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    other, _ = folded_pair(1)
    with torch.no_grad():
        pair(x)
        got = torch.func.functional_call(pair, other.state_dict(), (x,))
        assert relative_error(got, other(x)) < 1e-6
    parameters = dict(other.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(pair, p, (x,)).sum())(parameters)
    assert grads["0.weight"].abs().max() > 0


def test_a_dropout_kept_on_is_kept() -> None:
    head = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)).eval()
    vitkernels.apply(head, fold_bn=True, verbose=False)
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(head(x), head(x))
        head[1].train()
        assert not torch.equal(head(x), head(x))
