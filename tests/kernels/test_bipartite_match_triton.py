"""The Triton kernels of bipartite matching in Triton's interpreter, against the definition.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_bipartite_match_triton.py`.
"""

from __future__ import annotations

import os

import plain_token_merge as plain
import pytest
import torch
from far import far
from guarded import Guarded, Layout
from token_merge_calls import check_match

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import ops, supported_backends
from vitkernels.kernels.bipartite_match import reference
from vitkernels.kernels.bipartite_match import triton as launcher

F32, F16 = torch.float32, torch.float16
NAMES = ("rows", "starts", "members", "src", "dst")
NAN = float("nan")
FREE = -(10**9)  # no token
PROTECTED = [(False, False), (True, False), (False, True), (True, True)]
each_protection = pytest.mark.parametrize(("class_token", "distill_token"), PROTECTED)
# One program for an image, or several that take tiles in turn.
each_share = pytest.mark.parametrize("alone", [True, False], ids=["one program", "programs"])


def match(metric: torch.Tensor, r: int, *told: bool) -> dict[str, torch.Tensor]:
    """A plan's tensors, which lie between numbers that nothing may change."""
    batch, tokens = metric.shape[:2]
    buffers = {}
    for name, count in zip(NAMES, (tokens, tokens - r + 1, tokens, r, r), strict=True):
        buffers[name] = torch.full((batch * count + 64,), FREE, dtype=torch.int32)
    views = {name: buffer[32:-32].view(batch, -1) for name, buffer in buffers.items()}
    launcher.forward(*views.values(), metric, r, *(told or (False, False)))
    for name, buffer in buffers.items():
        assert (buffer[:32] == FREE).all(), f"{name}: written before its start"
        assert (buffer[-32:] == FREE).all(), f"{name}: written beyond its end"
        assert (views[name] != FREE).all(), f"{name}: not written entirely"
    return views


def check(metric: torch.Tensor, r: int, *told: bool) -> None:
    """Holds a plan to the definition's, bit for bit."""
    want = reference.forward(metric, r, *(told or (False, False)))
    for (name, got), expected in zip(match(metric, r, *told).items(), want, strict=True):
        assert torch.equal(got, expected), name


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that several programs arrange, few enough that each takes more than one tile."""
    monkeypatch.setattr(launcher, "ALONE", 0)
    monkeypatch.setattr(launcher, "PROGRAMS", 4)
    monkeypatch.setattr(launcher, "ARRANGE", {"BLOCK": 16, "CHUNK": 32, "num_warps": 4})


@each_protection
@pytest.mark.parametrize(("tokens", "r", "channels"), [(4, 1, 3), (5, 1, 2), (24, 7, 5), (67, 20, 40)])
def test_the_definition(tokens: int, r: int, channels: int, class_token: bool, distill_token: bool) -> None:
    check(torch.randn(2, tokens, channels), r, class_token, distill_token)


@each_protection
@pytest.mark.parametrize(
    ("tokens", "r", "channels"), [(24, 7, 5), pytest.param(197, 98, 33, marks=pytest.mark.thorough)]
)
def test_programs_that_share_an_image(
    tokens: int, r: int, channels: int, class_token: bool, distill_token: bool, many: None
) -> None:
    check(torch.randn(2, tokens, channels), r, class_token, distill_token)


@pytest.mark.thorough
@each_protection
@pytest.mark.parametrize("channels", [2, 64, 80, 320])
@pytest.mark.parametrize(("tokens", "r"), [(197, 16), (198, 98), (577, 23), (1030, 500)])
def test_grid(tokens: int, r: int, channels: int, class_token: bool, distill_token: bool) -> None:
    # Of two channels, many scores are one but for their rounding.
    metric, options = torch.randn(1, tokens, channels), (r, class_token, distill_token)
    check_match(match(metric, *options), metric, *options)


@pytest.mark.parametrize(("tokens", "r"), [(2, 1), (3, 1), (8, 4), (9, 4)])
def test_the_published_steps(tokens: int, r: int) -> None:
    """As many as can be merged, from very short sequences."""
    metric = torch.randn(3, tokens, 5)
    got = match(metric, r)
    for image in range(3):
        kept, merged, targets = plain.match(metric[image], r)
        assert got["src"][image].tolist() == merged
        assert got["dst"][image].tolist() == targets
        assert got["members"][image, : len(kept)].tolist() == kept


@pytest.mark.parametrize("channels", [64, 200])
def test_half_precision(channels: int) -> None:
    """Products of halves are exact, so the order is that of fp64 wherever fp64 tells the scores apart."""
    metric = torch.randn(1, 90, channels).half()
    got = match(metric, 20, True, False)
    scores = reference.similarities(metric.double())[0]
    best = scores.max(1).values
    src, dst = got["src"][0].long() // 2, got["dst"][0].long() // 2
    assert (scores[src, dst] >= best[src] - 1e-6).all()
    assert (best[src][1:] <= best[src][:-1] + 1e-6).all()
    rest = torch.ones(45, dtype=torch.bool).index_fill(0, src, False)
    rest[0] = False
    assert best[rest].max() <= best[src].min() + 1e-6


@each_share
@pytest.mark.parametrize("told", [(False, False), (True, True)])
def test_ties_go_to_the_lower_token(
    told: tuple[bool, bool], alone: bool, request: pytest.FixtureRequest
) -> None:
    """All equal, and a few values over many tokens: in tiles of their own, too."""
    if not alone:
        request.getfixturevalue("many")
    check(torch.ones(1, 12, 3), 3, *told)
    check(torch.eye(4)[torch.randint(4, (1, 150))], 60, *told)
    check(torch.randn(1, 30, 1).sign(), 9, *told)  # of one channel every cosine is 1 or -1


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("told", [(False, False), (True, True)])
def test_zeros_and_what_is_no_number(told: tuple[bool, bool], dtype: torch.dtype) -> None:
    # Cosines of 0 and 1 alone, which are the same in any order of summation.
    metric = torch.eye(8)[torch.randint(8, (5, 40))].to(dtype)
    metric[1, [3, 8, 20]] = 0
    metric[2, [4, 7], 1] = NAN
    metric[3, [0, 5, 10], 2] = float("inf")
    metric[4] = NAN
    for r in (6, 19):
        check(metric, r, *told)


def test_strides_are_read_in_place() -> None:
    guarded = Guarded()
    metric = torch.randn(2, 45, 20)
    for layout in (Layout((0, 1, 2), before=65), Layout((2, 0, 1), padding=1, before=37)):
        placed = guarded((2, 45, 20), F32, layout).copy_(metric)
        check(placed, 9, True, False)
        want, got = match(metric, 9), match(placed, 9)
        assert all(torch.equal(got[name], want[name]) for name in NAMES)
    check(torch.randn(1, 45, 20).expand(3, 45, 20), 9)


def test_nothing_outside_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and metric lie amid NaN, which no result shows."""
    guarded = Guarded()
    scratch = lambda like, *shape, dtype=F32: (  # noqa: E731
        guarded(shape, dtype) if dtype is F32 else torch.full(shape, FREE, dtype=dtype)
    )
    monkeypatch.setattr(launcher, "_scratch", scratch)
    for shape in ((2, 67, 20), (1, 10, 200)):
        check(guarded.random(shape, F32, Layout((0, 1, 2), before=65)), 4, True, True)
    guarded.check()


def test_tokens_further_apart_than_32_bits_count() -> None:
    metric = torch.randn(1, 5, 4).half()
    want, got = match(metric, 2), match(far(metric, 1), 2)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_the_public_function_runs_the_kernels() -> None:
    metric = torch.randn(2, 3, 23, 6, requires_grad=True).mean(1)
    plans = [
        ops.bipartite_match(metric, 7, class_token=True, backend=name) for name in ("triton", "reference")
    ]
    for name in NAMES:
        assert torch.equal(getattr(plans[0], name), getattr(plans[1], name)), name
    assert ops.bipartite_match(metric[:0], 7, backend="triton").rows.shape == (0, 23)
    assert "float64" in supported_backends("bipartite_match", metric.double(), 7)["triton"][0]


def test_a_wrong_plan_is_seen() -> None:
    metric = torch.randn(2, 40, 6)
    check(metric, 8)
    for wrong in (metric * torch.linspace(1, 2, 6), metric.roll(1, 1), metric.abs()):
        got, want = match(wrong, 8), reference.forward(metric, 8, False, False)
        assert not torch.equal(got["src"], want[3])
        assert not torch.equal(got["rows"], want[0])
