"""Patched layers and residual units follow every edit of their weights; what only looks like one is left."""

from __future__ import annotations

import copy

import official_layers
import pytest
import torch
from edits import EDITS
from patched import image, small_model
from randomise import randomise, relative_error
from torch import nn

import vitkernels
from vitkernels import models
from vitkernels.nn.kept import KEPT
from vitkernels.patching import residuals


@pytest.mark.parametrize("name", EDITS)
def test_official_layers_follow_every_edit(name: str) -> None:
    layer = randomise(official_layers.LocalWindowAttention(32, 16, 2, 1, 14, 7, (5, 3)))
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 32, 14, 14)
    vitkernels.apply(model, verbose=False)
    with torch.no_grad():
        before = model(x)
        EDITS[name](model)
        x = x.to(layer.attn.attention_biases.dtype)
        twin = copy.deepcopy(model)
        vitkernels.revert(twin)
        twin.train()
        twin.eval()  # gathers its biases again
        assert relative_error(model(x), twin(x)) < 1e-5
        assert relative_error(model(x), before) > 1e-4 or name in ("double", "half_and_back")


@pytest.mark.parametrize("name", sorted({*EDITS} - {"swap", "sign", "numpy"}))
def test_residual_units_follow_every_edit(name: str, calls) -> None:
    model = small_model()
    vitkernels.apply(model, verbose=False)
    with torch.no_grad():
        model(image())
        calls.clear()
        EDITS[name](model)
        x = image().to(next(model.parameters()).dtype)
        got = model(x)
        assert sum(name == "residual_ffn" for name, _ in calls) == 2 * 2 + 2
        twin = copy.deepcopy(model)
        vitkernels.revert(twin)
        assert relative_error(got, twin(x)) < 1e-5


def test_residual_units_in_eval_mode_pass_the_gradients_of_all_their_weights(calls) -> None:
    """The kernel would give none to what is folded into its vectors."""
    model = small_model()
    twin = copy.deepcopy(model)
    vitkernels.apply(model, verbose=False)
    for net in (model, twin):
        net(image()).square().sum().backward()
    assert not any(name == "residual_ffn" for name, _ in calls)
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    assert all((got[name] - grad).abs().max() < 1e-4 * largest for name, grad in expected.items())


def test_residual_units_under_autocast_run_on_cast_weights(calls, monkeypatch) -> None:
    """As on CUDA: cast once, and again after an edit; a map of another dtype is PyTorch's to promote."""
    monkeypatch.setattr(residuals, "_has_kernel", lambda x: True)
    model = small_model()
    vitkernels.apply(model, verbose=False)
    block, x = model.blocks1[0], torch.randn(2, 32, 7, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype is torch.float32
        assert "residual_ffn" not in [name for name, _ in calls]
        for _ in range(2):
            calls.clear()
            got = block(x.bfloat16())
            assert [name for name, _ in calls].count("residual_ffn") == 2
            twin = copy.deepcopy(block)
            vitkernels.revert(twin)
            expected = twin(x.bfloat16())
            assert got.dtype is expected.dtype
            assert relative_error(got, expected) < 0.02
            before = block.ffn1.__dict__[KEPT]
            block(x.bfloat16())
            assert block.ffn1.__dict__[KEPT] is before
            block.ffn1.m.pw2.c.weight.data.mul_(2)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_residual_units_on_cuda(channels_last: bool, calls) -> None:
    """In half precision and under autocast; float32 is left to the convolutions."""
    model, x = small_model().cuda(), image().cuda()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    vitkernels.apply(model, verbose=False)
    with torch.no_grad():
        model(x)
        assert "residual_ffn" not in [name for name, _ in calls]
        calls.clear()
        with torch.autocast("cuda", torch.bfloat16):
            assert relative_error(model(x), twin(x)) < 0.02
        assert [name for name, _ in calls].count("residual_ffn") == 2 * 2 + 2
        calls.clear()
        assert relative_error(model.half()(x.half()), twin(x)) < 0.02
        assert [name for name, _ in calls].count("residual_ffn") == 2 * 2 + 2


def test_edits_of_a_residual_unit_are_seen() -> None:
    """Its own weights are read in place, its norms and depthwise convolution through what is kept."""
    model = small_model()
    vitkernels.apply(model, verbose=False)
    block, x = model.blocks1[0], torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        block(x)
        for tensor in (*block.dw0.parameters(), *block.ffn1.parameters(), *block.ffn0.buffers()):
            before = block(x)
            if tensor.is_floating_point():
                tensor.data.flatten()[0] += 0.5
                twin = copy.deepcopy(block)
                vitkernels.revert(twin)
                assert relative_error(block(x), twin(x)) < 1e-5
                assert not torch.equal(block(x), before)


@pytest.mark.parametrize(
    "layer", ["dw0", "dw0.m", "dw0.m.c", "ffn0.m", "ffn0.m.pw1.bn", "ffn0.m.act", "mixer.m.attn"]
)
def test_hooks_inside_residual_units_run(layer: str) -> None:
    block, x = small_model().blocks1[0], torch.randn(2, 32, 7, 7)
    twin, seen = copy.deepcopy(block), []
    vitkernels.apply(block, verbose=False)
    for model in (block, twin):
        model.get_submodule(layer).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        assert relative_error(block(x), twin(x)) < 1e-5
    (ours_in, ours_out), (theirs_in, theirs_out) = seen
    assert relative_error(ours_in, theirs_in) < 1e-5
    assert relative_error(ours_out, theirs_out) < 1e-5


def test_a_hook_on_a_mixer_in_windows_sees_windows() -> None:
    layer = official_layers.LocalWindowAttention(32, 16, 2, 1, 14, 7, (5, 3))
    model, seen = nn.Sequential(layer).eval(), []
    vitkernels.apply(model, verbose=False)
    layer.attn.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    with torch.no_grad():
        model(torch.randn(2, 32, 14, 14))
    assert seen == [((8, 32, 7, 7), (8, 32, 7, 7))]


def test_units_in_train_mode_with_frozen_norms_may_drop_their_paths(calls) -> None:
    block, x = small_model().blocks1[0], torch.randn(2, 32, 7, 7)
    vitkernels.apply(block, verbose=False)
    with torch.no_grad():
        for unit in (block.dw0, block.ffn0, block.dw1, block.ffn1):
            calls.clear()
            unit.training = True  # its layers stay in eval mode
            block(x)
            assert [name for name, _ in calls].count("residual_ffn") == (
                1 if unit in (block.ffn0, block.ffn1) else 2
            )
            unit.training = False


def test_a_residual_of_another_kind_is_left() -> None:
    class Residual(models.efficientvit.Residual):
        def forward(self, x):
            return x - self.m(x)

    ffn = Residual(models.efficientvit.FFN(8, 16))
    Residual.__module__ = "elsewhere"
    model, x = randomise(nn.Sequential(ffn)).eval(), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, verbose=False)
        assert "residual fused" not in [kernel for *_, kernel in report.replaced]
        assert relative_error(model(x), expected) < 1e-6


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x):
        return super().forward(x).relu()


class StandardisedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Squaring(nn.Identity):
    def forward(self, x):
        return x.square()


def _with_forward(module: nn.Module) -> nn.Module:
    original = module.forward
    module.forward = lambda x: original(x).tanh()
    return module


_LEFT = {
    "norm with activation": lambda: [nn.Conv2d(3, 4, 1), NormAct(4)],
    "norm with its own forward": lambda: [nn.Conv2d(3, 4, 1), _with_forward(nn.BatchNorm2d(4))],
    "norm with a parametrised weight": lambda: [
        nn.Conv2d(3, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None),
    ],
    "convolution with its own arithmetic": lambda: [StandardisedConv(3, 4, 1), nn.BatchNorm2d(4)],
    "2d norm and linear": lambda: [nn.BatchNorm2d(3), nn.Linear(3, 4)],
    "norm and linear of other width": lambda: [nn.BatchNorm1d(4), nn.Linear(3, 4)],
    "layer between that is no identity": lambda: [nn.BatchNorm1d(3), Squaring(), nn.Linear(3, 4)],
}


@pytest.mark.parametrize("name", _LEFT)
def test_pairs_that_only_look_like_they_fold_are_left(name: str) -> None:
    model = nn.Sequential(nn.Sequential(*_LEFT[name]()), nn.ReLU()).eval()
    shape = (2, 4, 3) if "width" in name else (2, 3) if "between" in name else (2, 3, 3, 3)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, fold_bn=True, verbose=False)
        assert report.replaced == []
        assert [entry[0] for entry in report.skipped] == ["0"]
        assert torch.equal(model(x), expected)


def test_sync_batch_norms_fold_and_a_replaced_relu_is_not_fused() -> None:
    relu = _with_forward(nn.ReLU())
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), relu).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, fold_bn=True, verbose=False)
        assert "batch norm folded" in [kernel for *_, kernel in report.replaced]
        assert relative_error(model(x), expected) < 1e-6
