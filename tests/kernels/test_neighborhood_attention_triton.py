"""The Triton kernels of neighborhood attention in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_neighborhood_attention_triton.py`. bfloat16 is left to GPUs: tl.dot
on it is wrong in the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
from attention_calls import run
from guarded import Guarded

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from neighborhood_twin import (
    F16,
    F32,
    F64,
    Case,
    Inputs,
    Memory,
    Results,
    compare,
    line,
    make_inputs,
    run_reference,
    square,
)

from vitkernels import ops
from vitkernels.core.backends import BackendError
from vitkernels.kernels.neighborhood_attention import reference, triton_map, triton_rpb
from vitkernels.kernels.neighborhood_attention import triton as launcher

# What the interpreter says about tiles that a group shorter than the others leaves empty.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """An allocator, which the launcher takes its scratch from too."""
    guarded = Guarded()
    monkeypatch.setattr(launcher, "_scratch", lambda like, *shape: guarded(shape, F32))
    return guarded


def run_kernels(case: Case, inputs: Inputs, memory: Memory) -> Results:
    rows = (case.batch, *case.sizes, case.heads)
    into = memory((*rows, case.dv), case.dtype), memory(rows, F32)
    results = run(launcher, inputs, case.params, into, memory, case.missing)
    memory.check()
    return results


def check(case: Case, guarded: Guarded) -> None:
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    got = run_kernels(case, inputs, memory)
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))


CASES = [
    square((4, 5), 3, dtype=F32, rpb=F32, batch=2, heads=2, layout="packed"),
    square((7, 9), 7, d=32, dv=32, rpb=F32, layout="packed"),
    square((7, 9), 3, 2, d=8, dv=24, dtype=F32, rpb=F32, layout="cropped"),
    square((5, 5), 5, d=24, dv=16, rpb=F16),  # the kernel is the map
    square((6, 6), 3, 2, dtype=F32, rpb=F32, batch=2, layout="heads_first"),  # a group is one neighborhood
    Case((13, 5), (3, 5), d=40, dv=8, dtype=F32, rpb=F32),
    Case((5, 12), (2, 4), (2, 3), d=5, dv=7, dtype=F32, rpb=F32, layout="cropped"),
    Case((6, 9), (3, 4), (2, 1), (True, False), dtype=F32, layout="packed"),
    Case((5, 11), (4, 3), (1, 2), (False, True), d=12, dv=33),
    Case((7, 8), (3, 2), (2, 3), (True, True), dtype=F32, heads=2),
    Case((1, 13), (1, 4), (1, 2), dtype=F32, rpb=F32),
    Case((12, 1), (5, 1), (2, 1), rpb=F32),
    Case((4, 5), (1, 3), dtype=F32, rpb=F32),
    Case((1, 1), (1, 1), d=3, dv=2, dtype=F32),
    line(10, 3, 2, dtype=F32, rpb=F32, batch=3, layout="packed"),
    line(70, 16, d=16, dv=8, rpb=F32),
    line(70, 8, 3, causal=True, dtype=F32, d=9, dv=17, layout="heads_first"),
    line(12, 4, 3, rpb=F16, heads=2),
    line(19, 5, d=72, dv=24, dtype=F32, rpb=F32),
    line(9, 3, d=24, dv=136, dtype=F32),
    line(20, 4, d=72, dv=256, rpb=F32, layout="packed"),
    line(18, 3, 2, d=250, dv=130, rpb=F32),
    line(18, 3, 2, d=250, dv=130, dtype=F32, rpb=F32),
    line(20, 4, d=200, dv=256, dtype=F32),
    square((5, 6), 3, d=160, dv=144, dtype=F32, rpb=F32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, guarded: Guarded) -> None:
    check(case, guarded)


GOLDEN = {
    "A": """
        out .720355 1.407047 .933247 1.704691 2.746178 4.039624 5.568698 7.320040 5.847636 7.584704
        lse 1.201943 1.528390 1.580270 2.155712 2.952265 3.967191 5.197735 6.641311 6.595613 8.258660
        grad_q .107904 .158128 .102317 .136649 .157983 .167386 .167221 .160252 .114159 .107351
        grad_k -.034777 -.099431 -.131453 -.205660 -.275622 -.212211 -.291872 -.307337 .733724 .824640
        grad_v .486933 .381158 .744582 .685177 1.214891 1.299189 .988766 .995592 1.564828 1.638883
        grad_rpb -.213632 -1.976265 -1.503005 2.892576 .800324""",
    "B": """
        out .720355 1.407047 .933247 1.704691 2.746178 4.039624 5.568698 7.320040 5.847636 7.584704
        lse 1.201943 1.528390 1.580270 2.155712 2.952265 3.967191 5.197735 6.641311 6.595613 8.258660
        grad_q .321215 .497540 .366348 .523089 .664188 .790572 .904691 1.009549 .873137 .974191
        grad_k .002488 -.033022 -.027949 -.049468 -.015821 .163407 .204196 .276567 1.837087 2.142515
        grad_v .486933 .381158 .744582 .685177 1.214891 1.299189 .988766 .995592 1.564828 1.638883
        grad_rpb -.167099 -1.094454 2.171855 7.485456 1.604242""",
    "C": """
        out 0 .100000 .239475 .616525 1.077825 1.892361 2.958662 4.261275 5.787628 7.528177
        lse 0 .100000 .913015 1.337488 2.101518 2.907606 3.930678 5.168046 6.617253 8.276155
        grad_q 0 0 .019221 .036605 .089604 .113119 .125504 .128977 .126031 .118933
        grad_k -.071935 -.135592 -.154615 -.175959 -.159797 -.134108 -.007886 .014139 .394233 .431520""",
}


@pytest.mark.parametrize("vector", GOLDEN)
def test_golden_vector(vector: str, guarded: Guarded) -> None:
    """Ten tokens of one channel, q = k = i, v = i^2 / 10, scale 0.1; computed apart from this package."""
    case = line(10, 3, 2, causal=vector == "C", d=1, dv=1, dtype=F32, rpb=None if vector == "C" else F32)
    memory = Memory(case, guarded)
    position = torch.arange(10.0).view(1, 10, 1, 1)
    rpb = None if vector == "C" else torch.linspace(-0.2, 0.2, 5)[None]
    inputs = Inputs(
        {"q": position, "k": position, "v": position.square() / 10, "rpb": rpb},
        torch.ones(1, 10, 1, 1),
        torch.ones(1, 10, 1) if vector == "B" else None,
    )

    class Scaled(Case):
        params = (*case.params[:-1], 0.1)

    got = run_kernels(Scaled(**vars(case)), inputs, memory)
    expected = {name: values for name, *values in map(str.split, GOLDEN[vector].strip().splitlines())}
    for name, values in expected.items():
        want = torch.tensor([float(value) for value in values])
        torch.testing.assert_close(
            got[name].flatten(), want, atol=4e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_windows(causal: bool) -> None:
    """Every axis of up to 9 tokens: with equal logits and one-hot values an output is the window."""
    for kernel, length in product(range(1, 6), range(1, 10)):
        if kernel > length:
            continue
        position, _, seen = reference.axis_neighbors(length, kernel, 1, 1, causal)
        sees = torch.zeros(length, length, dtype=torch.bool)
        for query in range(length):
            sees[query, position[query][seen[query]]] = True
        case = line(length, kernel, causal=causal, d=1, dv=length, dtype=F32)
        q = torch.zeros(1, length, 1, 1)
        v = torch.eye(length).view(1, length, 1, length)
        out, lse = torch.empty_like(v), torch.empty(1, length, 1)
        launcher.forward(out, lse, q, q, v, None, *case.params)
        assert torch.equal(out[0, :, 0] > 0, sees)
        torch.testing.assert_close(lse.flatten(), sees.sum(1).float().log())


@pytest.mark.parametrize("given", ["grad_out", "grad_lse"])
def test_absent_incoming_gradient_is_zero(given: str, guarded: Guarded) -> None:
    case = square((5, 7), 3, dtype=F32, rpb=F32)
    check(replace(case, grad_out=given == "grad_out", grad_lse=given == "grad_lse"), guarded)


def test_no_incoming_gradient_gives_zeros(guarded: Guarded) -> None:
    case = square((4, 4), 3, dtype=F32, rpb=F32, grad_out=False, grad_lse=False)
    memory = Memory(case, guarded)
    got = run_kernels(case, make_inputs(case, memory), memory)
    assert all(not got[f"grad_{name}"].any() for name in ("q", "k", "v", "rpb"))


def test_each_gradient_alone_is_the_joint_one(guarded: Guarded) -> None:
    case = square((5, 6), 3, dtype=F32, rpb=F32)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    joint = run_kernels(case, inputs, memory)
    for wanted in inputs.tensors:
        missing = tuple(name for name in inputs.tensors if name != wanted)
        alone = run_kernels(replace(case, missing=missing), inputs, memory)
        assert set(alone) == {"out", "lse", f"grad_{wanted}"}
        for name, tensor in alone.items():
            assert torch.equal(tensor, joint[name]), f"{name}, {wanted} alone"


def test_lse_is_optional() -> None:
    case = square((5, 6), 3, dtype=F32, rpb=F32)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    out, alone, lse = (torch.empty(1, 5, 6, 1, *rest) for rest in ((16,), (16,), ()))
    launcher.forward(out, lse, *inputs.tensors.values(), *case.params)
    launcher.forward(alone, None, *inputs.tensors.values(), *case.params)
    assert torch.equal(out, alone)


def test_programs_sum_several_maps_the_same_bits_every_time(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = square((4, 4), 3, dtype=F32, rpb=F32, batch=3)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    for programs in (2048, 2):
        monkeypatch.setattr(launcher, "RPB_PROGRAMS", programs)
        first, second = (run_kernels(case, inputs, memory) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        compare(case, first, run_reference(case, inputs, None), run_reference(case, inputs, F64))


def test_chunks_cover_all_maps_evenly() -> None:
    for batch, per_chunk, size in product((1, 2, 7, 64, 513), (1, 98, 5000), (1, 1 << 20, 1 << 30)):
        chunks = launcher.batch_chunks(batch, per_chunk, size)
        assert min(len(range(chunk, batch, chunks)) for chunk in range(chunks)) >= 1
        assert chunks == 1 or chunks * size <= launcher.PARTIAL_BYTES


def test_expanded_gradient_and_large_logits(guarded: Guarded) -> None:
    """out.sum() hands a gradient whose strides are all zero; logits of +-1000 must not overflow."""
    case = square((5, 6), 3, rpb=F16)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    inputs.grad_out = torch.full((), 0.5, dtype=F16).expand(1, 5, 6, 1, 16)
    inputs.tensors["q"].mul_(100)
    inputs.tensors["rpb"].mul_(300)
    results = [
        run_kernels(case, inputs, memory),
        run_reference(case, inputs, None),
        run_reference(case, inputs, F64),
    ]
    assert all(torch.isfinite(tensor).all() for tensor in results[0].values())
    compare(case, *({name: result[name] for name in ("out", "lse", "grad_v")} for result in results))


def test_a_forbidden_offset_gets_no_weight(guarded: Guarded) -> None:
    case = square((5, 7), 3, dtype=F32, rpb=F32, grad_lse=False)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    inputs.tensors["rpb"][:, 3:] = -INF
    results = [
        run_kernels(case, inputs, memory),
        run_reference(case, inputs, None),
        run_reference(case, inputs, F64),
    ]
    assert not results[0]["grad_rpb"][:, 3:].any()
    compare(
        case, *({name: result[name] for name in ("out", "grad_q", "grad_k", "grad_v")} for result in results)
    )


def test_nan_stays_in_its_map_head_and_group(guarded: Guarded) -> None:
    case = Case((3, 6), (3, 3), (1, 2), dtype=F32, batch=2, heads=2)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    clean = run_kernels(case, inputs, memory)
    for tensor in inputs.tensors.values():
        if tensor is not None:
            tensor[1, :, 1::2, 0] = NAN
    got = run_kernels(case, inputs, memory)
    hit = torch.zeros(2, 3, 6, 2, dtype=torch.bool)
    hit[1, :, 1::2, 0] = True
    for name, tensor in got.items():
        assert tensor[hit].isnan().all(), name
        assert torch.equal(tensor[~hit], clean[name][~hit]), name


@triton.jit
def wrong_window_start(number, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """The window of the last queries is shifted one key too far inward."""
    return tl.maximum(tl.minimum(number - KERNEL // 2, length - KERNEL - 1), 0)


def test_wrong_results_are_rejected(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a mirrored table, a scale off by 1 %, a lost key, and a wrong border."""
    case = square((4, 5), 3, dtype=F32, rpb=F32)
    memory = Memory(case, guarded)
    inputs = make_inputs(case, memory)
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    right = run_kernels(case, inputs, memory)
    compare(case, right, baseline, truth)
    tensors = inputs.tensors
    lost = tensors["k"].clone()
    lost[:, -1] = 0
    wrong = [{"rpb": tensors["rpb"].flip(2)}, {"q": tensors["q"] * 1.01}, {"k": lost}]
    results = [run_kernels(case, replace(inputs, tensors={**tensors, **change}), memory) for change in wrong]
    for module in (triton_map, triton_rpb):
        monkeypatch.setattr(module, "window_start", wrong_window_start)
    results.append(run_kernels(case, inputs, memory))
    for result, name in product(results, truth):
        # A wrong border reaches offsets beyond the table, where its guards are NaN.
        with pytest.raises(AssertionError, match=r"exceeds|not finite"):
            compare(case, {**right, name: result[name]}, baseline, truth)


def test_public_call_reads_a_packed_projection() -> None:
    qkv = torch.randn(1, 6, 3, 3, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    results = {}
    for backend in ("triton", "reference"):
        out, lse = ops.neighborhood_attention(
            *qkv.unbind(3), 3, dilation=(2, 1), rpb=rpb, return_lse=True, backend=backend
        )
        results[backend] = (out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (qkv, rpb)))
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_limits_name_themselves() -> None:
    with pytest.raises(BackendError, match="takes head_dim and value_dim up to 256, got 257"):
        ops.neighborhood_attention(*(torch.empty(1, 9, 1, 257),) * 3, 3, backend="triton")
