"""Any window, any sizes, any strides: the CPU kernels of window attention by the house rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.bench.cases.window_attention import table_entries, table_terms
from vitkernels.core import native as extension
from vitkernels.kernels.window_attention import native, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

LAYOUTS = st.builds(
    Layout,
    order=st.permutations(range(4)).map(tuple),
    padding=st.integers(0, 3),
    step=st.integers(1, 3),
    before=st.integers(16, 33),
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around every width of vector and tile; each tensor lies in memory in a way of its own."""
    return {
        "window": draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        "batch": draw(st.integers(1, 4)),
        "heads": draw(st.integers(1, 3)),
        "d": draw(st.integers(1, 40)),
        "dv": draw(st.integers(1, 70)),
        "bias": draw(st.sampled_from([None, "absolute", "signed"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layouts": draw(st.lists(LAYOUTS, min_size=8, max_size=8)),
        "wanted": draw(st.tuples(*[st.booleans()] * 4)),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_keeps_to_the_house_rule(call: dict[str, Any]) -> None:
    check(**call)


def check(
    window: tuple[int, int],
    batch: int,
    heads: int,
    d: int,
    dv: int,
    bias: str | None,
    dtype: torch.dtype,
    layouts: list[Layout],
    wanted: tuple[bool, ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    guarded, params = Guarded(), (*window, bias == "signed", d**-0.5)
    rows = (batch, heads, window[0] * window[1])
    shapes = [(*rows, d), (*rows, d), (*rows, dv)]
    q, k, v = (guarded.random(shape, dtype, layout) for shape, layout in zip(shapes, layouts, strict=False))
    table = guarded.random((heads, table_entries(window, bias)), dtype) if bias else None
    grad_out, grad_lse = guarded.random((*rows, dv), dtype, layouts[3]), guarded.random(rows, dtype)
    out, lse = guarded((*rows, dv), dtype, layouts[4]), guarded(rows, dtype)
    native.forward(out, lse, q, k, v, table, *params)
    grads = [
        guarded(shape, dtype, layout) if want else None
        for shape, layout, want in zip(shapes, layouts[5:], wanted, strict=False)
    ]
    grads.append(guarded(tuple(table.shape), dtype) if table is not None and wanted[3] else None)
    native.backward(*grads, grad_out, grad_lse, out, lse, q, k, v, table, *params)
    guarded.check()

    def expected(
        dtype: torch.dtype, tokens: bool = False, channels: bool = False
    ) -> list[torch.Tensor | None]:
        """The reference; on request with the tokens, or the channels of q and k, in reverse: the same sums."""

        def turn(x: torch.Tensor | None, *, of_head: bool = False) -> torch.Tensor | None:
            return None if x is None else x.flip([2] * tokens + [3] * (channels and of_head))

        def turn_table(x: torch.Tensor | None) -> torch.Tensor | None:
            return x.flip(1) if tokens and x is not None and bias == "signed" else x

        def inputs(q: Any, k: Any, v: Any, table: Any) -> list[torch.Tensor | None]:
            return [turn(q, of_head=True), turn(k, of_head=True), turn(v), turn_table(table)]

        leaves = [
            None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
            for x in inputs(q, k, v, table)
        ]
        outputs = reference.forward(*leaves, *params)
        torch.autograd.backward(outputs, (turn(grad_out.to(dtype)), turn(grad_lse.to(dtype))))
        grads = inputs(*(None if leaf is None else leaf.grad for leaf in leaves))
        return [turn(outputs[0].detach()), turn(outputs[1].detach()), *grads]

    truths = expected(torch.float64)
    # Of so few numbers the largest error is a matter of luck; an order of summation that PyTorch happens not to
    # have taken is no less PyTorch's.
    orders = [expected(dtype, *reverse) for reverse in itertools.product((False, True), repeat=2)]
    names = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_bias_table")
    terms = table_terms(batch, window, bias)
    for i, (name, got, truth) in enumerate(zip(names, (out, lse, *grads), truths, strict=True)):
        if got is None:
            continue
        baseline = max((order[i] for order in orders), key=lambda x, truth=truth: (x - truth).abs().max())
        factor = FORWARD if name in ("out", "lse") else GRADIENT
        reduced = terms if name == "grad_bias_table" else 1
        assert_close_to_truth(name, got, baseline, truth, factor=factor, reduced=reduced)
