"""The compiled CPU kernels of learnable token merging against the reference, on each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.learnable_token_merge import native, operator, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NORMALIZE = ("none", "sum", "softmax", "softmax_rows")
NAMES = ("y", "y_other", "divisors", "grad_z", "grad_g", "grad_other")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "padded": {"padding": 5, "before": 65},
    "tokens_first": {"order": (1, 0, 2), "before": 65},
    "strided": {"order": (2, 0, 1), "padding": 1, "before": 37},  # channels apart: copied
}


@dataclass
class Problem:
    """One call: tokens, merged tokens, the widths of z and of other (0: none), and how the mask is normalised."""

    tokens: int
    merged: int
    width: int
    other: int = 0
    normalize: str = "softmax"
    shared: bool = False
    layout: str = "dense"
    dtype: torch.dtype = torch.float32
    mask_dtype: torch.dtype | None = None
    batch: int = 3
    spread: float = 1.0

    def __post_init__(self) -> None:
        self.guarded = Guarded(walls=True)
        layout = self.chosen = Layout(**{"order": (0, 1, 2), **LAYOUTS[self.layout]})
        z = self.guarded.random((self.batch, self.tokens, self.width), self.dtype, layout)
        other = None
        if self.other:
            other = self.guarded.random((self.batch, self.tokens, self.other), self.dtype, layout)
        g = self.guarded.random(self.mask_shape, self.mask_dtype or self.dtype, layout)
        g.mul_(self.spread)
        if self.normalize == "sum":
            g.copy_(g.float().abs() + 0.1)
        self.inputs: tuple[Any, ...] = (z, g, other)
        self.seeds = [
            None if width == 0 else self.guarded.random((self.batch, self.merged, width), self.dtype, layout)
            for width in (self.width, self.other)
        ]

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (*(() if self.shared else (self.batch,)), self.tokens, self.merged)

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = [
            None if t is None else t.detach().to(t.dtype if dtype is self.dtype else dtype).requires_grad_()
            for t in self.inputs
        ]
        y, y_other, divisors = reference.forward(*leaves, self.normalize)
        wanted = [t for t in leaves if t is not None]
        results = [y] + ([y_other] if self.other else [])
        seeds = [seed.to(y.dtype) for seed in self.seeds if seed is not None]
        grads = torch.autograd.grad(results, wanted, seeds)
        return [y, y_other if self.other else None, divisors if divisors.numel() else None, *grads] + (
            [] if self.other else [None]
        )

    def run(
        self, wanted: tuple[bool, ...] = (True,) * 3, seeds: tuple[bool, ...] = (True, True)
    ) -> list[Any]:
        """The outputs and the gradients; nothing beside them was written."""
        outputs = []
        for allocate in operator.allocate:
            like = allocate(*self.inputs, self.normalize)
            outputs.append(self.guarded(tuple(like.shape), like.dtype) if like.numel() else like)
        native.forward(*outputs, *self.inputs, self.normalize)
        grads = [
            self.guarded(tuple(t.shape), t.dtype, self.chosen) if t is not None and want else None
            for t, want in zip(self.inputs, wanted, strict=True)
        ]
        given = [seed if use else None for seed, use in zip(self.seeds, seeds, strict=True)]
        native.backward(*grads, *given, None, *outputs, *self.inputs, self.normalize)
        self.guarded.check()
        return [*(t if t.numel() else None for t in outputs), *grads]

    def check(self, results: list[Any] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if got is None:
                assert true is None, name
                continue
            assert true is not None
            assert base is not None
            if true.abs().max() < 1e-12:  # as of a softmax over one element
                assert (got.abs() <= 64 * self.width * torch.finfo(self.dtype).eps).all(), name
                continue
            assert_close_to_truth(
                name,
                got,
                base,
                true,
                factor=GRADIENT if name.startswith("grad") else FORWARD,
                reduced=self.batch if name == "grad_g" and self.shared else 1,
                dtype=got.dtype if name == "divisors" else self.dtype,
            )


def named(case: tuple[Any, ...]) -> str:
    return "-".join(str(part) for part in case)


# tokens, merged tokens, widths of z and other, whether the mask is shared, layout
CASES: list[tuple[Any, ...]] = [
    (197, 158, 48, 0, False, "dense"),
    (64, 52, 96, 40, True, "padded"),
    (37, 21, 33, 7, False, "tokens_first"),
    (5, 3, 1, 2, True, "strided"),
    (1, 9, 8, 0, False, "dense"),
    (300, 1, 20, 0, True, "padded"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_matches_reference(case: tuple[Any, ...], normalize: str, dtype: torch.dtype) -> None:
    *sizes, shared, layout = case
    Problem(*sizes, normalize, shared, layout, dtype).check()


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...], normalize: str) -> None:
    *sizes, shared, layout = case
    for dtype in DTYPES:
        Problem(*sizes, normalize, shared, layout, dtype).run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_float32_mask_with_half_tokens(normalize: str, dtype: torch.dtype) -> None:
    for shared in (True, False):
        Problem(37, 21, 33, 7, normalize, shared, dtype=dtype, mask_dtype=torch.float32).check()


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "merged"), [(2, 197, 768, 158), (4, 256, 144, 205)], ids=str
)
def test_published_shapes(batch: int, tokens: int, width: int, merged: int) -> None:
    Problem(tokens, merged, width, width, "softmax", False, batch=batch).check()
    Problem(tokens, merged, width, 0, "sum", True, batch=batch).check()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("merged", [1, 4, 8, 23, 24, 25, 97])
@pytest.mark.parametrize("width", [1, 7, 24, 100, 260])
def test_widths_and_masks(width: int, merged: int, normalize: str, dtype: torch.dtype) -> None:
    for tokens, shared in ((2, True), (65, False), (257, True)):
        Problem(tokens, merged, width, 9, normalize, shared, dtype=dtype).check()


@pytest.mark.parametrize("normalize", ["softmax", "softmax_rows"])
def test_wide_logits(normalize: str) -> None:
    """Weights of 1 and of less than the smallest number, and logits beyond what an exponential holds."""
    Problem(70, 40, 24, 8, normalize, spread=40.0).check()
    problem = Problem(70, 40, 24, 8, normalize)
    problem.inputs[1].add_(500)
    problem.check()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_wrong_results_are_rejected(normalize: str) -> None:
    """The comparison sees a mask off by 1 %, a wrong token, and two rows of the mask exchanged."""
    right = Problem(40, 30, 24, 8, normalize)
    z, g, other = right.inputs
    one_token, exchanged = z.clone(), g.clone()
    one_token[:, 7] += 1
    exchanged[:, [1, 2]] = g[:, [2, 1]]
    good = right.run()
    right.check(good)
    for inputs in ((z, g * 1.01 + 0.01, other), (one_token, g, other), (z, exchanged, other)):
        wrong = Problem(40, 30, 24, 8, normalize)
        wrong.inputs, wrong.seeds = inputs, right.seeds
        for i, (name, result) in enumerate(zip(NAMES, wrong.run(), strict=True)):
            if result is None or torch.allclose(
                result, good[i], rtol=3e-3, atol=3e-3 * float(good[i].abs().max())
            ):
                continue  # what the change does not reach, or not enough
            mixed = list(good)
            mixed[i] = result
            with pytest.raises(AssertionError, match=f"{name}: max .* exceeds"):
                right.check(mixed)


each_sharing = pytest.mark.parametrize("shared", [True, False])


@each_sharing
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_absent_results_and_gradients(normalize: str, shared: bool) -> None:
    problem = Problem(40, 30, 24, 8, normalize, shared)
    full = problem.run()
    for i in range(3):
        wanted = tuple(j == i for j in range(3))
        for got, want in zip(problem.run(wanted)[3:], full[3:], strict=True):
            assert got is None or torch.equal(got, want)
    assert problem.run((False,) * 3)[3:] == [None] * 3
    neither = problem.run(seeds=(False, False))[3:]
    assert all((t == 0).all() for t in neither)
    for i in range(2):
        only = problem.run(seeds=(i == 0, i == 1))[3:]
        kept = problem.seeds[1 - i].clone()
        problem.seeds[1 - i].zero_()
        for got, want in zip(problem.run()[3:], only, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        problem.seeds[1 - i].copy_(kept)


@each_sharing
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_threads_do_not_change_a_bit(normalize: str, shared: bool) -> None:
    problem = Problem(64, 52, 96, 40, normalize, shared, batch=20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(problem.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert one is same is None or torch.equal(one, same)


def test_an_expanded_mask_is_one_for_each_image() -> None:
    z, g = torch.randn(3, 9, 8), torch.randn(9, 4)
    spread = g.expand(3, 9, 4).detach().requires_grad_()
    results = []
    for backend in ("cpu", "reference"):
        y = ops.learnable_token_merge(z, spread, normalize="softmax", backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), spread)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    outputs = operator((z, spread, None), ("softmax",), "cpu")
    torch.testing.assert_close(outputs[2], g.logsumexp(0).expand(3, 4))


def test_nan_stays_in_its_image() -> None:
    for normalize in NORMALIZE:
        problem = Problem(40, 30, 24, 0, normalize)
        problem.inputs[1][1, 3, 2] = float("nan")
        y = problem.run()[0]
        assert y[1, 2].isnan().all(), normalize
        assert not y[[0, 2]].isnan().any(), normalize


def test_columns_that_sum_to_zero() -> None:
    """Exact zeros and numbers that cancel out are divided by 1, and their gradient is the plain one."""
    problem = Problem(4, 3, 24, 8, "sum")
    problem.inputs[1][:, :, 1] = 0
    problem.inputs[1][:, :, 2] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    problem.check()
