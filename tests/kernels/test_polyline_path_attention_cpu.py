"""The compiled CPU kernels of polyline path attention against the reference, on each instruction set."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_cancelled, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.polyline_path_attention import native, reference, saved_products

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_log_decay_w", "grad_log_decay_h")
# How [batch, y, x, heads, channels] lies in memory.
LAYOUTS = {
    "offset": Layout((0, 1, 2, 3, 4), before=65),
    "packed": Layout((0, 1, 2, 3, 4), padding=24),
    "heads_first": Layout((0, 3, 1, 2, 4), before=65),
    "columns_first": Layout((3, 2, 0, 1, 4), padding=3, before=37),
    "channels_first": Layout((0, 3, 4, 1, 2), before=65),
    "strided": Layout((0, 1, 2, 3, 4), step=2),
}


@dataclass
class Problem:
    sizes: tuple[int, int]
    d: int
    dv: int
    mode: str = "whole"
    dtype: torch.dtype = torch.float32
    layout: str = "offset"
    batch: int = 2
    heads: int = 2
    decay_dtype: torch.dtype | None = None
    spread: float = 1.0
    decay: float = 0.3

    def __post_init__(self) -> None:
        self.params = (self.mode == "criss_cross", self.d**-0.5)
        self.lead = (self.batch, *self.sizes, self.heads)
        self.view = LAYOUTS[self.layout]
        self.guarded = Guarded(walls=True)
        q, k, v, g = (
            self.guarded.random((*self.lead, c), self.dtype, self.view).mul_(s)
            for c, s in ((self.d, self.spread), (self.d, self.spread), (self.dv, 1), (self.dv, 1))
        )
        decay_dtype = self.decay_dtype or self.dtype
        decays = [
            self.guarded.random(self.lead, decay_dtype).abs_().mul_(-self.decay).clamp_(max=0) for _ in "wh"
        ]
        self.inputs: tuple[torch.Tensor, ...] = (q, k, v, *decays)
        self.grad_out = g

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [
            t.detach().to(t.dtype if dtype is self.dtype else dtype).requires_grad_() for t in self.inputs
        ]
        (out,) = reference.forward(*leaves, *self.params)
        return [out, *torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype))]

    def run(self, wanted: tuple[bool, ...] = (True,) * 5) -> list[Any]:
        """out and the gradients; nothing beside them was written, and inference gives the same out."""
        accumulate = torch.float64 if self.dtype is torch.float64 else torch.float32
        batch, height, width, heads = self.lead
        v = self.inputs[2]
        out, alone = (self.guarded(tuple(v.shape), self.dtype, "dense") for _ in range(2))
        lse, cum = (self.guarded((2, batch, heads, height, width), accumulate, "dense") for _ in range(2))
        count = saved_products(v, self.params[0])
        partial = self.guarded((count, batch, height, width, heads * self.dv), self.dtype, "dense")
        native.forward(out, lse, cum, partial, *self.inputs, *self.params)
        native.forward(alone, None, None, None, *self.inputs, *self.params)
        assert torch.isfinite(lse).all()
        assert torch.isfinite(cum).all()
        assert torch.isfinite(partial).all()
        assert torch.equal(alone, out)
        grads = [
            self.guarded(tuple(t.shape), t.dtype, self.view if t.ndim == 5 else "dense") if want else None
            for t, want in zip(self.inputs, wanted, strict=True)
        ]
        native.backward(
            *grads, self.grad_out, None, None, None, out, lse, cum, partial, *self.inputs, *self.params
        )
        self.guarded.check()
        return [out, *grads]

    def check(self, results: list[Any] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if not true.any():  # a decay that belongs to no step, or a softmax of one key
                assert_cancelled(name, got)
                continue
            # A decay's gradient sums those of the scores that its step lies between, which nearly cancel.
            reduced = self.sizes[0] * self.sizes[1] if "decay" in name else 1
            assert_close_to_truth(
                name,
                got,
                base,
                true,
                factor=FORWARD if name == "out" else GRADIENT,
                reduced=reduced,
                dtype=self.dtype,
            )


def named(case: tuple[Any, ...]) -> str:
    return "-".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in case)


GRIDS: list[tuple[tuple[int, int], int, int, str]] = [
    ((1, 1), 16, 16, "offset"),
    ((1, 9), 8, 12, "packed"),
    ((19, 1), 5, 3, "offset"),
    ((3, 4), 24, 7, "strided"),
    ((7, 7), 32, 32, "packed"),
    ((7, 9), 40, 33, "columns_first"),
    ((14, 14), 32, 32, "packed"),
    ((9, 18), 16, 24, "heads_first"),
    ((9, 33), 12, 20, "channels_first"),
]
LARGE: list[tuple[tuple[int, int], int, int, str]] = [
    ((25, 42), 32, 32, "packed"),
    ((70, 11), 16, 8, "offset"),
    ((4, 131), 8, 16, "offset"),
]


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRIDS, ids=named)
def test_matches_reference(case: tuple[Any, ...], dtype: torch.dtype, mode: str) -> None:
    sizes, d, dv, layout = case
    Problem(sizes, d, dv, mode, dtype, layout).check()


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("case", GRIDS, ids=named)
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...], mode: str) -> None:
    sizes, d, dv, layout = case
    for dtype in DTYPES:
        Problem(sizes, d, dv, mode, dtype, layout).run()


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("case", LARGE, ids=named)
def test_larger_than_tiles_and_chunks(case: tuple[Any, ...], mode: str) -> None:
    sizes, d, dv, layout = case
    Problem(sizes, d, dv, mode, torch.float32, layout, batch=1).check()


@pytest.mark.parametrize("sizes", [(10, 10), (9, 18)], ids=str)
@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
def test_gradients_of_large_logits(mode: str, sizes: tuple[int, int]) -> None:
    """What lse lost to rounding shall not stand in the sums of P dP, which would not cancel dP then."""
    problem = Problem(sizes, 16, 16, mode, spread=8.0)
    results = problem.run()
    results[0] = problem.expected(torch.float32)[0]  # its largest error is a lottery at such logits
    problem.check(results)


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("case", [*GRIDS, *LARGE], ids=named)
def test_all_decays(case: tuple[Any, ...], decay: float, dtype: torch.dtype, mode: str) -> None:
    sizes, d, dv, layout = case
    Problem(sizes, d, dv, mode, dtype, layout, decay=decay).check()


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_decays_with_half_tensors(dtype: torch.dtype, mode: str) -> None:
    Problem((6, 11), 16, 32, mode, dtype, decay_dtype=torch.float32).check()


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
def test_wrong_results_are_rejected(mode: str) -> None:
    """The comparison sees exchanged decays, a mirrored one, a scale off by 1 % and a lost key."""
    right = Problem((7, 11), 16, 16, mode)
    q, k, v, along, down = right.inputs
    lost = k.clone()
    lost[:, -1] = 0
    good = right.run()
    for inputs in (
        (q, k, v, down, along),
        (q, k, v, along.flip(2), down.flip(1)),
        (q * 1.01, k, v, along, down),
        (q, lost, v, along, down),
    ):
        wrong = Problem((7, 11), 16, 16, mode)
        wrong.inputs, wrong.grad_out = inputs, right.grad_out
        for i, (name, result) in enumerate(zip(NAMES, wrong.run(), strict=True)):
            mixed = list(good)
            mixed[i] = result
            with pytest.raises(AssertionError, match=f"{name}: max .* exceeds"):
                right.check(mixed)
    right.check(good)


@pytest.mark.parametrize("sizes", [(1, 256), (16, 16), (257, 1), (17, 16)], ids=str)
def test_largest_small_map_and_smallest_large_one(sizes: tuple[int, int]) -> None:
    """Up to 256 tokens nothing is saved for the backward pass of a whole map, and another kernel computes it."""
    Problem(sizes, 8, 8, batch=1).check()


@pytest.mark.parametrize(
    ("mode", "sizes"), [("whole", (6, 13)), ("whole", (21, 13)), ("criss_cross", (6, 13))]
)
def test_scores_far_apart(mode: str, sizes: tuple[int, int]) -> None:
    """Scores of hundreds under strong decays: a mask may lift the least of the scores above the largest by more than
    a float's range, where factors of a common maximum would underflow."""
    problem = Problem(sizes, 16, 32, mode, spread=9.0, decay=40.0)
    want = problem.expected(torch.float64)
    for got, true in zip(problem.run(), want, strict=True):
        assert torch.isfinite(got).all()
        assert (got - true).abs().max() <= 4e-4 * true.abs().max() + 1e-4


@pytest.mark.parametrize("row", [0, 1])
def test_weights_that_a_common_maximum_would_lose(row: int) -> None:
    """For the first token the last one's score is the largest by 90, but one way to it decays by 86: e^-90 is no
    normal float, e^-4 is a weight."""
    problem = Problem((2, 2), 1, 8)
    q, k, _, along, down = problem.inputs
    q.zero_()[:, 0, 0] = 1
    k.copy_(torch.tensor([-90.0, -200, -200, 0]).view(1, 2, 2, 1, 1))
    along.zero_()[:, row, 1] = -86
    down.zero_()
    want = problem.expected(torch.float64)
    for got, true in zip(problem.run(), want, strict=True):
        assert (got - true).abs().max() <= 1e-3 * true.abs().max() + 1e-6


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
def test_absent_results_change_nothing(mode: str) -> None:
    """Up to rounding: without the decays' sums the compiler fuses other products and sums."""
    problem = Problem((7, 12), 16, 24, mode)
    full = problem.run()
    for i in range(5):
        wanted = tuple(j == i for j in range(5))
        for got, want in zip(problem.run(wanted)[1:], full[1:], strict=True):
            if got is not None:
                torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "sizes"), [("whole", (14, 14)), ("whole", (5, 70)), ("criss_cross", (28, 9))]
)
def test_threads_do_not_change_a_bit(mode: str, sizes: tuple[int, int]) -> None:
    same_bits_by_threads(Problem(sizes, 16, 16, mode, batch=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_apart_and_lines_of_all_heads_give_the_same_bits(dtype: torch.dtype) -> None:
    """One head occupies one thread, which takes it through the sweeps alone; more threads share its lines."""
    same_bits_by_threads(Problem((31, 40), 20, 24, "criss_cross", dtype, batch=1, heads=1))


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 13), (3, 64), (3, 65)], ids=str)
def test_results_written_in_place_and_by_way_of_scratch(sizes: tuple[int, int], mode: str) -> None:
    """Products write the tensors themselves where all terms of a sum, 64 at most, come in one go."""
    Problem(sizes, 16, 32, mode, layout="packed").check()


@pytest.mark.parametrize("sizes", [(14, 14), (11, 22)], ids=str)
def test_bands_of_a_small_map_give_the_same_bits(sizes: tuple[int, int]) -> None:
    """Two heads are shared out by tiles of their queries, sixteen are not."""
    together, alone = (Problem(sizes, 16, 24, batch=batch) for batch in (8, 1))
    results = together.run()
    for i in (0, 7):
        alone.inputs = tuple(tensor[i : i + 1] for tensor in together.inputs)
        alone.grad_out = together.grad_out[i : i + 1]
        for got, want in zip(results, alone.run(), strict=True):
            assert torch.equal(got[i : i + 1], want)


def test_long_rows_whose_probabilities_are_computed_twice() -> None:
    """Those of 16 rows of three tiles of queries take more than a head keeps."""
    Problem((16, 131), 8, 8, "criss_cross", batch=1, heads=1).check()


def test_more_criss_cross_maps_than_are_worked_on_together() -> None:
    """A head of over 4 MB goes by lines, with as many maps at a time as 24 MB hold: of three, two and then one."""
    together, alone = (Problem((25, 42), 8, 256, "criss_cross", batch=batch) for batch in (3, 1))
    results = together.run()
    for i in range(3):
        alone.inputs = tuple(tensor[i : i + 1] for tensor in together.inputs)
        alone.grad_out = together.grad_out[i : i + 1]
        for got, want in zip(results, alone.run(), strict=True):
            assert torch.equal(got[i : i + 1], want)


def same_bits_by_threads(problem: Problem) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(problem.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
def test_expanded_decays_and_a_packed_projection(mode: str) -> None:
    """Views as models hand them over: one projection's output, one decay for the whole map."""
    qkv = torch.randn(2, 6, 7, 3, 2, 16, requires_grad=True)
    decay = torch.full((2,), -0.2, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        decays = decay.expand(2, 6, 7, 2)
        out = ops.polyline_path_attention(*qkv.unbind(3), decays, decays, mode=mode, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (qkv, decay))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


MEMORY = """
import pathlib, sys, torch
from vitkernels import ops
torch.set_num_threads(2)
def memory(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))
warm = [torch.randn(1, 5, 6, 8, 32, requires_grad=True) for _ in "qkv"]
decays = [-torch.rand(1, 5, 6, 8) for _ in "wh"]
ops.polyline_path_attention(*warm, *decays, backend=sys.argv[1]).sum().backward()
tensors = [torch.randn(1, 50, 84, 8, 32, requires_grad=True) for _ in "qkv"]
tensors += [(-0.1 * torch.rand(1, 50, 84, 8)).requires_grad_() for _ in "wh"]
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
ops.polyline_path_attention(*tensors, backend=sys.argv[1]).sum().backward()
print(memory("VmHWM") - before)
"""


def peak_memory(backend: str) -> int:
    """What forward and backward of 50x84 tokens and 8 heads need beyond their inputs."""
    done = subprocess.run([sys.executable, "-c", MEMORY, backend], capture_output=True, text=True, check=True)
    return int(done.stdout)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


@on_linux
def test_peak_memory_is_linear_in_tokens() -> None:
    """One N x N matrix of all heads would take 564 MB."""
    used = peak_memory("cpu")
    tensor = 50 * 84 * 8 * 32 * 4
    assert 0 < used < 16 * tensor, f"{used / 1e6:.1f} MB, {used / tensor:.1f} times q"


@on_linux
@pytest.mark.thorough
def test_peak_memory_is_a_twentieth_of_the_eager_form() -> None:
    ours, eager = peak_memory("cpu"), peak_memory("reference")
    print(f"{ours / 1e6:.1f} MB against {eager / 1e6:.1f} MB")
    assert 20 * ours < eager
