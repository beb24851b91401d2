"""The compiled CPU kernels of proportional attention against the reference, on each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.attention_with_size import native, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")


@dataclass
class Problem:
    """One call: queries, keys and widths, how the tensors lie, and how large the sizes get."""

    queries: int
    keys: int
    d: int
    dv: int
    layout: str = "packed"
    largest: int = 8
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2

    def __post_init__(self) -> None:
        self.guarded = Guarded(walls=True)
        self.factor = self.d**-0.5 if self.scale is None else self.scale
        lead = (self.batch, self.heads)
        shapes = [
            (*lead, self.queries, self.d),
            (*lead, self.keys, self.d),
            (*lead, self.keys, self.dv),
            (*lead, self.queries, self.dv),
        ]
        q, k, v, self.grad_out = (self.guarded.random(shape, self.dtype, self.layout) for shape in shapes)
        self.wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        size = self.guarded((self.batch, self.keys), self.wide)
        size.copy_(torch.randint(1, self.largest + 1, size.shape))
        self.inputs: tuple[torch.Tensor, ...] = (q, k, v, size)
        self.grad_lse = self.guarded.random((*lead, self.queries), self.wide)

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in self.inputs[:3])
        size = self.inputs[3].double() if dtype is torch.float64 else self.inputs[3]
        out, lse = reference.forward(q, k, v, size, self.factor)
        seeds = (self.grad_out.to(out.dtype), self.grad_lse.to(lse.dtype))
        return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), seeds)]

    def run(
        self, wanted: tuple[bool, ...] = (True,) * 3, grad_out: bool = True, grad_lse: bool = True
    ) -> list[Any]:
        """out, lse and the gradients; nothing beside them was written, and inference gives the same out."""
        lead = (self.batch, self.heads, self.queries)
        out, alone = (self.guarded((*lead, self.dv), self.dtype, "packed") for _ in range(2))
        lse = self.guarded(lead, self.wide)
        native.forward(out, lse, *self.inputs, self.factor)
        native.forward(alone, None, *self.inputs, self.factor)
        assert torch.equal(out.nan_to_num(), alone.nan_to_num())
        grads = [
            self.guarded(tuple(t.shape), t.dtype, self.layout) if want else None
            for t, want in zip(self.inputs[:3], wanted, strict=True)
        ]
        native.backward(
            *grads,
            None,
            self.grad_out if grad_out else None,
            self.grad_lse if grad_lse else None,
            *(out, lse, *self.inputs),
            self.factor,
        )
        self.guarded.check()
        return [out, lse, *grads]

    def check(self, results: list[Any] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if self.keys == 1 and name in ("grad_q", "grad_k"):
                true_scale = self.expected(torch.float64)[2].abs().max()  # of grad_lse alone
                assert (got - true).abs().max() <= 64 * torch.finfo(self.dtype).eps * max(1.0, true_scale)
                continue
            factor = FORWARD if name in ("out", "lse") else GRADIENT
            assert_close_to_truth(name, got, base, true, factor=factor, dtype=self.dtype)


def named(case: tuple[Any, ...]) -> str:
    return "-".join(str(part) for part in case)


# queries, keys, d, dv, layout, largest size: each kind of width, number of keys and layout in turn
CASES: list[tuple[Any, ...]] = [
    (197, 197, 64, 64, "packed", 8),
    (132, 132, 64, 64, "tokens_first", 66),
    (67, 67, 32, 32, "dense", 131),
    (1, 1, 16, 16, "packed", 5),
    (50, 64, 8, 24, "offset", 1),
    (33, 65, 80, 80, "packed", 40),
    (9, 2, 5, 3, "strided", 100),
    (64, 7, 1, 1, "odd", 9),
    (70, 130, 20, 33, "nchw_offset", 12),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_matches_reference(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    Problem(*case, dtype=dtype).check()


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...]) -> None:
    for dtype in DTYPES:
        Problem(*case, dtype=dtype).run()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 2, 7, 63, 64, 65, 128, 129, 577])
@pytest.mark.parametrize("width", [(1, 1), (7, 9), (16, 48), (64, 64), (80, 80), (128, 72)], ids=str)
def test_widths_and_keys(width: tuple[int, int], keys: int, dtype: torch.dtype) -> None:
    for queries, heads in ((1, 96), (31, 3), (97, 3)):
        Problem(queries, keys, *width, dtype=dtype, batch=1, heads=heads).check()


@pytest.mark.parametrize(("heads", "tokens", "d"), [(16, 577, 64), (16, 1370, 80)], ids=str)
def test_large_models(heads: int, tokens: int, d: int) -> None:
    """ViT-L at 384 and ViT-H at 518, with two heads for all."""
    Problem(tokens, tokens, d, d, largest=tokens // 25, batch=1, heads=2).check()


@pytest.mark.parametrize(("queries", "keys", "d", "heads"), [(97, 64, 1, 3), (1, 577, 64, 96)], ids=str)
def test_largest_errors_of_many_draws(queries: int, keys: int, d: int, heads: int) -> None:
    """One chain for all weights of 64 keys, or for a logit of 64 terms, missed the rule in one draw of 20 or five."""
    for seed in range(16):
        torch.manual_seed(seed)
        Problem(queries, keys, d, d, batch=1, heads=heads).check()


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_wide_logits(scale: float) -> None:
    """The largest logit moves from tile to tile of keys, and weights fall below the smallest number."""
    problem = Problem(70, 200, 16, 24, scale=scale, largest=197)
    problem.inputs[1].mul_(torch.linspace(0.1, 2, 200)[:, None])
    problem.check()


def test_wrong_results_are_rejected() -> None:
    """The comparison sees a scale off by 1 %, a size ignored, a wrong key, and two rows of values exchanged."""
    right = Problem(70, 130, 16, 24)
    q, k, v, size = right.inputs
    one_key, one_size, exchanged = k.clone(), size.clone(), v.clone()
    one_key[:, :, -1] += 1
    one_size[:, 5] = size[:, 5] % 8 + 1
    exchanged[:, :, [1, 2]] = v[:, :, [2, 1]]
    good = right.run()
    right.check(good)
    changed = ((q * 1.01, k, v, size), (q, one_key, v, size), (q, k, exchanged, size), (q, k, v, one_size))
    for inputs in changed:
        wrong = Problem(70, 130, 16, 24)
        wrong.inputs, wrong.grad_out, wrong.grad_lse = inputs, right.grad_out, right.grad_lse
        for i, (name, result) in enumerate(zip(NAMES, wrong.run(), strict=True)):
            if name in ("lse", "grad_v") and inputs[2] is exchanged:
                continue  # neither depends on the values
            mixed = list(good)
            mixed[i] = result
            with pytest.raises(AssertionError, match=f"{name}: max .* exceeds"):
                right.check(mixed)


each_length = pytest.mark.parametrize("keys", [49, 150])


@each_length
def test_absent_results_change_nothing(keys: int) -> None:
    problem = Problem(90, keys, 16, 24)
    full = problem.run()
    for i in range(3):
        wanted = tuple(j == i for j in range(3))
        for got, want in zip(problem.run(wanted)[2:], full[2:], strict=True):
            assert got is None or torch.equal(got, want)
    assert problem.run((False,) * 3)[2:] == [None] * 3


@each_length
def test_absent_incoming_gradients_are_zeros(keys: int) -> None:
    problem = Problem(90, keys, 16, 24)
    only_out, only_lse = problem.run(grad_lse=False), problem.run(grad_out=False)
    neither = problem.run(grad_out=False, grad_lse=False)
    grad_lse = problem.grad_lse.clone()
    for seed, want in ((problem.grad_lse, only_out), (problem.grad_out, only_lse)):
        seed.zero_()
        for got, other in zip(problem.run(), want, strict=True):
            torch.testing.assert_close(got, other, atol=1e-6, rtol=1e-5)
        problem.grad_lse.copy_(grad_lse)
    assert all((t == 0).all() for t in neither[2:])
    assert any((t != 0).any() for t in only_lse[2:4])


@pytest.mark.parametrize(("tokens", "batch"), [(300, 1), (49, 16)], ids=str)
def test_threads_do_not_change_a_bit(tokens: int, batch: int) -> None:
    problem = Problem(tokens, tokens, 16, 16, batch=batch, heads=3)
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


@each_length
def test_hidden_keys(keys: int) -> None:
    """A size of 0 hides its key, also where a whole tile of them comes first; a query that sees no key is NaN."""
    problem = Problem(40, keys, 16, 24, batch=3)
    size = problem.inputs[3]
    size[0, : keys - 9] = 0
    size[1, 3::2] = 0
    truth, base = problem.expected(torch.float64), problem.expected(torch.float32)
    results = problem.run()
    for name, got, baseline, true in zip(NAMES, results, base, truth, strict=True):
        factor = FORWARD if name in ("out", "lse") else GRADIENT
        assert_close_to_truth(name, got, baseline, true, factor=factor, dtype=torch.float32)
    assert (results[3][0, :, : keys - 9] == 0).all()
    assert (results[4][1, :, 3::2] == 0).all()
    size[2] = 0
    blind = problem.run()
    assert blind[0][2].isnan().all()
    assert (blind[1][2] == -torch.inf).all()
    assert torch.equal(blind[0][:2], results[0][:2])


def test_sizes_of_any_magnitude_and_what_is_no_size() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    size = torch.tensor([[1e-40, 1e-38, 1e-20, 1.0, 3.5, 1e10, 1e30, 0.0, 2.0]])
    want = ops.attention_with_size(q, k, v, size, backend="reference")
    torch.testing.assert_close(ops.attention_with_size(q, k, v, size, backend="cpu"), want)
    for bad in (-1.0, float("nan"), float("inf")):
        size[0, 4] = bad
        assert ops.attention_with_size(q, k, v, size, backend="cpu").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_only_the_proportions_of_sizes_matter(dtype: torch.dtype) -> None:
    """Also of those on both sides of the smallest normal number."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=dtype)
    size = torch.arange(1, 10, dtype=dtype)[None]
    want = ops.attention_with_size(q, k, v, size, backend="cpu")
    got = ops.attention_with_size(q, k, v, size * (torch.finfo(dtype).tiny / 4), backend="cpu")
    allowed = 1024 * torch.finfo(dtype).eps  # of logarithms as large as the exponents
    torch.testing.assert_close(got, want, atol=allowed, rtol=allowed)


def test_what_lse_lost_is_in_no_weight() -> None:
    """Large sizes make lse large: all weights of a query would share its rounding, many times their own."""
    problem = Problem(1, 70, 16, 1, batch=8, heads=3)
    problem.inputs[3].mul_(2.0**60)
    problem.inputs[2].fill_(1)
    problem.grad_out.fill_(1)
    grad_q, grad_k, grad_v = problem.run(grad_lse=False)[2:]
    assert not grad_q.any(), "one is the mean of ones"
    assert not grad_k.any()
    assert (grad_v.double().sum(2) - 1).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_one_key_takes_all_and_leaves_grad_lse_alone() -> None:
    """What it gains from the values and what it loses to their mean are the same number."""
    problem = Problem(40, 1, 16, 16, largest=100)
    both, alone = problem.run(), problem.run(grad_out=False)
    assert torch.equal(both[2], alone[2])
    assert torch.equal(both[3], alone[3])


def test_nan_stays_where_it_is() -> None:
    problem = Problem(40, 70, 16, 16)
    problem.inputs[0][0, 0, 5] = float("nan")
    problem.inputs[2][1, 1, 7, 3] = float("nan")
    out, lse = problem.run()[:2]
    assert out[0, 0, 5].isnan().all()
    assert out[1, 1, :, 3].isnan().all()
    assert int(out.isnan().sum()) == 16 + 40
    assert int(lse.isnan().sum()) == 1


def test_strided_sizes() -> None:
    problem = Problem(20, 70, 8, 8)
    want = problem.run()
    size = problem.guarded((2, 70), torch.float32, Layout((1, 0), padding=3, step=2)).copy_(problem.inputs[3])
    problem.inputs = (*problem.inputs[:3], size)
    for got, expected in zip(problem.run(), want, strict=True):
        assert torch.equal(got, expected)


def test_a_packed_projection_is_read_in_place() -> None:
    packed = torch.randn(2, 67, 3, 3, 16, requires_grad=True)
    size = torch.randint(1, 9, (2, 67)).float()
    results = []
    for backend in ("cpu", "reference"):
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        out = ops.attention_with_size(q, k, v, size, backend=backend)
        tokens = out.transpose(1, 2).flatten(2)
        assert tokens.data_ptr() == out.data_ptr(), backend
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), packed)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
