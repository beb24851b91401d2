"""What `apply` does to layers in a row, some of which are pairs of a convolution and a batch norm."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from randomise import randomise, relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkernels
from vitkernels import models
from vitkernels.patching import folding, packed


class Gate(nn.Module):
    """Stands between convolutions, as the channel gate of MedViTV2 does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def inverted_bottleneck(act: nn.Module) -> nn.Sequential:
    layers = (
        *(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), act),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), copy.deepcopy(act), Gate()),
        *(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 2, 1)),
    )
    return randomise(nn.Sequential(*layers)).eval()


def maps(size: int = 7) -> torch.Tensor:
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))


def norms_that_run(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many batch norms a call runs."""
    calls = []
    run = nn.functional.batch_norm

    def batch_norm(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "batch_norm", batch_norm)
        model(x)
    return len(calls)


ACTIVATIONS = [nn.ReLU(), nn.Hardswish(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("least_work", [0, 1 << 40], ids=["packed", "plain"])
def test_a_chain_computes_the_same(act: nn.Module, least_work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_LEAST_WORK", least_work)
    chain, x = inverted_bottleneck(act), maps()
    expected = chain.double()(x.double())
    chain.float()
    report = vitkernels.apply(chain, verbose=False)
    assert report.replaced == [("", "Sequential", "batch norms folded")]
    assert (report.skipped, report.others) == ([], 1), "the last convolution has no norm"
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative_error(chain(x), expected) < 1e-6
            assert norms_that_run(chain, x, monkeypatch) == 0
    packs = [fold.packed for fold in chain.__dict__["_vitkernels_kept"].folds]
    # The depthwise one pays at any size.
    assert [len(pack) for pack in packs] == ([1, 1, 1] if least_work == 0 else [0, 1, 0])
    assert relative_error(chain.double()(x.double()), expected) < 1e-12
    assert vitkernels.revert(chain) == 1
    assert torch.equal(chain(x.double()), expected)


def test_gradients_of_a_chain() -> None:
    chain, x = inverted_bottleneck(nn.Hardswish()).double(), maps().double().requires_grad_()
    wanted = torch.autograd.grad(chain(x).square().sum(), [x, *chain.parameters()])
    vitkernels.apply(chain, verbose=False)
    got = torch.autograd.grad(chain(x).square().sum(), [x, *chain.parameters()])
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) < 1e-12


def test_a_chain_in_train_mode_runs_as_before() -> None:
    chain, x = inverted_bottleneck(nn.ReLU()).train(), maps()
    twin = copy.deepcopy(chain)
    vitkernels.apply(chain, verbose=False)
    assert torch.equal(chain(x), twin(x))
    assert torch.equal(chain[1].running_mean, twin[1].running_mean)


def test_only_the_pairs_that_somebody_listens_to_are_called_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain, x = inverted_bottleneck(nn.ReLU()), maps()
    expected = chain(x)
    vitkernels.apply(chain, verbose=False)
    seen = []

    def listen(place: int) -> object:
        return chain[place].register_forward_hook(lambda *_: seen.append(place))

    with torch.no_grad():
        chain(x)
        for place, norms in ((3, 1), (4, 1), (5, 0)):
            handle = listen(place)
            assert norms_that_run(chain, x, monkeypatch) == norms
            assert relative_error(chain(x), expected) < 1e-6
            handle.remove()
            assert seen == [place, place]
            seen.clear()
        chain[8].train()
        assert norms_that_run(chain, x, monkeypatch) == 1
        chain[8].eval()
        assert norms_that_run(chain, x, monkeypatch) == 0


def test_folds_of_a_chain_follow_each_of_its_pairs() -> None:
    chain, x = inverted_bottleneck(nn.ReLU()), maps()
    vitkernels.apply(chain, verbose=False)
    with torch.no_grad():
        before = chain(x)
        for place in (0, 1, 3, 4, 7, 8):
            chain[place].weight.data.mul_(1.5)
            twin = copy.deepcopy(chain)
            vitkernels.revert(twin)
            now = chain(x)
            assert relative_error(now, twin(x)) < 1e-6
            assert relative_error(now, before) > 1e-3
            before = now


def test_copies_and_slices_of_a_chain_run() -> None:
    chain, x = inverted_bottleneck(nn.ReLU()), maps()
    with torch.no_grad():
        expected = [nn.Sequential(*list(chain)[:end]).eval()(x) for end in range(len(chain) + 1)]
        vitkernels.apply(chain, verbose=False)
        for made in (chain, copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
            for end, output in enumerate(expected):
                torch.testing.assert_close(made[:end].eval()(x), output)
        chain.append(nn.Flatten(0)).append(nn.Linear(196, 3)).eval()
        assert chain(x).shape == (3,)
        with pytest.raises(ValueError, match="expected 4D input"):
            chain(x[0])


def test_a_compiled_chain_is_one_graph_that_leaves_its_norms_to_the_compiler() -> None:
    chain, x = inverted_bottleneck(nn.Hardswish()), maps()
    pair = nn.Sequential(*chain[:2]).eval()
    for model in (chain, pair):
        expected, graphs = model(x), []

        def keep(graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs) -> torch.fx.GraphModule:
            graphs.append(graph.code)
            return graph

        vitkernels.apply(model, verbose=False)
        compiled = torch.compile(model, backend=keep, fullgraph=True)
        assert relative_error(compiled(x), expected) < 1e-6
        assert "batch_norm" in graphs[0]


def test_depthwise_convolutions_on_a_gpu_run_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = inverted_bottleneck(nn.Hardswish())
    with FakeTensorMode():
        x = torch.empty(2, 4, 7, 7, device="cuda", dtype=torch.bfloat16)
        wants = folding._wants_channels_last
        assert not wants(chain, x), "gradients may be asked for"
        with torch.no_grad():
            assert wants(chain, x)
            assert not wants(chain[:3], x), "none is depthwise"
            assert not wants(chain, x.float()), "cuDNN was not seen to be faster in float32"
            assert not wants(chain, x.cpu())
            assert not wants(chain, torch.empty(4, 7, 7, device="cuda", dtype=torch.bfloat16))

    x, seen = maps().bfloat16(), []
    expected = chain(x.float())
    vitkernels.apply(chain.bfloat16(), verbose=False)
    monkeypatch.setattr(folding, "_wants_channels_last", lambda *_: True)
    chain[6].register_forward_hook(lambda _, inputs, __: seen.extend(inputs))
    with torch.no_grad():
        assert relative_error(chain(x).float(), expected) < 2e-2
        compiled = torch.compile(chain, backend="eager", fullgraph=True)
        assert relative_error(compiled(x).float(), expected) < 2e-2
        chain.train()
        chain(x)
    formats = [given.is_contiguous(memory_format=torch.channels_last) for given in seen]
    assert formats == [True, True, False], "eval, compiled, train"


def test_pointwise_convolutions_of_channels_last_maps_are_products_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pointwise, x = nn.Conv2d(4, 6, 1), torch.empty(2, 4, 7, 7)
    with FakeTensorMode():
        nchw = torch.empty(2, 4, 7, 7, device="cuda")
        nhwc = torch.empty_strided((2, 4, 7, 7), (196, 1, 28, 4), device="cuda")
    assert folding._is_product(pointwise, nhwc)
    assert not folding._is_product(pointwise, nchw)
    assert not folding._is_product(pointwise, x.contiguous(memory_format=torch.channels_last))
    for other in ({"stride": 2}, {"padding": 1}, {"padding": "same"}, {"groups": 2}, {"kernel_size": 3}):
        assert not folding._is_product(nn.Conv2d(4, 6, **{"kernel_size": 1, **other}), nhwc)

    for dtype in (torch.float64, torch.bfloat16):
        chain, x = inverted_bottleneck(nn.Hardswish()), maps().contiguous(memory_format=torch.channels_last)
        expected = chain(x)
        vitkernels.apply(chain.to(dtype), verbose=False)
        with monkeypatch.context() as patch:
            patch.setattr(folding, "_is_product", lambda conv, x: conv.kernel_size == (1, 1))
            patch.setattr(nn.Conv2d, "_conv_forward", only_depthwise_and_last)
            got = chain(x.to(dtype))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got.float(), expected) < (2e-2 if dtype is torch.bfloat16 else 1e-6)


def only_depthwise_and_last(
    conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: Any
) -> torch.Tensor:
    assert conv.groups > 1 or conv.out_channels == 2
    return nn.functional.conv2d(x, weight, bias, padding=conv.padding, groups=conv.groups)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chain_on_a_gpu(dtype: torch.dtype) -> None:
    chain, x = inverted_bottleneck(nn.Hardswish()), maps(28)
    expected = chain(x)
    chain, x = chain.to("cuda", dtype), x.to("cuda", dtype)
    with torch.no_grad():
        plain = relative_error(chain(x).float().cpu(), expected)
        vitkernels.apply(chain, verbose=False)
        assert relative_error(chain(x).float().cpu(), expected) < 2 * plain


class ConvBNReLU(nn.Module):
    """A copy of the class of that name, as users carry them; `extra` is what some make of it."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-3)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))) + self.extra * x


def test_classes_of_a_known_name_are_tried_before_they_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps()
    for extra in (0.0, 0.1):
        model = randomise(nn.Sequential(ConvBNReLU(extra), ConvBNReLU(extra))).eval()
        expected = model(x)
        report = vitkernels.apply(model, verbose=False)
        if extra:
            reasons = {reason.partition(" (")[0] for *_, reason in report.skipped}
            assert reasons == {"computes something else in eval mode than its class name says"}
        else:
            assert [kernel for *_, kernel in report.replaced] == ["batch norm folded"] * 2
        assert norms_that_run(model, x, monkeypatch) == (2 if extra else 0)
        assert relative_error(model(x), expected) < 1e-6


def test_medvit_folds_the_norms_behind_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.MedViT((1, 2, 3, 1), (32, 128, 160, 192), num_classes=10)
    model = randomise(model).double().eval()
    x = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected, norms = model(x), norms_that_run(model, x, monkeypatch)
        report = vitkernels.apply(model, verbose=False)
        assert relative_error(model(x), expected) < 1e-9
        folded = {cls for _, cls, kernel in report.replaced if "folded" in kernel}
        assert folded == {"ConvBNReLU", "PatchEmbed", "MHCA", "Sequential"}
        # 4 of the stem, 3 of each local block and 1 of each global one, 2 where a block has embeddings.
        blocks = [type(block).__name__ for block in model.features]
        local, embeddings = blocks.count("LFP"), sum(cls == "PatchEmbed" for _, cls, _ in report.replaced)
        wanted = 4 + 3 * local + blocks.count("GFP") + embeddings
        assert norms - norms_that_run(model, x, monkeypatch) == wanted


def test_ppma_folds_its_stem() -> None:
    model = randomise(models.create_model("ppma_t")).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        report = vitkernels.apply(model, verbose=False)
        assert ("patch_embed.proj", "Sequential", "batch norms folded") in report.replaced
        assert relative_error(model(x), expected) < 1e-5
