"""The Triton kernels of learnable token merging in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_learnable_token_merge_triton.py`. bfloat16 is left to GPUs: tl.dot on it
is wrong in the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from far import far
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import ops
from vitkernels.kernels.learnable_token_merge import reference
from vitkernels.kernels.learnable_token_merge import triton as launcher

F32, F16 = torch.float32, torch.float16
NAN = float("nan")
NORMALIZATIONS = ("none", "sum", "softmax", "softmax_rows")
each_normalization = pytest.mark.parametrize("normalize", NORMALIZATIONS)
# The others run through the same lines.
two_normalizations = pytest.mark.parametrize(
    "normalize",
    [
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("none", "softmax_rows")),
        "sum",
        "softmax",
    ],
)
NAMES = ("z", "g", "other")
LAYOUTS = {"dense": Layout((0, 1, 2), before=65), "odd": Layout((2, 0, 1), padding=1, before=37)}


@dataclass(frozen=True)
class Case:
    normalize: str = "softmax"
    tokens: int = 35
    merged: int = 18
    width: int = 20
    other: int | None = None  # the width of the second operand
    dtype: torch.dtype = F32
    mask_dtype: torch.dtype | None = None
    batch: int = 2
    shared: bool = False
    layout: str = "dense"
    grad_y: bool = True
    grad_y_other: bool = True

    def __str__(self) -> str:
        dtypes = "+".join(str(d).removeprefix("torch.") for d in (self.dtype, self.mask_dtype) if d)
        widths = f"{self.width}" if self.other is None else f"{self.width}+{self.other}"
        kind = "shared" if self.shared else "own"
        return f"{self.normalize}-{kind}-{self.batch}x{self.tokens}to{self.merged}-{widths}-{dtypes}-{self.layout}"


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """An allocator, which the launcher takes its scratch from too."""
    guarded = Guarded()
    monkeypatch.setattr(launcher, "_scratch", lambda like, *shape: guarded(shape, F32))
    return guarded


def make_inputs(case: Case, guarded: Guarded) -> dict[str, Any]:
    layout = LAYOUTS[case.layout]

    def tokens(count: int, width: int | None) -> torch.Tensor | None:
        return None if width is None else guarded.random((case.batch, count, width), case.dtype, layout)

    shape = (1 if case.shared else case.batch, case.tokens, case.merged)
    g = guarded.random(shape, case.mask_dtype or case.dtype, layout)
    if case.normalize == "sum":
        g.abs_().add_(0.1)
    return {
        "z": tokens(case.tokens, case.width),
        "g": g[0] if case.shared else g,
        "other": tokens(case.tokens, case.other),
        "grad_y": tokens(case.merged, case.width if case.grad_y else None),
        "grad_y_other": tokens(case.merged, case.other if case.grad_y_other else None),
    }


def run_kernels(
    case: Case, inputs: dict[str, Any], guarded: Guarded, wanted: tuple[str, ...] = NAMES
) -> dict[str, torch.Tensor]:
    arguments = (*(inputs[name] for name in NAMES), case.normalize)
    y = guarded((case.batch, case.merged, case.width), case.dtype)
    y_other = (
        y.new_empty(0) if case.other is None else guarded((case.batch, case.merged, case.other), case.dtype)
    )
    g = inputs["g"]
    lines = {"none": (0,), "softmax_rows": g.shape[:-1]}.get(case.normalize, (*g.shape[:-2], case.merged))
    divisors = guarded(lines, F32)
    launcher.forward(y, y_other, divisors, *arguments)
    grads: dict[str, Any] = {}
    for name in NAMES:
        if inputs[name] is None or name not in wanted:
            grads[name] = None
        elif inputs[name].ndim == 2:
            grads[name] = guarded((1, *g.shape), g.dtype, LAYOUTS[case.layout])[0]
        else:
            grads[name] = guarded(inputs[name].shape, inputs[name].dtype, LAYOUTS[case.layout])
    incoming = (inputs["grad_y"], inputs["grad_y_other"], None)
    launcher.backward(*grads.values(), *incoming, y, y_other, divisors, *arguments)
    guarded.check()
    named = {"y": y, "y_other": y_other, "divisors": divisors}
    named |= {f"grad_{name}": grad for name, grad in grads.items() if grad is not None}
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


def run_reference(case: Case, inputs: dict[str, Any], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """In `dtype`, or in the inputs' own for None."""
    leaves = {
        name: inputs[name].to(dtype).detach().clone().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    y, y_other, divisors = reference.forward(leaves["z"], leaves["g"], leaves.get("other"), case.normalize)
    pairs = [(y, inputs["grad_y"]), (y_other, inputs["grad_y_other"])]
    incoming = [(output, grad.to(output.dtype)) for output, grad in pairs if grad is not None]
    torch.autograd.backward(*zip(*incoming, strict=True))
    named = {"y": y, "y_other": y_other, "divisors": divisors}
    for name, leaf in leaves.items():
        named[f"grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


def compare(case: Case, inputs: dict[str, Any], got: dict[str, torch.Tensor]) -> None:
    truth, baseline = run_reference(case, inputs, torch.float64), run_reference(case, inputs, None)
    for name, tensor in got.items():
        if not truth[name].any():
            assert not tensor.any(), f"{name}: expected zeros"
            continue
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_close_to_truth(
            name, tensor, baseline[name], truth[name], factor=factor,
            reduced=case.batch if name == "grad_g" and case.shared else 1,
            dtype=F32 if name == "divisors" else case.dtype,
        )  # fmt: skip


CASES = [
    *(Case(normalize, other=7, layout="odd", shared=normalize == "sum") for normalize in NORMALIZATIONS),
    *(Case(normalize, dtype=F16, other=40, shared=normalize[:4] == "soft") for normalize in NORMALIZATIONS),
    *(Case(normalize, dtype=F16, mask_dtype=F32, layout="odd") for normalize in NORMALIZATIONS),
    Case("none", 70, 17, 66, shared=True, batch=1),
    Case("sum", 70, 5, 130, dtype=F16, batch=1),
    Case("softmax", 70, 65, 65, dtype=F16, mask_dtype=F32, shared=True),
    Case("softmax_rows", 17, 70, 33, other=66, shared=True, batch=1),
    Case("softmax", 1, 1, 1),
    Case("sum", 1, 3, 2, dtype=F16, shared=True),
    Case("softmax_rows", 3, 1, 5, other=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, guarded: Guarded) -> None:
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.thorough
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtypes", [(F32, None), (F16, None), (F16, F32)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "merged", "width", "other"), [(197, 158, 48, None), (64, 52, 96, 80), (65, 3, 1, 2)]
)
@each_normalization
def test_grid(normalize, tokens, merged, width, other, dtypes, shared, guarded) -> None:  # type: ignore[no-untyped-def]
    case = Case(normalize, tokens, merged, width, other, *dtypes, batch=3, shared=shared)
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.parametrize("programs", [1, 3])
@two_normalizations
def test_shares_of_the_batch_add_up(
    normalize: str, programs: int, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many programs split a batch: the same sums to rounding, and the same bits every time."""
    monkeypatch.setattr(launcher, "GRADIENT_PROGRAMS", programs)
    case = Case(normalize, 20, 11, 9, batch=5, shared=True)
    inputs = make_inputs(case, guarded)
    got, again = (run_kernels(case, inputs, guarded) for _ in range(2))
    compare(case, inputs, got)
    assert all(torch.equal(again[name], got[name]) for name in got)


@two_normalizations
@pytest.mark.parametrize("given", ["grad_y", "grad_y_other"])
def test_absent_incoming_gradient_is_zero(given: str, normalize: str, guarded: Guarded) -> None:
    case = Case(normalize, 12, 9, 5, other=4, grad_y=given == "grad_y", grad_y_other=given == "grad_y_other")
    inputs = make_inputs(case, guarded)
    got = run_kernels(case, inputs, guarded)
    zeros = {"grad_y": torch.zeros(2, 9, 5), "grad_y_other": torch.zeros(2, 9, 4)}
    zeros.pop(given)
    expected = run_kernels(case, {**inputs, **zeros}, guarded)
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.any() or name == ("grad_other" if given == "grad_y" else "grad_z")


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_each_gradient_alone_is_the_joint_one(wanted: str, shared: bool, guarded: Guarded) -> None:
    case = Case("softmax", 20, 12, 9, other=5, dtype=F16, shared=shared)
    inputs = make_inputs(case, guarded)
    joint, alone = run_kernels(case, inputs, guarded), run_kernels(case, inputs, guarded, (wanted,))
    assert set(alone) == {"y", "y_other", "divisors", f"grad_{wanted}"}
    for name, tensor in alone.items():
        assert torch.equal(tensor, joint[name]), name


def test_no_incoming_gradient_gives_zeros(guarded: Guarded) -> None:
    case = Case("sum", 5, 3, 4, other=2, grad_y=False, grad_y_other=False)
    got = run_kernels(case, make_inputs(case, guarded), guarded)
    assert all(not got[f"grad_{name}"].any() for name in NAMES)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_column_that_sums_to_zero_is_divided_by_one(shared: bool, guarded: Guarded) -> None:
    case = Case("sum", 40, 5, 6, shared=shared)
    inputs = make_inputs(case, guarded)
    inputs["g"][..., 2] = torch.tensor([1.0, -1.0]).repeat(20)
    inputs["g"][..., 3] = torch.tensor([1.0, -0.5]).repeat(20) / 10  # a sum of exactly 1 is another matter
    inputs["g"][..., 4] = 0
    got = run_kernels(case, inputs, guarded)
    compare(case, inputs, got)
    assert (got["divisors"].view(-1, 5)[:, [2, 4]] == 1).all()


@pytest.mark.parametrize("normalize", ["softmax", "softmax_rows"])
@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_exponentials_neither_overflow_nor_vanish(level: float, normalize: str, guarded: Guarded) -> None:
    """The logarithm of a line's sum keeps as many digits as a number of its size: weights must not come from it."""
    case = Case(normalize, 40, 9, 6)
    inputs = make_inputs(case, guarded)
    inputs["g"].add_(level)
    compare(case, inputs, run_kernels(case, inputs, guarded))


def test_a_column_without_weight(guarded: Guarded) -> None:
    """-inf takes a token out of a column; the others go on without it."""
    case = Case("softmax", 40, 9, 6)
    inputs = make_inputs(case, guarded)
    inputs["g"][0, 3:30, 4] = -float("inf")
    got = run_kernels(case, inputs, guarded)
    compare(case, inputs, got)
    assert not got["grad_g"][0, 3:30, 4].any()


@pytest.mark.parametrize("name", NAMES)
@two_normalizations
def test_nan_shows_and_stays_in_its_image(normalize: str, name: str, guarded: Guarded) -> None:
    case = Case(normalize, 12, 5, 6, other=4, batch=3)
    inputs = make_inputs(case, guarded)
    clean = run_kernels(case, inputs, guarded)
    inputs[name][1, 3, 2] = NAN
    got = run_kernels(case, inputs, guarded)
    assert any(got[result][1].isnan().any() for result in ("y", "y_other"))
    for result, tensor in got.items():
        assert torch.equal(tensor[0::2], clean[result][0::2]), result


def test_one_hot_columns_are_the_mean_of_their_tokens(guarded: Guarded) -> None:
    case = Case("sum", 12, 4, 5)
    inputs = make_inputs(case, guarded)
    inputs["g"].copy_(torch.eye(4).repeat(3, 1))
    got = run_kernels(case, inputs, guarded)
    torch.testing.assert_close(got["y"], inputs["z"].view(2, 3, 4, 5).mean(1))


def test_expanded_gradient_and_mask(guarded: Guarded) -> None:
    """y.sum() hands a gradient whose strides are all zero; a mask may be expanded over the batch."""
    case = Case("softmax", 12, 5, 6, dtype=F16)
    inputs = make_inputs(case, guarded)
    inputs["grad_y"] = torch.full((), 0.5, dtype=F16).expand(2, 5, 6)
    inputs["g"] = inputs["g"][:1].expand(2, 12, 5)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.parametrize("normalize", ["none", "softmax_rows"])
def test_tokens_further_apart_than_32_bits_count(normalize: str, guarded: Guarded) -> None:
    case = Case(normalize, 3, 3, 4, other=2, dtype=F16, batch=1)
    inputs = make_inputs(case, guarded)
    want = run_kernels(case, inputs, guarded)
    apart = {name: far(tensor, 1) for name, tensor in inputs.items()}
    y, y_other = want["y"].clone(), want["y_other"].clone()
    divisors = torch.empty(1, 3) if normalize == "softmax_rows" else torch.empty(0)
    arguments = (*(apart[name] for name in NAMES), normalize)
    launcher.forward(y, y_other, divisors, *arguments)
    grads = [far(torch.zeros_like(inputs[name]), 1) for name in NAMES]
    incoming = (apart["grad_y"], apart["grad_y_other"], None)
    launcher.backward(*grads, *incoming, y, y_other, divisors, *arguments)
    got = {"y": y, "y_other": y_other} | {f"grad_{n}": grad for n, grad in zip(NAMES, grads, strict=True)}
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize(
    ("normalize", "shared"),
    [
        (name, shared)
        if shared == (name != "softmax")
        else pytest.param(name, shared, marks=pytest.mark.thorough)
        for name in NORMALIZATIONS
        for shared in (False, True)
    ],
)
def test_the_public_function_runs_the_kernels(shared: bool, normalize: str) -> None:
    z, x, w = (torch.randn(2, 9, c, requires_grad=True) for c in (5, 5, 3))
    g = torch.rand(*(() if shared else (2,)), 9, 4, requires_grad=True)
    kind = None if normalize == "none" else normalize
    results = {}
    for backend in ("triton", "reference"):
        merged = ops.learnable_token_merge(z, g, x, w, normalize=kind, backend=backend)
        loss = sum(y.square().sum() for y in merged)
        results[backend] = (*merged, *torch.autograd.grad(loss, (z, g, x, w)))
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    empty = ops.learnable_token_merge(z[:0], g if shared else g[:0], normalize=kind, backend="triton")
    assert empty.shape == (0, 4, 5)


@two_normalizations
def test_wrong_results_are_rejected(normalize: str, guarded: Guarded) -> None:
    """The comparison sees a lost token, a mask off by 1 % of a weight, and another image's mask."""
    case = Case(normalize, 20, 9, 6, other=5)
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))
    lost = inputs["g"].clone()
    lost[:, -1] = -float("inf") if normalize == "softmax" else 0.0
    for wrong in (lost, inputs["g"] + 0.01 * torch.randn(2, 20, 9), inputs["g"].flip(0)):
        got = run_kernels(replace(case), {**inputs, "g": wrong}, guarded)
        for name in ("y", "y_other", "grad_z", "grad_other"):
            with pytest.raises(AssertionError, match="exceeds"):
                compare(case, inputs, {name: got[name]})
    for name, tensor in run_kernels(case, inputs, guarded).items():
        with pytest.raises(AssertionError, match="exceeds"):
            compare(case, inputs, {name: tensor * 1.0001})
