"""Patched networks that are copied, exported, compiled, cast, or trained on several processes."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from patched import image, small_model, timm_model
from randomise import randomise, relative_error
from timm_import import import_timm
from torch import nn

import vitkernels


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
