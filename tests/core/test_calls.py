"""How calls reach the kernels: what transforms, wraps and remembers them."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_calls import each_device, each_sample, gradients, outputs_of
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import vitkernels
from vitkernels.core import native
from vitkernels.core import operator as operator_module
from vitkernels.core.backends import Backend
from vitkernels.core.operator import REGISTRY


@each_sample
def test_functional_grad(sample):
    tensors = sample.tensors()
    name, first = next(iter(tensors.items()))
    got = torch.func.grad(lambda t: outputs_of(sample({**tensors, name: t}))[0].square().sum())(first)
    want = torch.func.grad(
        lambda t: outputs_of(sample({**tensors, name: t}, backend="reference"))[0].square().sum()
    )(first)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@each_sample
def test_forward_mode_raises_a_clear_error(sample):
    tensors = sample.tensors()
    name, first = next(iter(tensors.items()))

    def run(t):
        return outputs_of(sample({**tensors, name: t}))[0]

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='reference'"):
        torch.func.jvp(run, (first,), (torch.ones_like(first),))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivative"),
    ):
        run(forward_ad.make_dual(first, torch.ones_like(first)))


@each_sample
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_per_sample_gradients(sample):
    stacked = [sample.tensors(batch=2) for _ in range(3)]
    batched = {name: torch.stack([tensors[name] for tensors in stacked]) for name in stacked[0]}

    def loss(tensors, backend=None):
        return outputs_of(sample(tensors, backend=backend))[0].square().sum()

    torch.testing.assert_close(
        torch.func.vmap(loss)(batched), torch.stack([loss(tensors) for tensors in stacked])
    )
    got = torch.func.vmap(torch.func.grad(loss))(batched)
    for i, tensors in enumerate(stacked):
        want = torch.func.grad(lambda t: loss(t, "reference"))(tensors)
        for name, grad in want.items():
            torch.testing.assert_close(got[name][i], grad, atol=1e-4, rtol=1e-4)


@each_sample
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(sample):
    """is_grads_batched hands in tensors without storage; the kernels once asked for their address."""
    tensors = sample.tensors(requires_grad=True)
    out = outputs_of(sample(tensors))[0]
    seeds = torch.randn(3, *out.shape)
    got = torch.autograd.grad(out, list(tensors.values()), seeds, is_grads_batched=True, retain_graph=True)
    for i, seed in enumerate(seeds):
        want = torch.autograd.grad(out, list(tensors.values()), seed, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b)


class PlainSubclass(torch.Tensor):
    pass


class ParameterSubclass(torch.nn.Parameter):
    pass


@each_sample
@pytest.mark.parametrize("kind", [PlainSubclass, ParameterSubclass])
def test_tensor_subclasses(sample, kind):
    """The bindings once took exact torch.Tensor and Parameter only."""
    tensors = sample.tensors()
    want = outputs_of(sample(tensors))[0]
    for name in tensors:
        changed = {**tensors, name: tensors[name].as_subclass(kind)}
        assert torch.equal(outputs_of(sample(changed))[0].as_subclass(torch.Tensor), want)


@each_sample
def test_negative_views(sample):
    """The imaginary part of a conjugate keeps its sign in a flag, not in memory."""
    tensors = sample.tensors()
    negated = {
        name: torch.complex(torch.zeros_like(t), -t).conj().imag if name != "v" else t
        for name, t in tensors.items()
    }
    assert any(t.is_neg() for t in negated.values())
    assert torch.equal(outputs_of(sample(negated))[0], outputs_of(sample(tensors))[0])


@each_sample
def test_negative_gradients(sample):
    """Behind the conjugate of a complex number they are negative views; the kernels once missed the sign."""
    tensors = sample.tensors(requires_grad=True)
    out = outputs_of(sample(tensors))[0]
    seed, came = torch.randn_like(out), []
    out.register_hook(lambda grad: came.append(grad.is_neg()))
    imaginary = torch.complex(torch.zeros_like(out), out).conj()
    product = (imaginary * torch.complex(torch.zeros_like(out), seed)).real
    got = torch.autograd.grad(product.sum(), list(tensors.values()), retain_graph=True)
    assert came == [True]
    for a, b in zip(got, torch.autograd.grad(out, list(tensors.values()), seed), strict=True):
        assert torch.equal(a, b)


@each_sample
@pytest.mark.parametrize("lends", [True, False])
def test_zeros_without_memory(sample, lends, monkeypatch):
    """Automatic differentiation makes them, as gradients too; the kernels once took them for absent, or read at 0."""
    if not lends:
        monkeypatch.setattr(native, "lends", False)
        monkeypatch.setattr(operator_module, "_native_signature", None)
    tensors = sample.tensors(requires_grad=True)

    def results(given, seed):
        out = outputs_of(sample(given))[0]
        return out, *torch.autograd.grad(out, list(given.values()), seed(out))

    def without_memory(tensor):
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)

    def checked(run):
        torch.testing.assert_close(run(without_memory), run(torch.zeros_like), equal_nan=True)

    checked(lambda zeros: results(tensors, zeros))
    for name, tensor in tensors.items():
        checked(lambda zeros: results({**tensors, name: zeros(tensor).requires_grad_()}, torch.ones_like))  # noqa: B023


@each_sample
def test_gradients_of_a_wrapper_class(sample):
    """Its own memory holds nothing; the kernels once read that."""
    tensors = sample.tensors(requires_grad=True)
    out = outputs_of(sample(tensors))[0]
    seed = torch.randn_like(out)
    pair = TwoTensor(seed, 2 * seed)
    got = torch.autograd.grad(out, list(tensors.values()), pair, retain_graph=True)
    for scale, side in ((1, "a"), (2, "b")):
        want = torch.autograd.grad(out, list(tensors.values()), scale * seed, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(getattr(a, side), b)


@each_sample
def test_saved_tensors_in_another_layout(sample):
    """Hooks owe values, sizes and dtypes alone; by-products were once read as if they lay as allocated."""
    tensors = sample.tensors(requires_grad=True)
    seeds = [torch.randn_like(o) for o in outputs_of(sample(tensors))]
    want = gradients(sample, tensors, seeds)

    def swapped(t):
        return t.mT.contiguous().mT if t.ndim >= 2 else t

    def apart(t):
        return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]

    for unpack in (swapped, apart):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            got = gradients(sample, tensors, seeds)
        for a, b in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@each_sample
@pytest.mark.parametrize("traced", [False, True])
def test_nodes_are_named_after_the_operator(sample, traced):
    """Every operator's were once EagerBackward or TracedBackward in graphs, profiles and anomaly mode."""
    with torch.autocast("cpu", torch.bfloat16, enabled=traced):
        out = outputs_of(sample(sample.tensors(dtype=torch.float64, requires_grad=True)))[0]
    node = out.grad_fn
    while "View" in node.name() or "Reshape" in node.name():  # of the public function
        node = node.next_functions[0][0]
    assert node.name() == f"{sample.op}Backward"


# Operators, and single samples of others, whose backward reads the result, as that of PyTorch's SDPA and ReLU does.
READS_RESULT = {
    *("window_attention", "neighborhood_attention", "strip_attention", "polyline_path_attention"),
    *("attention_with_size", "learnable_token_merge", "block_sparse_linear-relu", "token_merge-amax"),
}


@each_sample
@pytest.mark.parametrize("traced", [False, True])
def test_results_are_kept_for_a_backward_that_reads_them_alone(sample, traced):
    """All once were: ReLU(inplace=True) behind a sparsified layer failed, and what nobody read stayed in memory."""
    tensors = sample.tensors(torch.float64, requires_grad=True)  # which autocast leaves alone

    def trained(change):
        with torch.autocast("cpu", torch.bfloat16, enabled=traced):
            out = outputs_of(sample(tensors))[0]
        return torch.autograd.grad(change(out).square().sum(), list(tensors.values()))

    if READS_RESULT & {sample.op, sample.name}:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trained(lambda out: out.mul_(2))
        return
    for got, want in zip(trained(lambda out: out.mul_(2)), trained(lambda out: out * 2), strict=True):
        assert torch.equal(got, want)


@each_sample
def test_calls_of_one_signature_lie_alike(sample):
    """The first, which may be one in inference mode, allocates by shapes; the next like what the first found."""
    operator = REGISTRY[sample.op]
    operator._plans.clear()
    with torch.inference_mode():
        sample(sample.tensors())

    def layouts(tensors):
        return [(o.shape, o.stride(), o.dtype, o.is_inference()) for o in outputs_of(sample(tensors))]

    grown = {n: t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t for n, t in sample.tensors().items()}
    swapped = {n: t.mT.contiguous().mT if t.ndim >= 2 else t for n, t in sample.tensors().items()}
    for tensors in (sample.tensors(), sample.tensors(requires_grad=True), grown, swapped):
        like = layouts(tensors)
        operator._plans.clear()
        assert like == layouts(tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_first_call_allocates_its_result_once():
    """What the next are allocated like once took as much memory again for a moment."""
    script = (
        "import resource, torch\n"
        "from vitkernels.core.operator import REGISTRY\n"
        "from vitkernels.core.plan import Plan\n"
        "operator, decay = REGISTRY['polyline_path_mask'], torch.zeros(1).expand(1, 1, 2**14, 1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29),) * 2)\n"
        "plan = Plan(operator, operator.backends['cpu'], ())\n"
        "assert plan.result((decay, decay)).nbytes == 1 << 30\n"
        "assert plan.outputs((decay, decay))[0].nbytes == 1 << 30\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_options_of_another_type_are_checked_again():
    """4.0 equals 4 and True equals 1, so a remembered call once let them pass."""
    x = torch.randn(1, 1, 16, 8)
    vitkernels.ops.window_attention(x, x, x, window=4, scale=1)
    for wrong in ({"window": 4.0, "scale": 1}, {"window": (4.0, 4)}, {"window": 4, "scale": True}):
        with pytest.raises(TypeError):
            vitkernels.ops.window_attention(x, x, x, **wrong)


def test_plans_do_not_pile_up(monkeypatch):
    """A process that sees ever new shapes would hold on to all of them."""
    operator = REGISTRY["token_unmerge"]
    plans = dict.fromkeys(range(4095))
    monkeypatch.setattr(operator, "_plans", plans)
    plan = vitkernels.ops.bipartite_match(torch.randn(1, 8, 4), 2)
    for channels, count in ((3, 4096), (5, 1), (5, 1), (6, 2)):
        vitkernels.ops.token_unmerge(torch.randn(1, 6, channels), plan)
        assert len(plans) == count


def test_first_calls_of_several_threads(tmp_path, monkeypatch):
    """The second once got the kernels' module while the first was still importing it, and found no `forward`."""
    (tmp_path / "slow_kernels.py").write_text("import time\ntime.sleep(0.2)\nforward = backward = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    backend = Backend("cpu", "slow_kernels")
    with ThreadPoolExecutor(4) as threads:
        ready = list(threads.map(lambda _: hasattr(backend.load(), "forward"), range(4)))
    assert ready == [True] * 4


@pytest.mark.parametrize("traced", [False, True])
def test_dimensions_that_32_bits_cannot_count_are_refused(traced):
    """Once cut to their lowest bits: of 2^32 + 1 channels or keys the kernels saw one. Without memory, so that a test
    can have them."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # which autocast leaves alone
    far = one.expand(1, 1, 1, 2**32 + 1)
    with torch.autocast("cpu", enabled=traced):
        with pytest.raises(ValueError, match=r"`q`: expected dimensions below 2\^31.*4294967297"):
            vitkernels.ops.window_attention(far, far, one, window=1)
        with pytest.raises(ValueError, match=r"`k`: expected dimensions below 2\^31.*4294967297"):
            vitkernels.ops.strip_attention(one, far.mT, far.mT)


@each_sample
def test_without_the_exchange_table(sample, monkeypatch):
    """PyTorch before 2.10 lends no tensors: tuples cross the boundary instead, and Python makes the keys."""
    tensors = sample.tensors(requires_grad=True)
    seeds = [torch.randn_like(o) for o in outputs_of(sample(tensors))]
    want = gradients(sample, tensors, seeds)
    monkeypatch.setattr(native, "lends", False)
    monkeypatch.setattr(operator_module, "_native_signature", None)
    got = gradients(sample, tensors, seeds)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


@each_sample
@each_device
def test_call_overhead_is_printed(sample, device, record_property):
    for label, tensors in (
        ("call, no gradient", sample.tensors(device=device, batch=1)),
        ("call, with gradient", sample.tensors(device=device, batch=1, requires_grad=True)),
    ):
        best = float("inf")
        for _ in range(300):
            start = time.perf_counter()
            sample(tensors)
            best = min(best, time.perf_counter() - start)
        record_property(label, best)
