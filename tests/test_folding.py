"""What `apply(model, fold_bn=True)` does to a pair of layers."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from randomise import randomise, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as modules
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from vitkernels import models
from vitkernels.nn import kept
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

    def through_data(pair):
        pair[0].weight.data.mul_(2)

    def one_element(pair):
        pair[0].weight.detach().numpy()[5, 3, 2, 2] += 0.1

    def sign(pair):
        pair[0].weight.data.neg_()

    def two_places(pair):
        weight = pair[0].weight.data
        weight[[0, 1]] = weight[[1, 0]]

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
        "data": through_data,
        "numpy": one_element,
        "sign": sign,
        "places": two_places,
        "statistics_data": lambda pair: pair[1].running_var.data.mul_(3),
        "eps": lambda pair: setattr(pair[1], "eps", 0.5),
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


def test_without_fingerprints_versions_and_addresses_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_native_fingerprint", None)
    for name in set(_steps()) - {"data", "numpy", "sign", "places", "statistics_data"}:
        test_folded_weights_follow_their_sources(name)
    pair, x = folded_pair()
    vitkernels.apply(pair, verbose=False)
    with torch.no_grad():
        pair(x)
        freed = {p.data_ptr() for p in pair.parameters()}
        for p in pair.parameters():
            p.data = p.data.clone()
    # No new weight can come to lie at a noted address.
    assert freed <= {alias.data_ptr() for alias in pair.__dict__["_vitkernels_kept"].aliases}


def test_what_a_cuda_graph_reads_stays_as_long_as_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph once read freed memory after train(), or after a later call with other weights."""
    pair, x = folded_pair()
    vitkernels.apply(pair, verbose=False)
    with torch.no_grad():
        pair(x)
        read = weakref.ref(pair.__dict__["_vitkernels_kept"])
        with monkeypatch.context() as capture:
            capture.setattr(kept, "_capturing", lambda sources: True)
            pair.__dict__["_vitkernels_kept"].ready = object()  # as on a GPU
            pair(x)
            pair(x)
        pair[0].weight.mul_(2)
        pair(x)
        pair.train().eval()
    gc.collect()
    assert read() is not None
    assert len(kept._captured[pair]) == 1
    del pair
    gc.collect()
    assert read() is None


@pytest.mark.gpu
def test_what_is_kept_may_be_read_on_another_stream() -> None:
    pair, x = (thing.cuda() for thing in folded_pair())
    with torch.no_grad():
        wanted = pair(x)
        vitkernels.apply(pair, verbose=False)
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(500_000_000)  # a quarter of a second, behind which the weights are folded
            pair(x)
        with torch.cuda.stream(streams[1]):
            got = pair(x)
        torch.cuda.synchronize()
    assert relative_error(got, wanted) < 1e-2


def test_weights_that_cannot_be_read_are_folded_in_every_call() -> None:
    """A view with gaps: only versions could tell, and they miss edits through .data."""
    pair, x = folded_pair()
    pair[0].weight = nn.Parameter(torch.rand(6, 8, 3, 3)[:, ::2])
    vitkernels.apply(pair, verbose=False)
    with torch.no_grad():
        before = pair(x)
        assert "_vitkernels_kept" not in pair.__dict__
        pair[0].weight.data.mul_(2)
        assert relative_error(before, pair(x)) > 1e-3


def test_a_fold_that_is_watched_is_not_kept() -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, verbose=False)
    with torch.no_grad():
        pair(x)
        graph = make_fx(pair)(x)
        weight = pair[0].weight
        before = graph(x)
        weight.mul_(2)
        assert relative_error(graph(x), pair(x)) < 1e-6 < relative_error(graph(x), before)


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
    sequence, reference = nn.Sequential(copy.deepcopy(pair), nn.ReLU()).eval(), copy.deepcopy(pair)
    with torch.no_grad():
        expected, rectified = pair(x), sequence(x)
    for model in (pair, sequence):
        vitkernels.apply(model, fold_bn=True, verbose=False)
    with torch.inference_mode():
        for size in (x, x[:1], x[:, :, :3], x[:, :, 1:3], x[:, :, :1], x):
            assert relative_error(pair(size)[:, :, :1], reference(size)[:, :, :1]) < 1e-6
            assert 0 < len(pair.__dict__["_vitkernels_kept"].folds[0].packed) <= 3
        assert relative_error(pair(x), expected) < 1e-6
        assert pair(x).is_contiguous(memory_format=torch.channels_last)
        assert relative_error(sequence(x), rectified) < 1e-6
        assert (sequence(x) == 0).any()
        assert pair(x[:0]).shape == (0, 6, 5, 5)
    pair.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    pair(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0
    for switch in ("_convolve", "_reorder", "mkldnn"):
        pair.eval()
        with monkeypatch.context() as patch, torch.no_grad():
            if switch == "mkldnn":
                patch.setattr(torch.backends.mkldnn, "enabled", False)
            else:
                patch.setattr(packed, switch, None)
            assert torch.allclose(pair(x), expected, rtol=1e-5, atol=1e-5)
            assert not pair.__dict__["_vitkernels_kept"].folds[0].packed, switch


@pytest.fixture
def packed_pair(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A pair that runs packed, the same pair as it was, and an input."""
    monkeypatch.setattr(packed, "_LEAST_WORK", 0)
    pair, x = folded_pair()
    pair.requires_grad_(False)
    twin = copy.deepcopy(pair)
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    pair(x)
    assert pair.__dict__["_vitkernels_kept"].folds[0].packed
    return pair, twin, x


def test_a_packed_pair_can_be_traced(packed_pair) -> None:
    pair, twin, x = packed_pair
    traced = torch.jit.trace(pair, (x,))
    assert "mkldnn" not in str(traced.inlined_graph)
    assert relative_error(traced(x[:1]), twin(x[:1])) < 1e-6
    with torch.no_grad():
        for module in (traced, twin):
            module.state_dict()["0.weight"].mul_(2)
    assert relative_error(traced(x), twin(x)) < 1e-6, "the trace holds weights of its own"


def test_a_packed_pair_under_torch_func(packed_pair) -> None:
    pair, twin, x = packed_pair
    pair.eval()  # the fold below is made under a transform
    tangent = torch.randn_like(x)
    transforms = {
        "vmap": lambda module: torch.func.vmap(module)(x[:, None]),
        "grad": lambda module: torch.func.grad(lambda x: module(x).square().sum())(x),
        "jvp": lambda module: torch.func.jvp(module, (x,), (tangent,))[1],
    }
    for name, transform in transforms.items():
        assert relative_error(transform(pair), transform(twin)) < 1e-5, name
        assert "_vitkernels_kept" not in pair.__dict__, name
    assert relative_error(pair(x), twin(x)) < 1e-6


@pytest.mark.parametrize("of", ["input", "weight"])
def test_tangents_pass_through_a_packed_pair(packed_pair, of: str) -> None:
    pair, twin, x = packed_pair

    def tangent(module: nn.Module) -> torch.Tensor:
        with forward_ad.dual_level():
            weight = dict(module.named_parameters())["0.weight"]
            primal = x if of == "input" else weight
            dual = forward_ad.make_dual(primal, torch.ones_like(primal))
            replaced = {} if of == "input" else {"0.weight": dual}
            out = torch.func.functional_call(module, replaced, (dual if of == "input" else x,))
            return forward_ad.unpack_dual(out).tangent

    assert relative_error(tangent(pair), tangent(twin)) < 1e-5


def test_flops_of_a_packed_pair_are_counted(packed_pair) -> None:
    pair, twin, x = packed_pair

    def flops(module: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    assert flops(pair) == flops(twin) > 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
def test_every_kind_of_hook_sees_the_layers_of_a_folded_pair(kind: str, everywhere: bool) -> None:
    pair, x = folded_pair()
    stem = nn.Sequential(pair, nn.ReLU()).eval()
    vitkernels.apply(stem, fold_bn=True, verbose=False)
    seen = set()

    def hook(module, *_):
        seen.add(module)

    if everywhere:
        handles = [getattr(modules, f"register_module_{kind}_hook")(hook)]
    else:
        handles = [getattr(module, f"register_{kind}_hook")(hook) for module in (*pair, stem[1])]
    try:
        stem(x.requires_grad_()).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert {*pair, stem[1]} <= seen


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


@pytest.mark.parametrize("grad", [False, True])
def test_a_folded_norm_does_not_run(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, maps = folded_pair()
    heads = [nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5, bias)) for bias in (True, False)]
    for model, x in ((pair, maps), *((head.eval(), torch.randn(3, 8)) for head in heads)):
        expected = model(x)
        vitkernels.apply(model, fold_bn=True, verbose=False)
        with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
            patch.setattr(nn.functional, "batch_norm", lambda *_: pytest.fail("the norm ran"))
            patch.setattr(torch, "batch_norm", lambda *_: pytest.fail("the norm ran"))
            assert relative_error(model(x), expected) < 1e-5


def test_a_dropout_kept_on_is_kept() -> None:
    head = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)).eval()
    vitkernels.apply(head, fold_bn=True, verbose=False)
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(head(x), head(x))
        head[1].train()
        assert not torch.equal(head(x), head(x))


def test_inputs_of_other_ranks_run_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    conv = nn.Sequential(nn.Conv2d(3, 6, 1), nn.SyncBatchNorm(6)).eval()
    for model, x in (
        (head, torch.randn(2, 6, 6, generator=generator)),  # [batch, channels, length]
        (conv, torch.randn(3, 6, 5, generator=generator)),  # [channels, height, width]: the norm sees 6 rows
    ):
        with torch.no_grad():
            for tensor in (model.state_dict()[key] for key in model.state_dict() if "num" not in key):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            expected = model(x)
            report = vitkernels.apply(model, fold_bn=True, verbose=False)
            assert [kernel for *_, kernel in report.replaced] == ["batch norm folded"]
            assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert head(torch.randn(2, 6)).shape == (2, 3)
    with pytest.raises(ValueError, match="2D or 3D"):
        head(torch.randn(6))


class _Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _replacements() -> dict[str, object]:
    return {
        "another forward": lambda pair: setattr(pair, "0", _Doubled(4, 6, 3, padding=1)),
        "a wrapped layer": lambda pair: setattr(pair, "0", nn.Sequential(pair[0])),
        "parametrised": lambda pair: nn.utils.parametrizations.weight_norm(pair[0]),
        "no norm": lambda pair: setattr(pair, "1", nn.Identity()),
        "group norm": lambda pair: setattr(pair, "1", nn.GroupNorm(2, 6)),
        "one layer more": lambda pair: pair.append(nn.ReLU()),
    }


@pytest.mark.parametrize("name", _replacements())
def test_layers_that_are_replaced_after_apply_run(name: str) -> None:
    pair, x = folded_pair()
    vitkernels.apply(pair, fold_bn=True, verbose=False)
    pair(x)
    _replacements()[name](pair)
    pair.eval()
    with torch.no_grad():
        got = pair(x)
        vitkernels.revert(pair)
        assert torch.equal(got, pair(x))


def test_a_linear_layer_that_is_replaced_after_apply_runs() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5)).eval(), torch.randn(3, 8)
    model[0].running_mean.fill_(2.0)
    for name, layer in (("1", nn.ReLU()), ("2", nn.Sequential(nn.Linear(8, 5))), ("0", nn.Identity())):
        changed = copy.deepcopy(model)
        vitkernels.apply(changed, fold_bn=True, verbose=False)
        setattr(changed, name, layer.eval())
        with torch.no_grad():
            got = changed(x)
            vitkernels.revert(changed)
            assert torch.equal(got, changed(x))


def test_slices_of_folded_pairs_run() -> None:
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5)).eval()
    head[0].running_mean.fill_(2.0)
    pair, image = folded_pair()
    for model, x in ((head, torch.randn(3, 8)), (pair, image)):
        with torch.no_grad():
            expected = [nn.Sequential(*list(model)[:end]).eval()(x) for end in range(3)]
            vitkernels.apply(model, fold_bn=True, verbose=False)
            got = [model[:end].eval()(x) for end in range(3)]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
