"""The compiled CPU kernels of neighborhood attention against the reference, on each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.neighborhood_attention import count_pairs, native, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_rpb")
# How [batch, y, x, heads, channels] lies in memory; a sequence has no y.
LAYOUTS = {
    "offset": Layout((0, 1, 2, 3, 4), before=65),
    "packed": Layout((0, 1, 2, 3, 4), padding=24),
    "heads_first": Layout((0, 3, 1, 2, 4), before=65),
    "columns_first": Layout((3, 2, 0, 1, 4), padding=3, before=37),
    "channels_first": Layout((0, 3, 4, 1, 2), before=65),
    "strided": Layout((0, 1, 2, 3, 4), step=2),
}


def layout_of(name: str, rank: int) -> Layout:
    layout = LAYOUTS[name]
    if rank == 2:
        return layout
    return layout._replace(order=tuple(i - (i > 1) for i in layout.order if i != 1))


@dataclass
class Problem:
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    d: int
    dv: int
    layout: str = "offset"
    rpb: bool = True
    causal: tuple[bool, ...] | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    rpb_dtype: torch.dtype | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        rank = len(self.sizes)
        causal = self.causal or (False,) * rank
        self.params = (self.kernel, (1,) * rank, self.dilation, causal, self.d**-0.5)
        self.lse_dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        self.lead = (self.batch, *self.sizes, self.heads)
        self.lse_layout = self.rpb_layout = "dense"
        self.view = layout_of(self.layout, rank)
        self.guarded = Guarded(walls=True)
        q, k, v, g = (
            self.guarded.random((*self.lead, c), self.dtype, self.view).mul_(s)
            for c, s in ((self.d, self.spread), (self.d, self.spread), (self.dv, 1), (self.dv, 1))
        )
        entries = [2 * k - 1 for k in self.kernel]
        rpb = self.guarded.random((self.heads, *entries), self.rpb_dtype or self.dtype) if self.rpb else None
        self.inputs: tuple[Any, ...] = (q, k, v, rpb)
        self.grad_out = g
        self.grad_lse = self.guarded.random(self.lead, self.lse_dtype)
        pairs = self.batch * count_pairs(self.sizes, self.kernel, self.dilation, causal)
        self.terms = max(1, pairs // torch.Size(entries).numel())

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = [
            None if t is None else t.detach().to(t.dtype if dtype is self.dtype else dtype).requires_grad_()
            for t in self.inputs
        ]
        out, lse = reference.forward(*leaves, *self.params)
        wanted = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(
            (out, lse), wanted, (self.grad_out.to(out.dtype), self.grad_lse.to(lse.dtype))
        )
        return [out, lse, *grads, *([None] if leaves[3] is None else [])]

    def run(
        self, wanted: tuple[bool, ...] = (True,) * 4, grad_out: bool = True, grad_lse: bool = True
    ) -> list[Any]:
        """out, lse and the gradients; nothing beside them was written."""
        q, k, v, rpb = self.inputs
        out = self.guarded(tuple(v.shape), self.dtype, layout_of("offset", len(self.sizes)))
        lse = self.guarded(self.lead, self.lse_dtype, self.lse_layout)
        native.forward(out, lse, q, k, v, rpb, *self.params)
        grads = [
            self.guarded(tuple(t.shape), t.dtype, self.view if t is not rpb else self.rpb_layout)
            if t is not None and want
            else None
            for t, want in zip(self.inputs, wanted, strict=True)
        ]
        native.backward(
            *grads,
            self.grad_out if grad_out else None,
            self.grad_lse if grad_lse else None,
            *(out, lse, q, k, v, rpb),
            *self.params,
        )
        self.guarded.check()
        return [out, lse, *grads]

    def check(self, results: list[Any] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if got is None:
                assert true is None
                continue
            assert_close_to_truth(
                name,
                got,
                base,
                true,
                factor=FORWARD if name in ("out", "lse") else GRADIENT,
                reduced=self.terms if name == "grad_rpb" else 1,
                dtype=self.dtype,
            )


def named(case: tuple[Any, ...]) -> str:
    return "-".join(
        "x".join(map(str, part)) if isinstance(part, tuple) else str(part)
        for part in case
        if part is not None
    )


# map, kernel, dilation, d, dv, layout, rpb, causal
CASES: list[tuple[Any, ...]] = [
    ((14, 14), (7, 7), (1, 1), 32, 32, "packed", True),
    ((19, 23), (7, 7), (1, 1), 16, 24, "offset", True),
    ((17, 22), (3, 5), (3, 2), 40, 8, "heads_first", True),
    ((9, 31), (5, 3), (1, 1), 5, 7, "columns_first", True),
    ((16, 18), (4, 6), (2, 1), 12, 20, "channels_first", True),
    ((11, 13), (2, 2), (2, 3), 8, 100, "strided", False),
    ((10, 12), (3, 4), (2, 1), 16, 16, "packed", False, (True, False)),
    ((10, 12), (3, 4), (1, 2), 16, 9, "offset", False, (False, True)),
    ((9, 17), (5, 3), (1, 3), 8, 16, "offset", False, (True, True)),
    # kernel == size along one axis or both, and groups that are one neighborhood
    ((7, 20), (7, 3), (1, 1), 16, 16, "offset", True),
    ((20, 5), (3, 5), (1, 1), 16, 16, "packed", True),
    ((14, 14), (7, 7), (2, 2), 32, 32, "packed", True),
    ((7, 7), (7, 7), (1, 1), 32, 48, "offset", True),
    ((8, 16), (8, 8), (1, 2), 33, 3, "columns_first", True),
    ((6, 20), (3, 4), (2, 5), 12, 20, "channels_first", False),
    ((11, 11), (11, 11), (1, 1), 16, 16, "offset", True),
    # maps and windows of width 1
    ((1, 9), (1, 3), (1, 2), 16, 16, "offset", True),
    ((12, 1), (5, 1), (2, 1), 16, 16, "offset", True),
    ((1, 1), (1, 1), (1, 1), 16, 16, "offset", False),
    # sequences
    ((50,), (7,), (3,), 16, 24, "packed", True),
    ((97,), (64,), (1,), 32, 32, "heads_first", True),
    ((33,), (8,), (4,), 8, 8, "channels_first", False, (True,)),
    ((12,), (4,), (3,), 16, 16, "offset", True),
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


@pytest.mark.parametrize("d", [8, 24, 40, 72, 80, 96, 160, 256])
def test_head_dims(d: int) -> None:
    Problem((9, 12), (3, 3), (1, 2), d, d, dtype=torch.float32).check()
    Problem((6, 6), (3, 3), (2, 2), d, d, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("sizes", [(6, 6), (8, 8)], ids=str)
def test_chunks_of_several_groups(sizes: tuple[int, int]) -> None:
    """132 groups in chunks of three, in which the bias gradient adds up."""
    Problem(sizes, (3, 3), (2, 2), 4, 4, batch=33).check()


@pytest.mark.parametrize("dilation", [1, 8], ids=lambda d: f"d{d}")
def test_published_shape(dilation: int) -> None:
    """DiNAT's first stage; 3136 tokens sum up into one element of the bias gradient."""
    Problem((56, 56), (7, 7), (dilation,) * 2, 32, 32, "packed", batch=1).check()


def test_wrong_results_are_rejected() -> None:
    """The comparison sees a mirrored bias, a scale off by 1 % and a lost key, in every result."""
    case: tuple[Any, ...] = ((9, 11), (3, 5), (2, 1), 16, 16)
    right = Problem(*case)
    q, k, v, rpb = right.inputs
    lost = k.clone()
    lost[:, -1] = 0
    for inputs in ((q, k, v, rpb.flip(2)), (q * 1.01, k, v, rpb), (q, lost, v, rpb)):
        wrong = Problem(*case)
        wrong.inputs, wrong.grad_out, wrong.grad_lse = inputs, right.grad_out, right.grad_lse
        results = wrong.run()
        for i, name in enumerate(NAMES):
            mixed = [*right.run()]
            mixed[i] = results[i]
            with pytest.raises(AssertionError, match=f"{name}: max .* exceeds"):
                right.check(mixed)
    right.check()


@pytest.mark.parametrize("sizes", [(12, 19), (6, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_lies_as_another(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """With the bias, lse and their gradients spread out as well."""
    problem = Problem(sizes, (3, 4), (2, 2), 16, 27, dtype=dtype)
    want = problem.run()
    q, k, v, rpb = problem.inputs
    problem.lse_layout, problem.rpb_layout = Layout((3, 2, 0, 1), step=2), Layout((2, 0, 1), step=3)
    spread = zip((q, k, v), ("columns_first", "channels_first", "heads_first"), strict=True)
    problem.inputs = (
        *(problem.guarded(tuple(t.shape), dtype, LAYOUTS[name]).copy_(t) for t, name in spread),
        problem.guarded(tuple(rpb.shape), dtype, problem.rpb_layout).copy_(rpb),
    )
    problem.view = LAYOUTS["strided"]
    problem.grad_out = problem.guarded(tuple(v.shape), dtype, LAYOUTS["packed"]).copy_(problem.grad_out)
    problem.grad_lse = problem.grad_lse.transpose(0, 2).contiguous().transpose(0, 2)
    for got, expected in zip(problem.run(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_with_half_tensors(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    Problem(sizes, (3, 3), (2, 2), 16, 32, dtype=dtype, rpb_dtype=torch.float32).check()


@pytest.mark.parametrize(("sizes", "kernel"), [((14, 14), (7, 7)), ((12, 13), (4, 5))], ids=str)
def test_gradients_of_large_logits(sizes: tuple[int, int], kernel: tuple[int, int]) -> None:
    """Groups that are seen whole, and such that are not. What lse lost to rounding shall not stand in sum_m p dp, which
    would not cancel dp then."""
    problem = Problem(sizes, kernel, (2, 2), 16, 64, rpb=False, spread=8.0)
    results = problem.run()
    results[0] = problem.expected(torch.float32)[0]  # its largest error is a lottery at such logits
    problem.check(results)


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
def test_peaked_softmax(sizes: tuple[int, int]) -> None:
    """Logits of hundreds: most probabilities underflow, none may become NaN.

    Logits are rounded by as much as they are large, which bounds what a probability may err.
    """
    problem = Problem(sizes, (3, 3), (2, 2), 16, 32, spread=12.0)
    want = problem.expected(torch.float64)
    bound = torch.finfo(torch.float32).eps * want[1].abs().max()
    assert want[1].abs().max() > 300
    for got, true in zip(problem.run(), want, strict=True):
        assert (got - true).abs().max() <= 4 * bound * true.abs().max()


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
def test_minus_infinity_in_the_bias_masks(sizes: tuple[int, int]) -> None:
    problem = Problem(sizes, (3, 3), (2, 2), 16, 32)
    problem.inputs[3][:, 3:] = float("-inf")
    want = problem.expected(torch.float64)
    for got, true in zip(problem.run(), want, strict=True):
        assert torch.isfinite(got).all()
        assert (got - true).abs().max() < 1e-4


@pytest.mark.parametrize("sizes", [(3, 5), (1, 1)], ids=str)
def test_one_key_that_takes_all_leaves_the_gradient_of_lse(sizes: tuple[int, int]) -> None:
    """However large the gradient of out is: no logit has an influence on out."""
    problem = Problem(sizes, (1, 1), (1, 1), 16, 16, rpb=False)
    problem.grad_out.mul_(1e6)
    grad_q = problem.run()[2]
    want = problem.grad_lse.unsqueeze(-1) * problem.inputs[1] * problem.params[-1]
    torch.testing.assert_close(grad_q, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
def test_a_head_that_sees_nothing(sizes: tuple[int, int]) -> None:
    """As in plain PyTorch its out is NaN and its lse -inf; the other head goes on."""
    problem = Problem(sizes, (3, 3), (2, 2), 16, 32)
    before = problem.run()
    problem.inputs[3][1] = float("-inf")
    after = problem.run()
    assert after[0][..., 1, :].isnan().all()
    assert (after[1][..., 1] == float("-inf")).all()
    for got, want in zip(after[:2], before[:2], strict=True):
        assert torch.equal(got.select(3, 0), want.select(3, 0))


@pytest.mark.parametrize("causal", [(False, False), (False, True)], ids=str)
@pytest.mark.parametrize(
    ("sizes", "kernel", "dilation"), [((12, 21), (3, 5), (2, 2)), ((6, 10), (3, 5), (2, 2))], ids=str
)
def test_nan_reaches_exactly_the_neighborhood(
    sizes: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], causal: tuple[bool, bool]
) -> None:
    """A key's NaN shows at the queries that see it, a query's NaN at the keys it sees; nowhere else."""
    token, _, seen = reference.neighbors(sizes, kernel, (1, 1), dilation, causal)
    for at in (0, 7, 2 * sizes[1] - 1, sizes[0] * sizes[1] - 1):
        y, x = divmod(at, sizes[1])
        case = Problem(sizes, kernel, dilation, 16, 24, rpb=False, causal=causal, batch=1, heads=1)
        case.inputs[1][0, y, x, 0, 3] = case.inputs[2][0, y, x, 0] = float("nan")
        out, _, grad_q, *_ = case.run()
        sees = ((token == at) & seen).any(1).view(*sizes)
        assert torch.equal(out[0, ..., 0, :].isnan().all(-1), sees)
        assert torch.equal(out[0, ..., 0, :].isnan().any(-1), sees)
        assert torch.equal(grad_q[0, ..., 0, :].isnan().any(-1), sees)
        case = Problem(sizes, kernel, dilation, 16, 24, rpb=False, causal=causal, batch=1, heads=1)
        case.inputs[0][0, y, x, 0, 3] = case.grad_out[0, y, x, 0] = float("nan")
        _, lse, _, grad_k, grad_v, _ = case.run()
        seen_by = torch.zeros(sizes[0] * sizes[1], dtype=torch.bool)
        seen_by[token[at][seen[at]]] = True
        for grad in (grad_k, grad_v):
            assert torch.equal(grad[0, ..., 0, :].isnan().any(-1), seen_by.view(*sizes))
        assert int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
def test_absent_results_change_nothing(sizes: tuple[int, int]) -> None:
    problem = Problem(sizes, (3, 3), (2, 2), 16, 32)
    full = problem.run()
    for wanted in (
        (True, False, False, False),
        (False, True, False, True),
        (False, False, True, False),
        (False, False, False, True),
    ):
        for got, want in zip(problem.run(wanted)[2:], full[2:], strict=True):
            assert got is None or torch.equal(got, want)
    assert problem.run((False,) * 4)[2:] == [None] * 4


@pytest.mark.parametrize("sizes", [(12, 19), (6, 6)], ids=str)
def test_absent_incoming_gradients_are_zeros(sizes: tuple[int, int]) -> None:
    problem = Problem(sizes, (3, 3), (2, 2), 16, 32)
    only_out, only_lse = problem.run(grad_lse=False), problem.run(grad_out=False)
    neither = problem.run(grad_out=False, grad_lse=False)
    grad_lse = problem.grad_lse.clone()
    problem.grad_lse.zero_()
    for got, want in zip(only_out, problem.run(), strict=True):
        assert torch.equal(got, want)
    problem.grad_lse.copy_(grad_lse)
    problem.grad_out.zero_()
    for got, want in zip(only_lse, problem.run(), strict=True):
        assert torch.equal(got, want)
    assert all((t == 0).all() for t in neither[2:])
    assert any((t != 0).any() for t in only_lse[2:])


@pytest.mark.parametrize(
    "case",
    [
        ((40, 18), (7, 7), (1, 1), 16, 16),
        ((28, 30), (3, 3), (2, 3), 8, 16),
        ((21, 21), (7, 7), (3, 3), 16, 16),
        ((300,), (9,), (4,), 16, 16),
    ],
    ids=named,
)
def test_threads_do_not_change_a_bit(case: tuple[Any, ...]) -> None:
    problem = Problem(*case, batch=8)
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


def test_packed_projection_is_read_in_place() -> None:
    """As models call it: q, k and v are views of one projection's output."""
    qkv = torch.randn(2, 14, 14, 3, 2, 32, requires_grad=True)
    rpb = torch.randn(2, 13, 13, requires_grad=True)
    results = {}
    for backend in ("cpu", "reference"):
        q, k, v = qkv.unbind(3)
        out = ops.neighborhood_attention(q, k, v, 7, dilation=2, rpb=rpb, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out.square().sum(), (qkv, rpb))]
        assert out.is_contiguous()
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
