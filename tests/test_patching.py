"""What `vitkernels.apply` replaces, what stays as it was, and what it says."""

from __future__ import annotations

import official_layers
import plain_polyline
import pytest
import torch
from patched import image, small_model, timm_model, traces
from randomise import randomise, relative_error
from timm_import import import_timm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels
from vitkernels.nn import LocalWindowAttention

MODELS = [f"efficientvit_m{i}" for i in range(6)]


@pytest.mark.parametrize("name", MODELS)
def test_timm_logits_stay_and_revert_restores_them(name: str) -> None:
    model, x = timm_model(name), image(1, 224)
    with torch.no_grad():
        before = model(x)
        keys, state = list(model.state_dict()), traces(model)
        for fold_bn in (False, None):
            report = vitkernels.apply(model, fold_bn=fold_bn, verbose=False)
            assert report.skipped == []
            assert list(model.state_dict()) == keys
            error = relative_error(model(x), before)
            print(f"{name} fold_bn={fold_bn}: relative error {error:.2e}")
            assert error < 1e-5
            assert vitkernels.revert(model) == len(report.replaced)
            assert torch.equal(model(x), before)
            assert traces(model) == state


def test_the_kernels_are_really_used(calls) -> None:
    model = timm_model()
    vitkernels.apply(model, backend="reference", verbose=False)
    calls.clear()
    mixer, unit = ("cascaded_group_attention", "reference"), ("residual_ffn", None)
    downsample = [unit, unit]
    with torch.no_grad():
        model(image())
        assert calls == [unit, mixer, unit, *2 * (downsample + [unit, mixer, unit] * 2), unit, mixer, unit]
        calls.clear()
        model.train()
        model(image())
        assert calls == [("window_attention", "reference")] * 6 * 4
        calls.clear()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        model(image())
        assert calls == [mixer] * 6, "norms frozen in a model that trains"
        calls.clear()
        vitkernels.revert(model.eval())
        model(image())
    assert calls == []


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_training_is_the_same(channels_last: bool) -> None:
    x = image(4).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    theirs, ours = (timm_model().double().train() for _ in range(2))
    vitkernels.apply(ours, verbose=False)
    for model in (theirs, ours):
        if channels_last:
            model.to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None, name
        if b.grad.norm() > 1e-12:  # batch statistics cancel the gradients of some shifts
            assert relative_error(a.grad, b.grad) < 1e-9, name
        assert "attention_biases" not in name or b.grad.norm() > 1e-6
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-9, name


def test_frozen_norms_train_with_the_gradients_of_the_reference(calls) -> None:
    x = image(2).double()
    theirs, ours = (timm_model().double().train() for _ in range(2))
    vitkernels.apply(ours, verbose=False)
    calls.clear()
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        model(x).square().mean().backward()
    assert [name for name, _ in calls] == ["cascaded_group_attention"] * 6
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert b.grad.norm() > 1e-12, name
        assert relative_error(a.grad, b.grad) < 1e-9, name


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(timm_model(), nn.MultiheadAttention(8, 2), nn.BatchNorm1d(8)).eval()
    report = vitkernels.apply(model, fold_bn=True)
    assert capsys.readouterr().out == f"{report}\n"
    counts = {kernel: sum(k == kernel for *_, k in report.replaced) for *_, kernel in report.replaced}
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    squeeze_excite = 2 * 2
    assert counts == {
        "cascaded_group_attention": 6,
        "window partition": 6,
        "batch norm folded": convolutions - squeeze_excite + 1,
        "ReLU fused": 1 + 6 * 2 + 2 * 2 + 2,
        "residual fused": 6 * (1 + 5) + 2 * 2 * (1 + 2),
    }
    assert (
        "0.stages.2.blocks.2.mixer.m.attn",
        "CascadedGroupAttention",
        "cascaded_group_attention",
    ) in report.replaced
    assert [entry[:2] for entry in report.skipped] == [("", "Sequential"), ("1", "MultiheadAttention")]
    for text in ("CascadedGroupAttention", "cascaded_group_attention", "no kernel", "MultiheadAttention"):
        assert text in str(report)
    again = vitkernels.apply(model, fold_bn=True, verbose=False)
    assert capsys.readouterr().out == ""
    assert again == report


def test_applying_again_changes_nothing_but_the_backend() -> None:
    model = timm_model()
    vitkernels.apply(model, verbose=False)
    state = traces(model)
    vitkernels.apply(model, verbose=False)
    assert traces(model) == state
    vitkernels.apply(model, backend="reference", verbose=False)
    assert traces(model) != state
    vitkernels.revert(model)
    assert traces(model) == traces(timm_model())
    assert vitkernels.revert(model) == 0


def test_replicas_run_on_their_own_parameters() -> None:
    model = timm_model()
    vitkernels.apply(model, verbose=False)
    attn = model.stages[0].blocks[0].mixer.m.attn
    assert attn._replicate_for_data_parallel().forward.__self__ is not attn


@pytest.mark.parametrize(("side", "size"), [(5, 9), (4, 4), (7, 14)])
def test_the_official_classes_and_copies_of_them(side: int, size: int) -> None:
    layer = randomise(official_layers.LocalWindowAttention(32, 16, 2, 1, size, side, (5, 3)))
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 32, size, size)
    with torch.no_grad():
        before = model(x)
        report = vitkernels.apply(model, fold_bn=True, verbose=False)
        assert [kernel for *_, kernel in report.replaced].count("batch norm folded") == 5
        assert report.skipped == []
        assert relative_error(model(x), before) < 1e-5
        vitkernels.revert(model)
        assert torch.equal(model(x), before)


def test_the_layers_of_this_package_take_a_backend() -> None:
    layer = nn.Sequential(randomise(LocalWindowAttention(32, 16, 2, 1)).eval())
    x = torch.randn(1, 32, 14, 14)
    with torch.no_grad():
        before = layer(x)
        report = vitkernels.apply(layer, fold_bn=False, backend="reference", verbose=False)
        assert [kernel for *_, kernel in report.replaced] == ["window partition", "cascaded_group_attention"]
        assert relative_error(layer(x), before) < 1e-5


class Deceiver(official_layers.CascadedGroupAttention):
    def logits(self, q, k):
        return super().logits(q, k).relu()


def test_a_layer_that_computes_something_else_is_left() -> None:
    model = nn.Sequential(Deceiver(32, 16, 2, 1, 4, (5, 3)))
    model[0].register_forward_hook(lambda *_: pytest.fail("a user's hook ran during apply"))
    state = torch.random.get_rng_state()
    report = vitkernels.apply(model, fold_bn=False, verbose=False)
    assert report.replaced == []
    assert "computes something else" in report.skipped[0][2]
    assert torch.equal(torch.random.get_rng_state(), state)


class Shifted(official_layers.LocalWindowAttention):
    """Windows that may be shifted, which no parameter tells."""

    def __init__(self, shift: int) -> None:
        super().__init__(32, 16, 2, 1, 8, 4, (5, 3))
        self.shift = shift

    def forward(self, x):
        return super().forward(x.roll((-self.shift,) * 2, (2, 3))).roll((self.shift,) * 2, (2, 3))


def test_layers_that_differ_in_a_setting_alone_are_proven_one_by_one() -> None:
    model = randomise(nn.Sequential(Shifted(0), Shifted(2), Shifted(0))).eval()
    x = torch.randn(1, 32, 8, 8)
    with torch.no_grad():
        before = model(x)
        report = vitkernels.apply(model, fold_bn=False, verbose=False)
        assert [name for name, cls, _ in report.replaced if cls == "Shifted"] == ["0", "2"]
        assert relative_error(model(x), before) < 1e-5


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_the_proof_asks_for_no_default_device_or_dtype(device: str, dtype: torch.dtype) -> None:
    layers = nn.Sequential(
        official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3)),
        plain_polyline.MambaAttentionAllDouble(16, 2),
    )
    blocks = import_timm().create_model("vit_tiny_patch16_224", depth=1)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert vitkernels.apply(layers, verbose=False).skipped == []
            vitkernels.apply(blocks, token_merging=4, verbose=False)
    finally:
        torch.set_default_dtype(torch.float32)


def test_reasons() -> None:
    def reason(layer: nn.Module) -> str:
        return vitkernels.apply(nn.Sequential(layer), verbose=False).skipped[0][2]

    layer = official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3))
    layer.forward = lambda x: x
    assert "on the instance" in reason(layer)
    with torch.device("meta"):
        assert "meta" in reason(official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3)))
    with FakeTensorMode():  # a copy to try it on, which once crashed the process
        assert "fake" in reason(official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3)))
    del layer.forward, layer.key_dim
    assert reason(layer) == "has no attribute key_dim"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="argument `model`"):
        vitkernels.apply("efficientvit_m0")
    with pytest.raises(ValueError, match="'fast'"):
        vitkernels.apply(nn.Identity(), backend="fast")
    model = small_model().train()
    with pytest.raises(ValueError, match=r"argument `fold_bn`.*model\.eval\(\)"):
        vitkernels.apply(model, fold_bn=True)
    assert traces(model) == traces(small_model())


@pytest.mark.parametrize("name", ["efficientvit_m0", "s2aformer_mini"])
def test_shapes_on_the_meta_device(name: str) -> None:
    """The layers asked it whether autocast is on, which torch answers with an error."""
    with torch.device("meta"):
        model = vitkernels.models.create_model(name, num_classes=10).eval()
    vitkernels.apply(model.to_empty(device="cpu"), verbose=False)
    with torch.no_grad():
        assert model.to("meta")(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 10)


def test_a_model_that_ran_with_gradients_before() -> None:
    """In eval mode timm's mixers keep biases that have a graph, of which no deep copy is made."""
    model, x = timm_model().eval(), image(1, 224)
    before = model(x)
    report = vitkernels.apply(model, verbose=False)
    assert report.skipped == []
    assert relative_error(model(x), before) < 1e-5
