"""The compiled CPU kernel of the residual FFN and its composed backward against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.residual_ffn import native, operator, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {
    "nchw": Layout(before=65),
    "nhwc": Layout((0, 2, 3, 1), before=65),
    "nhwc_of_wider": Layout((0, 2, 3, 1), padding=5, before=65),  # half of the channels of a map
    "padded_rows": Layout(padding=3, before=65),  # no one step between positions: copied
    "strided": Layout((3, 0, 2, 1), step=2, before=37),
}


@dataclass
class Problem:
    batch: int
    channels: int
    hidden: int
    size: tuple[int, int]
    layout: str
    dtype: torch.dtype
    scales: bool = True
    dw: bool = True
    vector_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        channels, hidden, vectors = self.channels, self.hidden, self.vector_dtype or self.dtype
        self.guarded = Guarded(walls=True)
        make = self.guarded.random
        shape = (self.batch, channels, *self.size)
        self.inputs: list[torch.Tensor | None] = [
            make(shape, self.dtype, LAYOUTS[self.layout]),
            make((hidden, channels), self.dtype).mul_(channels**-0.5),
            make((hidden,), vectors),
            make((channels, hidden), self.dtype).mul_(hidden**-0.5),
            make((channels,), vectors),
            make((hidden,), vectors) if self.scales else None,
            make((channels,), vectors) if self.scales else None,
            make((channels, 3, 3), vectors).mul_(1 / 3) if self.dw else None,
            make((channels,), vectors) if self.dw else None,
        ]
        self.grad_out = make(shape, self.dtype, LAYOUTS[self.layout])

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """out and the gradients of plain PyTorch; in the problem's own dtype vectors stay in theirs."""
        leaves = [
            None if t is None else t.to(t.dtype if dtype is self.dtype else dtype).requires_grad_()
            for t in self.inputs
        ]
        (out,) = reference.forward(*leaves)
        present = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(out, present, self.grad_out.to(out.dtype)))
        return [out, *(None if t is None else next(grads) for t in leaves)]

    def forward(self) -> torch.Tensor:
        out = self.guarded(tuple(self.inputs[0].shape), self.dtype, LAYOUTS[self.layout])
        native.forward(out, *self.inputs)
        self.guarded.check()
        return out

    def run(self) -> list[torch.Tensor | None]:
        out = self.forward()
        grads = [None if t is None else torch.full_like(t, float("nan")) for t in self.inputs]
        native.backward(*grads, self.grad_out, out, *self.inputs)
        return [out, *grads]

    def check(self, results: list[torch.Tensor | None] | None = None) -> None:
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        positions = self.batch * self.size[0] * self.size[1]
        names = ("out", *(f"grad_{name}" for name in operator.tensors))
        for name, got, base, true in zip(names, results or self.run(), baseline, truth, strict=True):
            assert (got is None) == (true is None)
            if got is not None:
                assert_close_to_truth(
                    name,
                    got,
                    base,
                    true,
                    factor=FORWARD if name == "out" else GRADIENT,
                    reduced=1 if name in ("out", "grad_x") else positions,
                    dtype=self.dtype,
                )


CASES: list[tuple[Any, ...]] = [
    (2, 64, 128, (14, 14), "nchw"),
    (5, 128, 256, (7, 7), "nhwc"),
    (9, 96, 192, (4, 4), "nhwc_of_wider"),
    (1, 288, 576, (7, 7), "nchw"),
    (1, 17, 31, (1, 1), "nhwc"),
    (3, 5, 7, (1, 13), "padded_rows"),
    (2, 33, 3, (13, 1), "strided"),
    (2, 16, 32, (23, 29), "nhwc"),
    (1, 1, 1, (2, 3), "nchw"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{c[3][0]}x{c[3][1]}-{c[4]}")
def test_matches_reference(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    Problem(*case, dtype).check()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{c[3][0]}x{c[3][1]}-{c[4]}")
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...]) -> None:
    for dtype in DTYPES:
        Problem(*case, dtype).run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["ones", "scales"])
@pytest.mark.parametrize("dw", [False, True], ids=["ffn", "dw"])
def test_absent_arguments(dtype: torch.dtype, scales: bool, dw: bool) -> None:
    Problem(3, 24, 40, (7, 5), "nhwc", dtype, scales, dw).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_vectors_with_half_weights(dtype: torch.dtype) -> None:
    Problem(2, 32, 64, (7, 7), "nchw", dtype, vector_dtype=torch.float32).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_that_are_not_dense(dtype: torch.dtype) -> None:
    """More than one run of terms of either weight, so that a run begins where its stride says."""
    problem = Problem(1, 150, 200, (3, 4), "nchw", dtype)
    want = problem.forward()
    for i in range(1, len(problem.inputs)):
        given = problem.inputs[i]
        # The dimensions in reverse order, and every third element.
        layout = Layout(tuple(reversed(range(given.ndim))), step=3)
        problem.inputs[i] = problem.guarded(tuple(given.shape), given.dtype, layout).copy_(given)
        assert torch.equal(problem.forward(), want)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(84, 50), (11, 180)], ids=str)
def test_maps_of_many_bands(size: tuple[int, int], layout: str) -> None:
    """Bands of rows, whose depthwise convolution reads the rows around them.

    A detection map; and 11 rows cut for 7 bands, which makes 6, the last of them lower.
    """
    problem = Problem(1, 96, 192, size, layout, torch.float32)
    assert_close_to_truth(
        "out",
        problem.forward(),
        problem.expected(torch.float32)[0],
        problem.expected(torch.float64)[0],
        factor=FORWARD,
    )


def test_wrong_results_are_rejected() -> None:
    """The comparison sees a tap at another place, a ReLU left out, a scale off by 1 % and a lost row."""
    right = Problem(2, 16, 32, (5, 4), "nchw", torch.float32)
    for index, change in (
        (7, lambda t: t.flip(2)),
        (2, lambda t: t + 100),  # no hidden unit is cut off
        (6, lambda t: t * 1.01),
        (1, lambda t: torch.cat([t[:-1], 0 * t[-1:]])),
    ):
        wrong = Problem(2, 16, 32, (5, 4), "nchw", torch.float32)
        wrong.inputs = [change(t) if i == index else t for i, t in enumerate(right.inputs)]
        wrong.grad_out = right.grad_out
        results = wrong.run()
        for i in (0, 1, 2):
            mixed = [*right.run()]
            mixed[i] = results[i]
            if index == 6 and i == 2:
                continue  # a gradient that such a scale enters once
            with pytest.raises(AssertionError, match=r"max .* exceeds"):
                right.check(mixed)
    right.check()


def test_a_nan_reaches_exactly_its_neighbourhood() -> None:
    for dw, reach in ((False, 0), (True, 1)):
        problem = Problem(2, 16, 32, (6, 7), "nchw", torch.float32, dw=dw)
        problem.inputs[0][1, 3, 2, 6] = float("nan")
        hit = torch.zeros(2, 6, 7, dtype=torch.bool)
        hit[1, 2 - reach : 3 + reach, 6 - reach :] = True
        out = problem.forward()
        assert torch.equal(out.isnan().all(1), hit)
        assert torch.equal(out.isnan().any(1), hit)


@pytest.mark.parametrize(
    "case",
    [(1, 64, 128, (14, 14)), (1, 67, 131, (14, 14)), (16, 192, 384, (4, 4)), (1, 48, 96, (40, 41))],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_threads_do_not_change_a_bit(case: tuple[Any, ...], layout: str) -> None:
    problem = Problem(*case, layout, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(problem.forward())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_an_infinite_gradient_stops_at_a_dead_relu() -> None:
    x, one = torch.ones(1, 1, 1, 1, requires_grad=True), torch.ones(1, 1)
    out = ops.residual_ffn(x, -one, torch.zeros(1), 2 * one, torch.zeros(1))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 3e38))
    assert grad.item() == torch.tensor(3e38).item()


@pytest.mark.parametrize("dw", [False, True])
@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_a_map_without_positions_on_the_reference(size: tuple[int, int], dw: bool) -> None:
    """The kernels return it, and PyTorch's convolutions, of which the reference is made, refuse it."""
    shapes = ((8, 4), (8,), (4, 8), (4,))
    depthwise = {"dw_weight": torch.randn(4, 3, 3), "dw_bias": torch.randn(4)} if dw else {}
    for backend in ("cpu", "reference"):
        tensors = [torch.randn(shape).requires_grad_() for shape in ((2, 4, *size), *shapes)]
        vectors = {name: tensor.clone().requires_grad_() for name, tensor in depthwise.items()}
        out = ops.residual_ffn(*tensors, **vectors, backend=backend)
        assert out.shape == (2, 4, *size)
        gradients = torch.autograd.grad(out.sum(), [*tensors, *vectors.values()])
        assert all(not gradient.any() for gradient in gradients)
