"""The compiled CPU kernels of strip attention against the reference, on each instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from guarded import Guarded
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels import ops
from vitkernels.core import native as extension
from vitkernels.kernels.strip_attention import native, reference

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is missing")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_attn_bias")


@dataclass
class Problem:
    """One call. With one channel, no bias and a small scale float kernels expand the softmax; `direct` scales lie
    beyond that."""

    queries: int
    keys: int
    r: int
    dv: int
    layout: str = "packed"
    scale: float = 0.2
    bias: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    bias_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.guarded = Guarded(walls=True)
        lead = (self.batch, self.heads)
        shapes = {
            "q": (*lead, self.queries, self.r),
            "k": (*lead, self.keys, self.r),
            "v": (*lead, self.keys, self.dv),
            "grad_out": (*lead, self.queries, self.dv),
        }
        q, k, v, self.grad_out = (
            self.guarded.random(shape, self.dtype, self.layout) for shape in shapes.values()
        )
        bias = None
        if self.bias is not None:
            bias = self.guarded.random(self.bias, self.bias_dtype or self.dtype)
        self.inputs: tuple[Any, ...] = (q, k, v, bias)
        self.lse_dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        self.grad_lse = self.guarded.random((*lead, self.queries), self.lse_dtype)

    def expected(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = [
            None if t is None else t.detach().to(t.dtype if dtype is self.dtype else dtype).requires_grad_()
            for t in self.inputs
        ]
        out, lse = reference.forward(*leaves, self.scale)
        wanted = [t for t in leaves if t is not None]
        seeds = (self.grad_out.to(out.dtype), self.grad_lse.to(lse.dtype))
        grads = torch.autograd.grad((out, lse), wanted, seeds)
        return [out, lse, *grads, *([None] if leaves[3] is None else [])]

    def run(
        self, wanted: tuple[bool, ...] = (True,) * 4, grad_out: bool = True, grad_lse: bool = True
    ) -> list[Any]:
        """out, lse and the gradients; nothing beside them was written, and inference gives the same out."""
        q, k, v, bias = self.inputs
        lead = (self.batch, self.heads, self.queries)
        out, alone = (self.guarded((*lead, self.dv), self.dtype, "packed") for _ in range(2))
        lse = self.guarded(lead, self.lse_dtype)
        native.forward(out, lse, q, k, v, bias, self.scale)
        native.forward(alone, None, q, k, v, bias, self.scale)
        assert torch.equal(out, alone)
        grads = [
            self.guarded(tuple(t.shape), t.dtype, self.layout) if t is not None and want else None
            for t, want in zip(self.inputs, wanted, strict=True)
        ]
        native.backward(
            *grads,
            self.grad_out if grad_out else None,
            self.grad_lse if grad_lse else None,
            *(out, lse, q, k, v, bias),
            self.scale,
        )
        self.guarded.check()
        return [out, lse, *grads]

    def check(self, results: list[Any] | None = None) -> None:
        """Holds the kernels' results, or those given, to the house rule."""
        truth, baseline = self.expected(torch.float64), self.expected(self.dtype)
        results = self.run() if results is None else results
        logits = self.batch * self.heads * self.queries * self.keys
        for name, got, base, true in zip(NAMES, results, baseline, truth, strict=True):
            if got is None:
                assert true is None
                continue
            if not true.any():  # as of the logits of a single key
                assert (got.abs() <= 64 * torch.finfo(self.dtype).eps).all(), name
                continue
            assert_close_to_truth(
                name,
                got,
                base,
                true,
                factor=FORWARD if name in ("out", "lse") else GRADIENT,
                reduced=logits // true.numel() if name == "grad_attn_bias" else 1,
                dtype=self.dtype,
            )


def named(case: tuple[Any, ...]) -> str:
    return "-".join(str(part).replace(" ", "") for part in case)


# queries, keys, r, dv, layout, scale: each width, number of keys and layout in turn
CASES: list[tuple[Any, ...]] = [
    (50, 1, 1, 16, "packed", 0.5),
    (196, 49, 1, 64, "packed", 0.125),
    (64, 50, 1, 66, "offset", -0.3),
    (300, 256, 1, 75, "tokens_first", 0.1),
    (131, 1050, 1, 48, "packed", 0.144),
    (1, 7, 1, 96, "nchw_offset", 1.0),
    (33, 17, 1, 8, "odd", 0.4),
    (196, 49, 1, 96, "packed", 3.0),
    (65, 256, 1, 24, "strided", -0.9),
    (63, 49, 2, 16, "packed", 0.7),
    (49, 49, 3, 75, "offset", 0.6),
    (130, 256, 8, 48, "tokens_first", 0.35),
    (70, 50, 16, 66, "odd", -0.25),
    (37, 1050, 2, 64, "packed", 0.5),
    (20, 1, 3, 16, "strided", 0.6),
    (9, 130, 64, 32, "packed", 0.125),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_matches_reference(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    Problem(*case, dtype=dtype).check()


# The gradients of keys and values in two parts of a head's queries, which are added up: by tiles of keys.
PARTED: list[tuple[Any, ...]] = [
    (450, 130, 1, 24, "packed", 0.1),
    (450, 130, 1, 24, "packed", 2.0),
    (450, 70, 3, 12, "offset", 0.4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", PARTED, ids=named)
def test_parts_of_the_queries_are_added(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    Problem(*case, dtype=dtype).check()


BIASED: list[tuple[Any, ...]] = [
    (50, 49, 1, 16, "packed", 1.0, (2, 2, 50, 49)),
    (70, 130, 1, 66, "offset", 0.3, (1, 2, 1, 130)),
    (33, 256, 8, 48, "tokens_first", 0.35, (33, 256)),
    (65, 7, 3, 24, "odd", -0.5, (2, 1, 65, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BIASED, ids=named)
def test_bias_and_its_gradient(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    Problem(*case, dtype=dtype).check()


@pytest.mark.parametrize("case", [*CASES, *BIASED], ids=named)
@pytest.mark.usefixtures("walls_in_front")
def test_nothing_in_front_is_read_or_written(case: tuple[Any, ...]) -> None:
    for dtype in DTYPES:
        Problem(*case, dtype=dtype).run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_with_half_tensors(dtype: torch.dtype) -> None:
    Problem(50, 49, 2, 16, bias=(2, 50, 49), bias_dtype=torch.float32, dtype=dtype).check()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 2, 7, 49, 50, 63, 64, 65, 256, 1050])
@pytest.mark.parametrize("dv", [1, 8, 16, 24, 48, 64, 66, 75, 96])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 16])
def test_widths_and_keys(r: int, dv: int, keys: int, dtype: torch.dtype) -> None:
    for scale in (0.1, -0.4):
        Problem(97, keys, r, dv, scale=scale * r**-0.5, dtype=dtype, batch=1, heads=3).check()


# What is done to q and k, both of one channel, and how far the logits then spread.
VALUES: dict[str, tuple[Callable[..., Any], float]] = {
    "no queries": (lambda q, k: q.zero_(), 0.5),
    "one key": (lambda q, k: k.fill_(0.7), 0.5),
    "equal queries": (lambda q, k: q.fill_(0.7), 0.5),
    "positive": (lambda q, k: (q.abs_(), k.abs_()), 0.3),
    "negative": (lambda q, k: (q.abs_(), k.abs_().neg_()), -0.3),
    "all but equal": (lambda q, k: k.mul_(2**-8).add_(1), 0.5),
    "far from zero": (lambda q, k: (q.add_(30), k.add_(30)), 0.01),
    "far below zero": (lambda q, k: q.mul_(0.05).sub_(40), 1.0),
    "one key and one query": (lambda q, k: (q.fill_(0.3), k.fill_(0.7)), 0.5),
    "within roundings": (lambda q, k: k.mul_(2**-18).add_(1), 0.5),
    "most keys at one end": (
        lambda q, k: (q.clamp_(-1.5, 1.5), k.mul_(0.02).add_(1)[:, :, 3].fill_(-1)),
        1.0,
    ),
    "most keys at the other": (
        lambda q, k: (q.clamp_(-1.5, 1.5), k.mul_(0.02).sub_(1)[:, :, 3].fill_(1)),
        1.0,
    ),
    "one huge key": (lambda q, k: k[:, :, 3].fill_(1000), 0.5),
    "highest key last": (lambda q, k: k[:, :, -1].fill_(1000), 0.5),
    "lowest key last": (lambda q, k: k[:, :, -1].fill_(-1000), 0.5),
    "one huge query": (lambda q, k: q[:, :, 3].fill_(1000), 0.5),
    "tiny": (lambda q, k: (q.mul_(1e-20), k.mul_(1e-20)), 0.5),
}


FAR_APART = ("far below zero", "one huge key", "highest key last", "lowest key last", "one huge query")


@pytest.mark.parametrize("keys", [49, 130])
@pytest.mark.parametrize("what", VALUES)
def test_values(what: str, keys: int) -> None:
    change, scale = VALUES[what]
    problem = Problem(90, keys, 1, 48, scale=scale)
    change(*problem.inputs[:2])
    want = problem.expected(torch.float64)
    results = problem.run()
    if what in FAR_APART:
        # Logits of hundreds: float32 rounds them by 2e-5, for the reference as for the kernels.
        for name, got, true in zip(NAMES[:5], results, want, strict=False):
            assert torch.isfinite(got).all()
            assert (got - true).abs().max() <= 3e-4 * true.abs().max(), name
    elif what == "tiny":
        for name, got, true in zip(NAMES[:5], results, want, strict=False):
            assert (got - true).abs().max() <= 3e-6 * true.abs().max() + 1e-30, name
    else:
        problem.check(results)


@pytest.mark.parametrize("r", [1, 3])
def test_tiles_of_hidden_keys(r: int) -> None:
    """Queries that see nothing of the first tiles of keys, of which the running maximum is -inf, and one of any."""
    problem = Problem(40, 200, r, 24, bias=(40, 200))
    q, k, v, bias = problem.inputs
    for first, seen in enumerate((0, 70, 150, 190)):
        bias[first::4, :seen] = -torch.inf
    problem.check()
    bias[7] = -torch.inf
    got = ops.strip_attention(q, k, v, attn_bias=bias, scale=problem.scale, return_lse=True, backend="cpu")
    for result, want in zip(got, reference.forward(q, k, v, bias, problem.scale), strict=True):
        torch.testing.assert_close(result, want, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.04, 1.06, 1.79, 1.81, 2.09, 2.11, 3.1])
def test_spread_of_logits(spread: float) -> None:
    """Logits from -spread to spread: up to the ends of what 8 and 10 terms reach, by one bin and by two."""
    problem = Problem(150, 49, 1, 32, scale=spread)
    for tokens in problem.inputs[:2]:
        count = tokens.size(2)
        for head in (head for entry in tokens for head in entry):  # flatten(0, 1) would copy them
            head[:, 0] = torch.linspace(-1, 1, count)[torch.randperm(count)]
    problem.check()


def test_both_ways_of_computing_a_softmax_agree() -> None:
    """One query far out sends its head, and no other, the way of single weights."""
    problem = Problem(300, 130, 1, 40, scale=0.1)
    expanded = problem.run()
    problem.inputs[0][:, 1, 0] = 1e4
    direct = problem.run()
    for name, one, other in zip(NAMES[:3], expanded, direct, strict=False):
        assert torch.equal(one[:, 0], other[:, 0]), name
        assert not torch.equal(one[:, 1, 1:], other[:, 1, 1:]), f"{name}: both went the same way"
        torch.testing.assert_close(one[:, 1, 1:], other[:, 1, 1:], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_wrong_results_are_rejected(scale: float) -> None:
    """The comparison sees a scale off by 1 %, a wrong key, a wrong query and two rows of values exchanged."""
    right = Problem(70, 49, 1, 24, scale=scale)
    q, k, v, _ = right.inputs
    one_key, one_query, exchanged = k.clone(), q.clone(), v.clone()
    one_key[:, :, -1] += 1
    one_query[:, :, 7] += 1
    exchanged[:, :, [1, 2]] = v[:, :, [2, 1]]
    good = right.run()
    right.check(good)
    for inputs in ((q * 1.01, k, v), (q, one_key, v), (one_query, k, v), (q, k, exchanged)):
        wrong = Problem(70, 49, 1, 24, scale=scale)
        wrong.inputs, wrong.grad_out, wrong.grad_lse = (*inputs, None), right.grad_out, right.grad_lse
        for i, (name, result) in enumerate(zip(NAMES[:5], wrong.run(), strict=False)):
            if name in ("lse", "grad_v") and inputs[2] is exchanged:
                continue  # neither depends on the values
            mixed = list(good)
            mixed[i] = result
            with pytest.raises(AssertionError, match=f"{name}: max .* exceeds"):
                right.check(mixed)


WAYS = {"expanded": (0.1, None), "direct": (2.0, None), "biased": (0.5, (2, 1, 90, 130))}
each_way = pytest.mark.parametrize("way", WAYS)


def problem_of(way: str, **options: Any) -> Problem:
    scale, bias = WAYS[way]
    return Problem(90, 130, 1, 24, scale=scale, bias=bias, **options)


@each_way
def test_absent_results_change_nothing(way: str) -> None:
    problem = problem_of(way)
    full = problem.run()
    for i in range(4):
        wanted = tuple(j == i for j in range(4))
        for got, want in zip(problem.run(wanted)[2:], full[2:], strict=True):
            assert got is None or torch.equal(got, want)
    assert problem.run((False,) * 4)[2:] == [None] * 4


@each_way
def test_absent_incoming_gradients_are_zeros(way: str) -> None:
    problem = problem_of(way)
    only_out, only_lse = problem.run(grad_lse=False), problem.run(grad_out=False)
    neither = problem.run(grad_out=False, grad_lse=False)
    grad_lse = problem.grad_lse.clone()
    for seed, want in ((problem.grad_lse, only_out), (problem.grad_out, only_lse)):
        seed.zero_()
        for got, other in zip(problem.run(), want, strict=True):
            if got is not None:
                torch.testing.assert_close(got, other, atol=1e-6, rtol=1e-5)
        problem.grad_lse.copy_(grad_lse)
    assert all(t is None or (t == 0).all() for t in neither[2:])
    assert any((t != 0).any() for t in only_lse[2:4])


@each_way
@pytest.mark.parametrize(("queries", "keys", "batch"), [(700, 49, 1), (400, 300, 1), (49, 49, 16)], ids=str)
def test_threads_do_not_change_a_bit(queries: int, keys: int, batch: int, way: str) -> None:
    scale, bias = WAYS[way]
    problem = Problem(
        queries, keys, 1, 16, scale=scale, batch=batch, bias=bias and (queries, keys), heads=1 + batch // 16
    )
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


def test_infinite_keys_and_nan_queries_stay_where_they_are() -> None:
    """Numbers that are not finite take no head to other numbers than plain PyTorch."""
    q, k, v = (torch.randn(2, 2, tokens, width) for tokens, width in ((40, 1), (49, 1), (49, 16)))
    q[0, 0, 5] = float("nan")
    q[1, 1].abs_().add_(0.1)
    k[1, 1, 7] = float("inf")  # hidden from every query, since the scale is negative
    out, lse = ops.strip_attention(q, k, v, scale=-0.1, return_lse=True, backend="cpu")
    want, want_lse = reference.forward(q, k, v, None, -0.1)
    torch.testing.assert_close(out, want, equal_nan=True, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, equal_nan=True, atol=1e-6, rtol=1e-5)
    assert int(lse.isnan().sum()) == 1


def test_projections_are_read_in_place() -> None:
    """Views as models hand them over: narrow q and k of all heads, v a slice of a fused projection."""
    q_all = torch.randn(2, 196, 4, requires_grad=True)
    kv = torch.randn(2, 49, 4 + 64, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        q = q_all.view(2, 196, 4, 1).transpose(1, 2)
        k = kv[..., :4].unflatten(-1, (4, 1)).transpose(1, 2)
        v = kv[..., 4:].unflatten(-1, (4, 16)).transpose(1, 2)
        out = ops.strip_attention(q, k, v, scale=16**-0.5, backend=backend)
        tokens = out.transpose(1, 2).flatten(2)
        assert tokens.data_ptr() == out.data_ptr(), backend
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), (q_all, kv))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
