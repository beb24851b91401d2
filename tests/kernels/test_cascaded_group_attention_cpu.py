"""The compiled CPU kernels of cascaded group attention against the reference, on each instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout, drawn
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.bench.presets import MIXER_MODELS
from vitkernels.core import native as extension
from vitkernels.kernels.cascaded_group_attention import native, operator, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INPUTS = operator.tensors
NAMES = ("out", "heads", *(f"grad_{name}" for name in INPUTS))


def reversed_layout(tensor: torch.Tensor) -> Layout:
    """Nothing dense: the dimensions in reverse order, and every third element."""
    return Layout(tuple(reversed(range(tensor.ndim))), step=3)


@dataclass
class Problem:
    size: tuple[int, int]
    channels: int
    window: tuple[int, int]
    kernels: tuple[int, ...]
    layout: str | Layout = "nchw"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    key_dim: int = 16
    residual: bool = True
    weight_dtype: torch.dtype | None = None
    spread: float = 1.0
    grad_heads: bool = False
    out_layout: str | None = None  # of out and grad_x, where they lie otherwise than x
    dense_gradients: bool = True

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        h, k, d, largest = (
            len(self.kernels),
            self.key_dim,
            self.channels // len(self.kernels),
            max(self.kernels),
        )
        (wh, ww), (height, width) = self.window, self.size
        self.windows = self.batch * -(-height // wh) * -(-width // ww)
        self.tokens = wh * ww
        self.params = (wh, ww, list(self.kernels), k**-0.5, self.residual)
        self.guarded = Guarded(walls=True)
        dtype = self.weight_dtype or self.dtype

        def weight(*shape: int, spread: float) -> torch.Tensor:
            return self.guarded.random(shape, dtype).mul_(spread)

        self.inputs = {
            "x": self.map(),
            "qkv_weight": weight(h, 2 * k + d, d, spread=self.spread * d**-0.5),
            "qkv_bias": weight(h, 2 * k + d, spread=0.5),
            "dw_weight": weight(h, k, largest, largest, spread=1 / largest),
            "dw_bias": weight(h, k, spread=0.5),
            "attn_bias": weight(h, self.tokens, spread=1),
            "proj_weight": weight(self.channels, self.channels, spread=self.channels**-0.5),
            "proj_bias": weight(self.channels, spread=0.5),
        }
        self.grad_out = self.map()
        self.grad = (
            drawn(self.windows, self.tokens, self.channels, dtype=self.dtype) if self.grad_heads else None
        )

    def empty_map(
        self, layout: str | Layout | None = None, make: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        batch, channels, (height, width) = self.batch, self.channels, self.size
        layout, make = layout or self.layout, make or self.guarded
        if layout == "nhwc":
            return make((batch, height, width, channels), self.dtype, "offset").permute(0, 3, 1, 2)
        layout = {"nchw": "offset"}.get(layout, layout)
        return make((batch, channels, height, width), self.dtype, layout)

    def map(self) -> torch.Tensor:
        return self.empty_map(make=self.guarded.random)

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor]:
        wide = dtype is not self.dtype
        leaves = [(t.to(dtype) if wide else t.clone()).requires_grad_() for t in self.inputs.values()]
        out, heads = reference.forward(*leaves, *self.params)
        seeds = [
            self.grad_out.to(dtype),
            torch.zeros_like(heads) if self.grad is None else self.grad.to(dtype),
        ]
        return [out, heads, *torch.autograd.grad((out, heads), leaves, seeds)]

    def run(self, wanted: tuple[bool, ...] = (True,) * 8, grad_out: bool = True) -> list[torch.Tensor | None]:
        """out, heads and the gradients; nothing beside them was written."""
        tensors = list(self.inputs.values())
        out = self.empty_map(self.out_layout)
        heads = self.guarded((self.windows, self.tokens, self.channels), self.dtype)
        native.forward(out, heads, *tensors, *self.params)
        lie = (
            Layout(tuple(range(t.ndim))) if self.dense_gradients else reversed_layout(t) for t in tensors[1:]
        )
        grads = [
            self.empty_map(self.out_layout),
            *(
                self.guarded(tuple(t.shape), t.dtype, layout)
                for t, layout in zip(tensors[1:], lie, strict=True)
            ),
        ]
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        incoming = self.grad_out if grad_out else None
        native.backward(*grads, incoming, self.grad, out, heads, *tensors, *self.params)
        self.guarded.check()
        return [out, heads, *grads]

    def check(self, results: list[torch.Tensor | None] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if self.tokens == 1 and not true.any():  # one key takes all: nothing depends on its logit
                assert not got.any(), name
                continue
            assert_close_to_truth(
                name,
                got,
                base,
                true,
                factor=GRADIENT if name.startswith("grad") else FORWARD,
                reduced=1 if name in ("out", "heads", "grad_x") else self.windows * self.tokens,
                dtype=self.dtype,
            )


STAGES = sorted(
    {
        (stage.size, stage.channels, (stage.window, stage.window), stage.kernel_sizes)
        for name, stages in MIXER_MODELS.items()
        if "detection" not in name
        for stage in stages
    }
)


def name_of(case: tuple[Any, ...]) -> str:
    (height, width), channels, (wh, ww), kernels, *rest = case
    return "-".join(
        [f"{height}x{width}", str(channels), f"{wh}x{ww}", "".join(map(str, kernels)), *map(str, rest)]
    )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_the_stages_of_the_models(stage: tuple[Any, ...], layout: str) -> None:
    Problem(*stage, layout).check()


CASES: list[tuple[Any, ...]] = [
    ((14, 14), 64, (7, 7), (5, 5, 5, 5), "nchw"),
    ((13, 5), 48, (7, 7), (7, 5, 3), "nhwc"),
    ((15, 22), 64, (7, 7), (7, 5, 3, 3), "nchw"),
    ((8, 8), 32, (7, 7), (3, 5), "strided"),
    ((7, 9), 32, (7, 7), (7,), "odd"),
    ((1, 1), 32, (7, 7), (5, 3), "nchw"),
    ((4, 4), 96, (4, 4), (7, 5, 3, 3), "nhwc"),
    ((24, 13), 48, (12, 12), (5, 9, 1), "nchw"),
    ((6, 6), 40, (6, 6), (3, 3), "nhwc"),
    ((5, 6), 32, (1, 1), (3, 3), "nchw"),
    ((3, 5), 36, (2, 2), (5, 3, 1), "nchw"),
    ((4, 4), 36, (2, 2), (5, 3, 1), "nchw"),  # two rows of the last window are less than a vector
    ((9, 20), 33, (3, 8), (3, 5, 7), "nhwc"),
    ((5, 17), 22, (5, 17), (1, 3), "nchw"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_matches_reference(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    key_dim = 16 if case[1] % 16 == 0 else 5
    Problem(*case, dtype, key_dim=key_dim, residual=case[1] != 64, batch=3 if case[0][0] < 6 else 1).check()


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...]) -> None:
    for dtype in DTYPES:
        Problem(*case, dtype, key_dim=16 if case[1] % 16 == 0 else 5).run()


def test_detection_map_with_padding() -> None:
    Problem((84, 50), 128, (7, 7), (7, 5, 3, 3), "nchw", batch=1).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_with_half_maps(dtype: torch.dtype) -> None:
    Problem((7, 7), 64, (7, 7), (5, 3), "nchw", dtype, weight_dtype=torch.float32).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_and_gradients_that_are_not_dense(dtype: torch.dtype) -> None:
    """Each parameter alone, since one of them is enough for copies of all to be made."""
    problem = Problem((4, 8), 48, (4, 4), (5, 3, 3), "nchw", dtype)
    want = problem.run()
    problem.dense_gradients = False
    for name, given in list(problem.inputs.items())[1:]:
        spread = problem.guarded(tuple(given.shape), given.dtype, reversed_layout(given))
        problem.inputs[name] = spread.copy_(given)
        for result, got, expected in zip(NAMES, problem.run(), want, strict=True):
            assert torch.equal(got, expected), f"{result} with another {name}"
        problem.inputs[name] = given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "out_layout"), [("nchw", "nhwc"), ("nhwc", "nchw"), ("odd", "nchw")])
def test_out_that_lies_otherwise_than_the_map(layout: str, out_layout: str, dtype: torch.dtype) -> None:
    problem = Problem((5, 9), 48, (4, 4), (5, 3, 3), layout, dtype)
    want = problem.run()
    problem.out_layout = out_layout
    for got, expected in zip(problem.run(), want, strict=True):
        assert torch.equal(got, expected)


def test_a_map_that_is_a_part_of_a_wider_one() -> None:
    """Narrower than a window, whose width is that of the whole: its rows are not one after the other."""
    Problem((14, 5), 32, (7, 7), (3, 5), Layout(padding=2, before=65)).check()


def test_gradient_that_reaches_the_heads() -> None:
    Problem((9, 9), 48, (4, 4), (5, 3, 3), "nchw", grad_heads=True).check()


def test_wrong_results_are_rejected() -> None:
    """The comparison sees a transposed table, a shifted tap, a lost cascade and a head's channels swapped."""

    def problem() -> Problem:
        return Problem((9, 9), 48, (4, 4), (5, 3, 3), "nchw")

    right = problem()
    truth = right.run()
    table = right.inputs["attn_bias"].unflatten(1, (4, 4)).mT.flatten(1)
    changes = {
        "attn_bias": table,
        "dw_weight": right.inputs["dw_weight"].roll(1, -1),
        "x": right.inputs["x"].roll(1, 1),
        "proj_bias": right.inputs["proj_bias"] + 0.05,
    }
    for name, value in changes.items():
        wrong = problem()
        wrong.inputs[name] = value
        results = wrong.run()
        for i, result in enumerate(NAMES):
            if name == "proj_bias" and result != "out":
                continue  # nothing else depends on it
            mixed = [*truth]
            mixed[i] = results[i]
            if result in ("grad_proj_bias",):
                continue  # depends on grad_out alone
            with pytest.raises(AssertionError, match=f"{result}: max .* exceeds"):
                right.check(mixed)
    right.check(truth)


def test_dead_taps_are_ignored_and_have_no_gradient() -> None:
    problem = Problem((7, 7), 48, (7, 7), (5, 3, 1), "nchw")
    before = problem.run()
    gradient = dict(zip(NAMES, before, strict=True))["grad_dw_weight"]
    for head, dead in ((1, 1), (2, 2)):
        live = torch.zeros(5, 5, dtype=torch.bool)
        live[dead : 5 - dead, dead : 5 - dead] = True
        assert (gradient[head][:, ~live] == 0).all()
        assert gradient[head][:, live].all()
        problem.inputs["dw_weight"][head][:, ~live] = float("nan")
    for got, want in zip(problem.run(), before, strict=True):
        assert torch.equal(got, want)


def test_padded_tokens_are_real() -> None:
    """With padding the result is that of the map padded with zeros by hand, cropped; not that of masked tokens."""
    problem = Problem((9, 12), 32, (7, 7), (3, 5), "nchw")
    x, *weights = problem.inputs.values()
    options = {"window_size": 7, "kernel_sizes": (3, 5)}
    got = ops.cascaded_group_attention(x, *weights, **options)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 5))
    assert torch.equal(got, ops.cascaded_group_attention(padded, *weights, **options)[:, :, :9, :12])
    one = padded[:, :, 7:, 7:].contiguous()
    assert torch.equal(
        got[:, :, 7:, 7:], ops.cascaded_group_attention(one, *weights, **options)[:, :, :2, :5]
    )


def test_a_constant_bias_changes_nothing_and_the_cascade_does() -> None:
    problem = Problem((7, 7), 32, (7, 7), (3, 5), "nchw")
    x, *weights = problem.inputs.values()
    options = {"window_size": 7, "kernel_sizes": (3, 5)}
    weights[4] = torch.zeros_like(weights[4])
    want = ops.cascaded_group_attention(x, *weights, **options)
    weights[4] = weights[4] + 3.0
    torch.testing.assert_close(
        ops.cascaded_group_attention(x, *weights, **options), want, atol=1e-5, rtol=1e-5
    )
    # Without its value rows the first head adds only its bias to the second head's input.
    weights[0] = weights[0].clone()
    weights[0][0, 32:] = 0
    heads = reference.forward(x, *weights, 7, 7, [3, 5], 0.25, False)[1]
    out, got = torch.empty_like(x), torch.empty_like(heads)
    native.forward(out, got, x, *weights, 7, 7, [3, 5], 0.25, False)
    torch.testing.assert_close(got, heads, atol=1e-5, rtol=1e-5)
    assert (out - want).abs().max() > 0.1


def test_residual_adds_the_map() -> None:
    problem = Problem((9, 9), 32, (7, 7), (3, 5), "nhwc")
    tensors = problem.inputs.values()
    options = {"window_size": 7, "kernel_sizes": (3, 5)}
    without = ops.cascaded_group_attention(*tensors, **options)
    with_it = ops.cascaded_group_attention(*tensors, **options, residual=True)
    torch.testing.assert_close(with_it, without + problem.inputs["x"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout: torch.memory_format) -> None:
    x, *weights = Problem((14, 14), 32, (7, 7), (3, 5), "nchw").inputs.values()
    x = x.contiguous(memory_format=layout)
    out = ops.cascaded_group_attention(x, *weights, window_size=7, kernel_sizes=(3, 5))
    assert out.stride() == x.stride()


def test_sums_that_must_vanish() -> None:
    """A softmax is blind to a constant, so a head's bias gradients sum to zero."""
    problem = Problem((14, 14), 64, (7, 7), (5, 5, 5, 5), "nchw", torch.float64)
    gradient = dict(zip(NAMES, problem.run(), strict=True))["grad_attn_bias"]
    assert gradient.abs().max() > 0.1
    assert (gradient.sum(1).abs() < 1e-12 * gradient.abs().sum(1)).all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_reaches_exactly_its_window(layout: str) -> None:
    problem = Problem((14, 14), 64, (7, 7), (5, 5, 5, 5), layout)
    problem.inputs["x"][1, 40, 8, 3] = float("nan")
    out = problem.run()[0]
    hit = torch.zeros(2, 14, 14, dtype=torch.bool)
    hit[1, 7:, :7] = True
    assert torch.equal(out.isnan().all(1), hit)
    assert torch.equal(out.isnan().any(1), hit)


def test_absent_results_change_nothing() -> None:
    problem = Problem((9, 9), 48, (4, 4), (5, 3, 3), "nchw")
    full = problem.run()
    masks = [tuple(i == j for j in range(8)) for i in range(8)]
    for wanted in (*masks, tuple(i % 2 == 0 for i in range(8)), (False,) * 8):
        for got, want, asked in zip(problem.run(wanted)[2:], full[2:], wanted, strict=True):
            assert (got is not None) == asked
            assert got is None or torch.equal(got, want)
    out = torch.empty_like(problem.inputs["x"])
    native.forward(out, None, *problem.inputs.values(), *problem.params)
    assert torch.equal(out, full[0])


def test_absent_incoming_gradients_are_zeros() -> None:
    problem = Problem((9, 9), 48, (4, 4), (5, 3, 3), "nchw", grad_heads=True)
    only_heads = problem.run(grad_out=False)
    problem.grad_out.zero_()
    for got, want in zip(only_heads, problem.run(), strict=True):
        assert torch.equal(got, want)
    problem.grad = None
    assert all((t == 0).all() for t in problem.run(grad_out=False)[2:])


@pytest.mark.parametrize(
    ("case", "batch"),
    [
        (((14, 14), 64, (7, 7), (5, 5, 5, 5), "nchw"), 11),
        (((7, 7), 96, (7, 7), (7, 5, 3), "nchw"), 1),
        (((4, 4), 192, (4, 4), (5, 5, 5, 5), "nhwc"), 2),
        (((12, 12), 32, (12, 12), (5, 3), "nchw"), 1),
        (((5, 3), 32, (5, 3), (5, 3), "nchw"), 150),
    ],
)
def test_threads_do_not_change_a_bit(case: tuple[Any, ...], batch: int) -> None:
    problem = Problem(*case, batch=batch)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(problem.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


def test_peaked_softmax() -> None:
    """Logits of hundreds: most probabilities underflow, none may become NaN."""
    problem = Problem((7, 7), 64, (7, 7), (5, 3), "nchw", spread=12.0)
    for name, got in zip(NAMES, problem.run(), strict=True):
        assert torch.isfinite(got).all(), name
