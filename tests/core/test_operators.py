"""What every declared operator must do, whatever it computes."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle

import pytest
import torch
from operator_calls import FIRST, each_device, each_kernel, each_sample, gradients, outputs_of
from samples import SAMPLES, WITHOUT_GRADIENT, Sample
from torch.utils.flop_counter import FlopCounterMode

import vitkernels
from vitkernels.core.operator import REGISTRY


@pytest.fixture(autouse=True)
def _declared_kernel(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "backend" not in params:
        return
    sample, backend = params["sample"], params["backend"]
    if backend not in REGISTRY[sample.op].backends:
        pytest.skip(f"{sample.op} has no {backend} kernel")
    if backend in sample.without:
        pytest.skip(f"{backend} cannot run {sample.name}")


def spy(monkeypatch: pytest.MonkeyPatch, sample: Sample) -> list:
    """Records every call that reaches a kernel of the operator."""
    calls = []
    for module in {
        REGISTRY[sample.op].backends[name].load()
        for name in ("cpu", "cuda")
        if name in REGISTRY[sample.op].backends
    }:
        for direction in ("forward", "backward"):
            monkeypatch.setattr(module, direction, lambda *args, _name=direction, **_: calls.append(_name))
    return calls


def test_every_operator_has_samples():
    assert {sample.op for sample in SAMPLES} | WITHOUT_GRADIENT == set(REGISTRY)


def test_every_declared_backend_is_there():
    for operator in REGISTRY.values():
        for backend in operator.backends.values():
            assert importlib.util.find_spec(backend.module), backend.module


@each_sample
@each_device
@pytest.mark.parametrize("elements", ["projected", pytest.param("one by one", marks=pytest.mark.thorough)])
def test_gradcheck(sample, device, elements):
    """One by one as far as that is quick; the Jacobians of larger samples between random vectors by default."""
    tensors = sample.tensors(torch.float64, device, requires_grad=True)
    small = sum(t.numel() for t in tensors.values()) <= 900
    kernel = device if device in REGISTRY[sample.op].backends else "reference"

    def run(*values):
        return outputs_of(sample(dict(zip(tensors, values, strict=True)), backend=kernel))

    fast = elements == "projected" and not small
    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=fast)


@each_sample
@each_kernel
@pytest.mark.parametrize("aspects", ["some", pytest.param("all", marks=pytest.mark.thorough)])
def test_opcheck(sample, device, backend, aspects, monkeypatch):
    """Of each operator's first sample everything; of the others what shapes and options can change, by default."""
    every = aspects == "all" or sample.name == FIRST[sample.op]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    utils = utils if every else ("test_schema", "test_faketensor")
    operator = REGISTRY[sample.op]
    checked = []
    check = operator.check
    monkeypatch.setattr(operator, "check", lambda *args: (checked.append(check(*args)), checked[-1])[1])
    monkeypatch.setattr(operator, "_plans", {})  # a known call is not checked again
    sample(sample.tensors(torch.float32, device), backend=backend)
    args = (*checked[0], backend)
    torch.library.opcheck(operator.forward_op, args, test_utils=utils)
    outputs = outputs_of(operator.forward_op(*args))
    mask = [t is not None and t.is_floating_point() for t in args[: len(operator.tensors)]]
    torch.library.opcheck(
        operator.backward_op,
        (*[torch.randn_like(o) for o in outputs], *outputs, *args, mask),
        test_utils=utils,
    )


@each_sample
@each_kernel
def test_gradient_penalty_raises(sample, device, backend):
    tensors = sample.tensors(device=device, requires_grad=True)
    first = next(iter(tensors.values()))
    out = outputs_of(sample(tensors, backend=backend))[0]
    (grad,) = torch.autograd.grad(out.sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        grad.square().sum().backward()


@each_sample
def test_gradient_penalty_of_a_traced_call_raises(sample):
    tensors = sample.tensors(torch.float64, requires_grad=True)  # which autocast leaves alone
    first = next(iter(tensors.values()))
    with torch.autocast("cpu", torch.bfloat16):
        out = outputs_of(sample(tensors))[0]
    (grad,) = torch.autograd.grad(out.sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        grad.square().sum().backward()


@each_sample
def test_reference_is_twice_differentiable(sample):
    tensors = sample.tensors(torch.float64, requires_grad=True)

    def run(*values):
        return outputs_of(sample(dict(zip(tensors, values, strict=True)), backend="reference"))

    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


@each_sample
@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(sample, device, dtype):
    tensors = sample.tensors(device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        outputs = outputs_of(sample(tensors))
        reference = outputs_of(sample(tensors, backend="reference"))
    assert outputs[0].dtype is (dtype if sample.products else torch.float32)
    assert [o.dtype for o in outputs] == [o.dtype for o in reference]
    torch.testing.assert_close(outputs[0].float(), reference[0].float(), atol=0.06, rtol=0.06)
    grads = torch.autograd.grad(outputs[0].float().square().sum(), list(tensors.values()))
    assert all(g.dtype is torch.float32 and torch.isfinite(g).all() for g in grads)
    with torch.autocast(device, dtype):
        wide = sample.tensors(torch.float64, device)
        assert outputs_of(sample(wide))[0].dtype is torch.float64


@each_sample
@each_kernel
def test_empty_batch(sample, device, backend):
    tensors = sample.tensors(device=device, batch=0, requires_grad=True)
    outputs = outputs_of(sample(tensors, backend=backend))
    assert outputs[0].shape[0] == 0
    for tensor, grad in zip(
        tensors.values(), torch.autograd.grad(outputs[0].sum(), list(tensors.values())), strict=True
    ):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@each_sample
@each_device
def test_strided_inputs(sample, device):
    dense = sample.tensors(device=device, requires_grad=True)
    seeds = [torch.randn_like(o) for o in outputs_of(sample(dense))]
    want_outputs, want_grads = gradients(sample, dense, seeds)
    views = {
        "last dimension strided": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
        "offset into a wider buffer": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
        "first dimension innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        "every other element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    }
    for label, view in views.items():
        tensors = {name: view(t.detach()).requires_grad_() for name, t in dense.items()}
        outputs, grads = gradients(sample, tensors, seeds)
        for got, want in zip((*outputs, *grads), (*want_outputs, *want_grads), strict=True):
            torch.testing.assert_close(got, want, msg=lambda m, label=label: f"{label}: {m}")


@each_sample
def test_frozen_inputs_skip_their_gradients(sample, monkeypatch):
    module = REGISTRY[sample.op].backends["cpu"].load()
    backward, wanted = module.backward, []
    count = len(REGISTRY[sample.op].tensors)

    def spied(*args):
        wanted.append([grad is not None for grad in args[:count]])
        backward(*args)

    monkeypatch.setattr(module, "backward", spied)
    for frozen in sample.tensors():
        torch.manual_seed(1)
        tensors = sample.tensors(requires_grad=True)
        seeds = [torch.ones_like(o) for o in outputs_of(sample(tensors))]
        want = dict(zip(tensors, gradients(sample, tensors, seeds)[1], strict=True))
        tensors[frozen].requires_grad_(False)
        live = {name: t for name, t in tensors.items() if name != frozen}
        if not live:
            assert not outputs_of(sample(tensors))[0].requires_grad
            continue
        got = torch.autograd.grad(outputs_of(sample(tensors)), list(live.values()), seeds)
        for name, grad in zip(live, got, strict=True):
            torch.testing.assert_close(grad, want[name])
        names = REGISTRY[sample.op].tensors
        assert wanted[-1] == [name in live for name in names], "a frozen input's gradient was computed"


@each_sample
def test_bad_input_names_argument_expected_and_got(sample, monkeypatch):
    calls = spy(monkeypatch, sample)
    for change, kind, message in sample.bad:
        with pytest.raises(kind) as error:
            sample.function(**{**sample.kwargs, **sample.arguments(sample.tensors()), **change})
        assert message in str(error.value)
        assert "; got " in str(error.value)
    assert calls == [], "a kernel ran on bad input"
    sample(sample.tensors())
    assert calls == ["forward"]


@each_sample
def test_any_tensor_elsewhere_of_ints_or_sparse_is_refused_by_name(sample, monkeypatch):
    calls, tensors = spy(monkeypatch, sample), sample.tensors()
    first = next(iter(tensors))
    for name in tensors:
        said = {"values": "weight", "other": "others"}.get(name, name)
        if name != first:
            with pytest.raises(
                ValueError, match=f"argument `{said}`: expected device cpu, as `{first}`; got "
            ):
                sample({**tensors, name: tensors[name].to("meta")})
        with pytest.raises(TypeError, match=f"argument `{said}`: expected dtype .*; got int32 "):
            sample({**tensors, name: tensors[name].int()})
        with pytest.raises(
            TypeError, match=rf"argument `({said}|{name})`: expected a dense \(strided\) tensor"
        ):
            sample({**tensors, name: tensors[name].to_sparse()})
    assert calls == []


@each_sample
def test_backend_override_and_its_error(sample):
    tensors = sample.tensors()
    named = sample.arguments(tensors)
    first = [named.pop(name) for name in sample.positional]
    reasons = vitkernels.supported_backends(sample.op, *first, **named, **sample.kwargs)
    assert set(reasons) == {"cuda", "triton", "cpu", "reference"}
    assert reasons["cpu"] == reasons["reference"] == []
    assert reasons["cuda"]
    with pytest.raises(vitkernels.BackendError) as error:
        sample(tensors, backend="cuda")
    for part in (
        sample.op,
        "'cuda' was asked for",
        reasons["cuda"][0],
        "Backends that would fit: 'cpu'",
        "float32",
    ):
        assert part in str(error.value)
    with vitkernels.backend("cuda"):
        with pytest.raises(vitkernels.BackendError):
            sample(tensors)
        sample(tensors, backend="cpu")  # an explicit argument wins
        with vitkernels.backend("auto"):
            sample(tensors)
    sample(tensors)


class Holder(torch.nn.Module):
    """A module that keeps an operator's public function, as a user's layer may."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.function, self.options = sample.function, sample.kwargs
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, tensors):
        return outputs_of(self.function(**tensors, **self.options))[0] * self.scale


@each_sample
def test_modules_that_hold_the_function_survive_copies(sample):
    module, tensors = Holder(sample), sample.arguments(sample.tensors())
    want = module(tensors)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(tensors), want)
        assert other.scale is not module.scale


@each_sample
@each_device
def test_repeats_are_bit_identical(sample, device):
    tensors = sample.tensors(device=device, batch=7, requires_grad=True)
    seeds = [torch.randn_like(o) for o in outputs_of(sample(tensors))]
    first = gradients(sample, tensors, seeds)
    for _ in range(5):
        again = gradients(sample, tensors, seeds)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b)


@each_sample
def test_flop_counter_agrees_with_the_composition(sample):
    def count(backend: str) -> int:
        tensors = sample.tensors(requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            outputs = outputs_of(sample(tensors, backend=backend))
            outputs[0].sum().backward()
        return counter.get_total_flops()

    assert count("cpu") == count("reference") * sample.share
    assert (count("reference") > 0) == sample.products


@each_sample
def test_frozen_inputs_need_no_flops(sample):
    """One input alone requires a gradient."""
    if sample.share != 1 or sample.op in ("cascaded_group_attention", "polyline_path_scan"):
        pytest.skip("its formula goes by larger parts")

    def count(live: str, backend: str) -> int:
        tensors = sample.tensors()
        tensors[live].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            outputs_of(sample(tensors, backend=backend))[0].sum().backward()
        return counter.get_total_flops()

    for live in sample.tensors():
        assert count(live, "cpu") == count(live, "reference"), live
