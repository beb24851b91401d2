from __future__ import annotations

import copy
import functools
import io
import pickle
import sys

import official_layers
import pytest
import torch
from edits import EDITS
from randomise import randomise, relative_error
from timm_import import import_timm
from torch import nn

import vitkernels
from vitkernels import models
from vitkernels.nn import LocalWindowAttention

MODELS = [f"efficientvit_m{i}" for i in range(6)]
IMAGE = 112  # maps of 7, 4 and 2, so one whole and two padded windows for M0's tables of 7, 7 and 4


@functools.cache
def _timm_model(name: str) -> nn.Module:
    return randomise(import_timm().create_model(name)).eval()


def timm_model(name: str = "efficientvit_m0") -> nn.Module:
    return copy.deepcopy(_timm_model(name))


def small_model() -> nn.Module:
    """A model of this package's own layers and plain ones, quick to run and the same in every process."""
    torch.manual_seed(0)
    body = models.EfficientViT(
        img_size=112,
        num_classes=10,
        embed_dim=(32, 64),
        key_dim=(16, 16),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        kernels=(5, 3),
    )
    return randomise(body).eval()


def image(batch: int = 2, size: int = IMAGE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def traces(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(module), list(module.__dict__)) for module in model.modules()]


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """(operator, backend) of every call of an operator, in order."""
    seen = []

    def spy(name, original):
        def call(*args, **kwargs):
            seen.append((name, kwargs.get("backend")))
            return original(*args, **kwargs)

        return call

    for name in vitkernels.ops.__all__:
        monkeypatch.setattr(vitkernels.ops, name, spy(name, getattr(vitkernels.ops, name)))
    return seen


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


def _copies() -> dict[str, object]:
    def saved(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
        "ema": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    }


@pytest.mark.parametrize("how", _copies())
def test_copies_run_on_their_own_parameters(how: str) -> None:
    model, x = timm_model(), image()
    vitkernels.apply(model, fold_bn=True, verbose=False)
    with torch.no_grad():
        before = model(x)
        twin = _copies()[how](model)
        assert torch.equal(twin(x), before)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).square().mean().backward()
    optimizer.step()
    twin.eval()
    with torch.no_grad():
        assert torch.equal(model(x), before)
        after = twin(x)
        assert relative_error(after, before) > 1e-3
        vitkernels.revert(twin)
        assert relative_error(twin(x), after) < 1e-5
        assert torch.equal(model(x), before)


def test_replicas_run_on_their_own_parameters() -> None:
    model = timm_model()
    vitkernels.apply(model, verbose=False)
    attn = model.stages[0].blocks[0].mixer.m.attn
    assert attn._replicate_for_data_parallel().forward.__self__ is not attn


def _ddp_worker(rank: int, path: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    assert "timm" not in sys.modules
    # float64: batch norm over two images amplifies float32 rounding beyond any useful tolerance.
    model = small_model().double().train()
    vitkernels.apply(model, backend=None, verbose=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = image(4)[2 * rank : 2 * rank + 2].double()
    wrapped(x).square().mean().backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{results}{rank}")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_the_gradients(tmp_path) -> None:
    results = str(tmp_path / "grads")
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path / "init"), results), nprocs=2)
    first, second = torch.load(results + "0"), torch.load(results + "1")
    expected: dict[str, torch.Tensor] = {}
    for rank in range(2):
        model = small_model().double().train()
        model(image(4)[2 * rank : 2 * rank + 2].double()).square().mean().backward()
        for name, p in model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad / 2
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - grad).norm() < 1e-10 * norm, name


@pytest.mark.parametrize("fold_bn", [False, True])
def test_export_takes_the_reference(fold_bn: bool) -> None:
    model, x = small_model(), image()
    with torch.no_grad():
        before = model(x)
        vitkernels.apply(model, fold_bn=fold_bn, backend=None, verbose=False)
        program = torch.export.export(model, (x,))
        assert "vitkernels" not in str(program.graph)
        assert relative_error(program.module()(x), before) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval", "folded"])
def test_compiles_as_one_graph(mode: str) -> None:
    import_timm()
    from timm.models.efficientvit_msra import LocalWindowAttention as TimmAttention

    model = nn.Sequential(randomise(TimmAttention(32, 16, 2, 1, 9, 5, (5, 3))))
    model.train(mode == "train")
    x = torch.randn(2, 32, 9, 9)
    twin = copy.deepcopy(model)
    vitkernels.apply(model, fold_bn=mode == "folded", verbose=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x), twin(x)
    assert relative_error(got, expected) < 1e-5
    got.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * (b.grad.norm() + 1), name


@pytest.mark.parametrize("fold_bn", [False, True])
def test_autocast(fold_bn: bool) -> None:
    model, x = timm_model(), image()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(x)
            vitkernels.apply(model, fold_bn=fold_bn, verbose=False)
            ours = model(x)
        assert ours.dtype is torch.bfloat16
        print(
            f"bf16 error: theirs {relative_error(theirs, exact):.1e}, ours {relative_error(ours, exact):.1e}"
        )
        assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)
        assert relative_error(model(x), exact) < 1e-5, "the weights cast for autocast were used outside of it"


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


def test_reasons() -> None:
    def reason(layer: nn.Module) -> str:
        return vitkernels.apply(nn.Sequential(layer), verbose=False).skipped[0][2]

    layer = official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3))
    layer.forward = lambda x: x
    assert "on the instance" in reason(layer)
    with torch.device("meta"):
        assert "meta" in reason(official_layers.CascadedGroupAttention(32, 16, 2, 1, 4, (5, 3)))
    del layer.forward, layer.key_dim
    assert reason(layer) == "has no attribute key_dim"


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


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="argument `model`"):
        vitkernels.apply("efficientvit_m0")
    with pytest.raises(ValueError, match="'fast'"):
        vitkernels.apply(nn.Identity(), backend="fast")
    model = small_model().train()
    with pytest.raises(ValueError, match=r"argument `fold_bn`.*model\.eval\(\)"):
        vitkernels.apply(model, fold_bn=True)
    assert traces(model) == traces(small_model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_models(dtype: torch.dtype) -> None:
    model = small_model()
    x = image()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        theirs = copy.deepcopy(model).to(dtype)(x.to(dtype))
        vitkernels.apply(model, fold_bn=True, verbose=False)
        ours = model.to(dtype)(x.to(dtype))
    assert ours.dtype is dtype
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact) + 1e-12


def test_the_layers_of_this_package_take_a_backend() -> None:
    layer = nn.Sequential(randomise(LocalWindowAttention(32, 16, 2, 1)).eval())
    x = torch.randn(1, 32, 14, 14)
    with torch.no_grad():
        before = layer(x)
        report = vitkernels.apply(layer, fold_bn=False, backend="reference", verbose=False)
        assert [kernel for *_, kernel in report.replaced] == ["window partition", "cascaded_group_attention"]
        assert relative_error(layer(x), before) < 1e-5
