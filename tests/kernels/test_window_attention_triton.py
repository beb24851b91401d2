"""The Triton kernels of window attention in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_window_attention_triton.py`. bfloat16 is left to GPUs: tl.dot on
it is wrong in the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import attention_calls
import pytest
import torch
from attention_calls import Inputs, Results, run
from guarded import Guarded

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import ops
from vitkernels.bench.cases.window_attention import table_entries, table_terms
from vitkernels.kernels.window_attention import reference
from vitkernels.kernels.window_attention import triton as launcher

F32, F16 = torch.float32, torch.float16
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    window: tuple[int, int] = (4, 4)
    d: int = 16
    dv: int = 48
    dtype: torch.dtype = F32
    bias: str | None = "absolute"
    table_dtype: torch.dtype = F32
    batch: int = 3
    heads: int = 2
    layout: str = "dense"  # a key of guarded.LAYOUTS
    grad_out: bool = True
    grad_lse: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.window[0]}x{self.window[1]}-d{self.d}-dv{self.dv}-{dtype}-{self.bias}-{self.layout}"

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.window[0] * self.window[1]

    @property
    def params(self) -> tuple[Any, ...]:
        return *self.window, self.bias == "signed", self.d**-0.5


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """An allocator, which the launcher takes its scratch from too."""
    guarded = Guarded()
    monkeypatch.setattr(launcher, "_scratch", lambda like, *shape: guarded(shape, F32))
    return guarded


def make_inputs(case: Case, guarded: Guarded) -> dict[str, torch.Tensor | None]:
    entries = table_entries(case.window, case.bias)
    return {
        "q": guarded.random((*case.rows, case.d), case.dtype, case.layout),
        "k": guarded.random((*case.rows, case.d), case.dtype, case.layout),
        "v": guarded.random((*case.rows, case.dv), case.dtype, case.layout),
        "bias_table": guarded.random((case.heads, entries), case.table_dtype) if case.bias else None,
        "grad_out": guarded.random((*case.rows, case.dv), case.dtype, case.layout) if case.grad_out else None,
        "grad_lse": guarded.random(case.rows, F32) if case.grad_lse else None,
    }


NAMES = ("q", "k", "v", "bias_table")


def _inputs(inputs: dict[str, Any]) -> Inputs:
    return Inputs({name: inputs[name] for name in NAMES}, inputs["grad_out"], inputs["grad_lse"])


def run_kernels(
    case: Case, inputs: dict[str, Any], guarded: Guarded, wanted: tuple[str, ...] = NAMES
) -> Results:
    into = guarded((*case.rows, case.dv), case.dtype, case.layout), guarded(case.rows, F32)
    missing = tuple({*inputs} - {*wanted})
    empty = partial(guarded, layout=case.layout)
    results = run(launcher, _inputs(inputs), case.params, into, empty, missing)
    guarded.check()
    return results


def run_reference(case: Case, inputs: dict[str, Any], dtype: torch.dtype | None) -> Results:
    """In `dtype`, or in the inputs' own for None."""
    return attention_calls.run_reference(reference, _inputs(inputs), case.params, dtype)


def compare(case: Case, inputs: dict[str, Any], got: Results) -> None:
    truth, baseline = run_reference(case, inputs, torch.float64), run_reference(case, inputs, None)
    reduced = {"grad_bias_table": table_terms(case.batch, case.window, case.bias)}
    attention_calls.compare(case, got, baseline, truth, case.dtype, reduced)


CASES = [
    Case((4, 4), dv=112, layout="nchw", heads=1),
    Case((4, 4), dv=48, dtype=F16, table_dtype=F16, bias="signed"),
    Case((7, 7), dv=32, layout="nchw", heads=1, batch=2),
    Case((7, 7), dv=96, dtype=F16, layout="nchw", heads=1, batch=2),
    Case((6, 6), d=32, dv=32, dtype=F16, bias="signed", layout="packed", batch=1),
    Case((8, 8), d=24, dv=64, bias="signed", batch=1, heads=1),
    Case((7, 5), d=32, dv=16, layout="packed", batch=1),
    Case((7, 5), d=24, dv=80, dtype=F16, bias=None, layout="odd", batch=1),
    Case((1, 1), d=5, dv=3, layout="odd"),
    Case((3, 5), d=7, dv=17, bias="signed", layout="odd"),
    Case((12, 12), d=32, dv=24, batch=1, heads=1),
    Case((9, 8), dv=64, dtype=F16, layout="nchw", batch=2, heads=1),
    Case((5, 13), d=24, dv=80, dtype=F16, layout="odd", batch=1, heads=1, bias="signed"),
    Case((9, 9), dv=33, bias=None, layout="packed", batch=1),
]
# The interpreter takes seconds for a table of many offsets.
LARGER = [
    Case((7, 7), d=32, dv=32, dtype=F16, bias="signed", layout="packed", batch=1),
    Case((8, 8), d=24, dv=64, bias="signed", batch=1),
    Case((12, 12), d=32, dv=24, bias="signed", batch=1, heads=1),
    Case((12, 12), dv=64, dtype=F16, layout="nchw", batch=2, heads=1),
    Case((5, 13), d=24, dv=80, dtype=F16, layout="odd", batch=1, bias="signed"),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.thorough) for case in LARGER)], ids=str
)
def test_matches_reference(case: Case, guarded: Guarded) -> None:
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.parametrize("factor", [10, 30], ids=lambda factor: f"logits_of_{factor}")
def test_rounding_of_lse_does_not_scale_the_weights(factor: int, guarded: Guarded) -> None:
    # lse is as large as the logits, and so is its rounding: the weights that the backward takes from it sum to one no
    # more than to that.
    case = Case((4, 4), d=16, dv=16, batch=4)
    inputs = make_inputs(case, guarded)
    inputs["q"].mul_(factor)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.parametrize(
    ("given", "window"),
    [
        pytest.param("grad_out", (3, 3), id="grad_out-whole"),
        pytest.param("grad_lse", (3, 3), id="grad_lse-whole"),
        pytest.param("grad_lse", (6, 11), id="grad_lse-tiled"),
        pytest.param("grad_out", (6, 11), id="grad_out-tiled", marks=pytest.mark.thorough),
    ],
)
def test_absent_incoming_gradient_is_zero(window: tuple[int, int], given: str, guarded: Guarded) -> None:
    case = Case(window, dv=16, batch=2 if window == (3, 3) else 1, heads=1)
    case = replace(case, grad_out=given == "grad_out", grad_lse=given == "grad_lse")
    inputs = make_inputs(case, guarded)
    got = run_kernels(case, inputs, guarded)
    shapes = {"grad_out": (*case.rows, case.dv), "grad_lse": case.rows}
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if inputs[name] is None}
    assert len(zeros) == 1
    expected = run_kernels(case, {**inputs, **zeros}, guarded)
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.any() or (given, name) == ("grad_lse", "grad_v")


@pytest.mark.parametrize("window", [(3, 3), (6, 11)], ids=["whole", "tiled"])
def test_each_gradient_alone_is_the_joint_one(window: tuple[int, int], guarded: Guarded) -> None:
    case = Case(window, dv=16, batch=2 if window == (3, 3) else 1, heads=1)
    inputs = make_inputs(case, guarded)
    joint = run_kernels(case, inputs, guarded)
    for wanted in NAMES:
        alone = run_kernels(case, inputs, guarded, (wanted,))
        assert set(alone) == {"out", "lse", f"grad_{wanted}"}
        for name, tensor in alone.items():
            assert torch.equal(tensor, joint[name]), f"{name}, {wanted} alone"


def test_no_incoming_gradient_gives_zeros(guarded: Guarded) -> None:
    case = Case(grad_out=False, grad_lse=False, dv=16)
    got = run_kernels(case, make_inputs(case, guarded), guarded)
    assert all(not got[f"grad_{name}"].any() for name in NAMES)


@pytest.mark.parametrize("window", [(3, 5), (6, 11)], ids=["whole", "tiled"])
def test_programs_loop_over_windows(
    window: tuple[int, int], guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(window, dv=16, batch=3, heads=1)
    if window == (3, 5):
        case = replace(case, batch=5, bias="signed")
    inputs = make_inputs(case, guarded)
    wide = run_kernels(case, inputs, guarded)
    tiles = 1 if window == (3, 5) else 2 * 3
    monkeypatch.setattr(launcher, "FORWARD_PROGRAMS", 1)
    monkeypatch.setattr(launcher, "BACKWARD_PROGRAMS", 1 if window == (3, 5) else 2 * tiles)
    few = run_kernels(case, inputs, guarded)
    compare(case, inputs, few)
    for name in ("out", "lse", "grad_q", "grad_k", "grad_v"):
        assert torch.equal(wide[name], few[name]), name


def test_bias_gradient_is_the_same_bits_every_time(guarded: Guarded) -> None:
    case = Case((5, 4), dv=16, batch=3, heads=1)
    inputs = make_inputs(case, guarded)
    first, second = (run_kernels(case, inputs, guarded)["grad_bias_table"] for _ in range(2))
    assert torch.equal(first, second)


def test_expanded_gradient_and_large_logits(guarded: Guarded) -> None:
    """out.sum() hands a gradient whose strides are all zero; logits of +-1000 must not overflow."""
    case = Case((3, 3), dv=16, dtype=F16, batch=1)
    inputs = make_inputs(case, guarded)
    inputs["grad_out"] = torch.full((), 0.5, dtype=F16).expand(*case.rows, case.dv)
    inputs["q"].mul_(100)
    inputs["bias_table"].mul_(300)
    got = run_kernels(case, inputs, guarded)
    compare(case, inputs, {name: got[name] for name in ("out", "lse", "grad_v")})


@pytest.mark.parametrize("window", [(4, 4), (6, 11)], ids=["whole", "tiled"])
def test_nan_stays_in_its_window(window: tuple[int, int], guarded: Guarded) -> None:
    case = Case(window, dv=16, batch=3 if window == (4, 4) else 2, heads=1, bias=None)
    inputs = make_inputs(case, guarded)
    clean = run_kernels(case, inputs, guarded)
    inputs["v"][1] = NAN
    got = run_kernels(case, inputs, guarded)
    assert got["out"][1].isnan().all()
    for name in ("out", "grad_q", "grad_v"):
        assert torch.equal(got[name][0::2], clean[name][0::2]), name


def test_a_masked_offset_gets_no_weight(guarded: Guarded) -> None:
    """A table may forbid offsets with -inf; here every key of the first tile is forbidden to some queries."""
    case = Case((1, 70), dv=16, batch=1, heads=1, grad_lse=False)
    inputs = make_inputs(case, guarded)
    inputs["bias_table"][:, 20:] = -float("inf")
    got = run_kernels(case, inputs, guarded)
    for name in ("grad_q", "grad_k", "grad_v", "grad_bias_table"):
        assert torch.isfinite(got[name]).all(), name
    compare(case, inputs, {name: got[name] for name in ("out", "lse", "grad_q", "grad_k", "grad_v")})
    assert not got["grad_bias_table"][:, 20:].any()


@pytest.mark.parametrize("width", [5, 20, 70], ids=["small", "whole", "tiled"])
def test_fully_masked_row(width: int, guarded: Guarded) -> None:
    """As in plain PyTorch its out is NaN and its lse -inf; the other rows do not notice."""
    case = Case((1, width), dv=16, bias="signed", batch=1, heads=2)
    inputs = make_inputs(case, guarded)
    inputs["bias_table"][1, :width] = -float("inf")
    got, expected = run_kernels(case, inputs, guarded), run_reference(case, inputs, None)
    assert got["out"][:, 1, 0].isnan().all()
    assert (got["lse"][:, 1, 0] == -float("inf")).all()
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_wrong_results_are_rejected(guarded: Guarded) -> None:
    """The comparison sees a mirrored table, a scale off by 1 % and a lost key."""
    case = Case((3, 4), dv=16, bias="signed", batch=2, heads=1)
    inputs = make_inputs(case, guarded)
    for wrong in (
        {**inputs, "bias_table": inputs["bias_table"].flip(1)},
        {**inputs, "q": inputs["q"] * 1.01},
        {**inputs, "k": torch.cat([inputs["k"][:, :, :-1], torch.zeros_like(inputs["k"][:, :, -1:])], 2)},
    ):
        got = run_kernels(case, wrong, guarded)
        for name in ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_bias_table"):
            with pytest.raises(AssertionError, match="exceeds"):
                compare(case, inputs, {name: got[name]})


def test_public_call_reaches_the_kernels() -> None:
    q, k, v = (torch.randn(2, 1, 9, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(1, 9, requires_grad=True)
    results = {}
    for backend in ("triton", "reference"):
        out, lse = ops.window_attention(q, k, v, bias_table=table, window=3, return_lse=True, backend=backend)
        results[backend] = (out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, table)))
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_chunks_cover_all_windows_evenly() -> None:
    for batch in (1, 2, 7, 511, 513, 8192):
        for heads in (1, 3, 700):
            chunks = launcher.window_chunks(batch, heads, 512)
            sizes = [len(range(chunk, batch, chunks)) for chunk in range(chunks)]
            assert sum(sizes) == batch
            assert min(sizes) >= 1
            assert chunks * heads <= max(512, heads)
