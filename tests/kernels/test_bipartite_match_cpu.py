"""The CPU kernels of bipartite_match against the definition."""

from __future__ import annotations

import pytest
import torch
from guarded import Guarded, Layout, drawn
from token_merge_calls import (
    NAMES,
    PROTECTED,
    assert_same,
    check_match,
    expected,
    launch_match,
    tied_metric,
)

from vitkernels import ops
from vitkernels.kernels.bipartite_match import clipped, native

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
each_protection = pytest.mark.parametrize(("class_token", "distill_token"), PROTECTED)
# Tokens and channels: the smallest, less than a tile and a panel, some of both; less than a vector of channels,
# whole vectors, one and a bit.
SMALL = [(2, 1), (3, 7), (4, 64), (5, 80), (12, 8), (37, 7), (66, 33)]
MOST = 10**6


@each_dtype
@pytest.mark.parametrize(("tokens", "channels"), SMALL)
def test_the_plan(tokens, channels, dtype):
    metric = drawn(3, tokens, channels, dtype=dtype)
    for class_token, distill_token in PROTECTED:
        for r in (1, max(1, tokens // 5), MOST):
            if clipped(tokens, r, class_token, distill_token) > 0:
                options = (r, class_token, distill_token)
                check_match(launch_match(native, metric, *options), metric, *options)


@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "r"),
    [
        (2, 197, 64, 16),
        (1, 198, 64, 13),
        (1, 577, 64, 23),
        (1, 1370, 80, 40),
        *(
            pytest.param(*shape, marks=pytest.mark.thorough)
            for shape in [(8, 197, 64, 13), (1, 1025, 64, 40), (2, 4096, 320, 2048), (1, 4096, 1, 1024)]
        ),
    ],
)
def test_the_models_shapes(batch, tokens, channels, r):
    told = (tokens != 4096, tokens == 198)
    for dtype in (torch.float32, torch.float16):
        metric = drawn(batch, tokens, channels, dtype=dtype)
        check_match(launch_match(native, metric, r, *told), metric, r, *told)


@pytest.mark.parametrize(("tokens", "channels"), [(8, 5), (37, 7), (100, 64), (290, 6)])
def test_without_ties_the_plan_is_the_definitions(tokens, channels):
    """In float64 and float32, which leave no two scores nearer than their rounding here."""
    wide = drawn(1, tokens, channels, dtype=torch.float64)
    for dtype in DTYPES[:2]:
        metric = wide.to(dtype)
        got = launch_match(native, metric, tokens // 4, True)
        assert check_match(got, metric, tokens // 4, True), "choose another seed: two scores are too near"


@each_dtype
@each_protection
@pytest.mark.parametrize("tokens", [3, 12, 61, 300])
def test_ties_go_to_the_lower_token(tokens, class_token, distill_token, dtype):
    if clipped(tokens, 1, class_token, distill_token) == 0:
        return
    tied, same = tied_metric(2, tokens, 12, dtype), torch.full((1, tokens, 9), 0.37).to(dtype)
    # Scores of equal tokens are equal whatever their rounding; those of the second metric need none.
    for metric, exact in ((tied, tied), (same, torch.ones(1, tokens, 4))):
        for r in (tokens // 3, MOST):
            options = (r, class_token, distill_token)
            assert_same(launch_match(native, metric, *options), expected(exact.double(), *options))


@pytest.mark.parametrize("factor", [3.0, 41.0, 1e-15, 1e15])
def test_the_length_of_a_token_makes_no_difference(factor):
    """Multiples of a token point in its direction: no rounding may put one before the other."""
    metric = torch.zeros(1, 40, 5)
    metric[0, torch.arange(40), torch.arange(40) % 5] = 1
    want = launch_match(native, metric, 12, True)
    metric[0, ::3] *= factor
    assert_same(launch_match(native, metric, 12, True), want)


@each_dtype
@pytest.mark.parametrize("tokens", [21, 270])
def test_a_token_of_zeros_and_numbers_that_are_none(tokens, dtype):
    metric = tied_metric(6, tokens, 12, dtype)
    clean = launch_match(native, metric, 6, True)
    metric[1, [3, 8]] = 0
    metric[2, 4] = float("nan")
    metric[2, 7, 2] = float("nan")
    metric[3, [1, 6], 5] = torch.tensor([float("inf"), -float("inf")], dtype=dtype)
    metric[4, 1::2] = float("nan")
    metric[5] = float("nan")
    for distill_token in (False, True):
        for r in (6, MOST):
            options = (r, True, distill_token)
            assert_same(launch_match(native, metric, *options), expected(metric.double(), *options))
    got = launch_match(native, metric, 6, True)
    assert all(torch.equal(got[name][0], clean[name][0]) for name in NAMES), "an image saw another's NaN"


def test_one_destination_receives_every_source():
    metric = torch.randn(2, 41, 8).abs()
    metric[:, 1::2] *= -1
    metric[:, 7] *= -1
    got = launch_match(native, metric, MOST, True)
    assert (got["dst"] == 7).all()
    lengths = got["starts"].diff(dim=1)
    assert (lengths.amax(1) == 21).all()
    assert (lengths.sum(1) == 41).all()
    assert_same(got, expected(metric, MOST, True))


@each_dtype
@pytest.mark.parametrize(("tokens", "channels"), [(50, 16), (71, 24)])
def test_strided_metrics(tokens, channels, dtype):
    plain = drawn(2, tokens, channels, dtype=dtype)
    want = launch_match(native, plain, 9)
    packed = torch.full((2, tokens, 3, channels), float("nan"), dtype=dtype)
    packed[:, :, 1] = plain
    odd = torch.full((2, tokens, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 2:-1] = plain
    views = {
        "packed": packed[:, :, 1],
        "odd": odd[:, :, 2:-1],
        "every second": torch.stack([plain, plain + 1], 2).flatten(1, 2)[:, ::2],
        "batch inside": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed": plain.mT.contiguous().mT,
    }
    for label, view in views.items():
        got = launch_match(native, view, 9)
        for name in NAMES:
            assert torch.equal(got[name], want[name]), f"{label}: {name}"
    got = launch_match(native, plain[:1].expand(3, -1, -1), 9)
    for name in NAMES:
        assert torch.equal(got[name], want[name][:1].expand(3, -1)), name


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_threads_change_nothing(batch):
    """Few images are split among the threads, many are not."""
    metric = torch.randn(batch, 263, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = launch_match(native, metric, 31, True)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same(launch_match(native, metric, 31, True), want)
    finally:
        torch.set_num_threads(before)
    alone = launch_match(native, metric[-1:], 31, True)
    for name in NAMES:
        assert torch.equal(alone[name][0], want[name][-1]), f"{name} depends on the other images"


@pytest.mark.usefixtures("either_wall")
@each_dtype
@pytest.mark.parametrize(("tokens", "channels", "before"), [(37, 7, 65), (52, 64, 64), (71, 12, 64)])
def test_nothing_is_read_or_written_outside(tokens, channels, before, dtype):
    guarded, plain = Guarded(walls=True), drawn(2, tokens, channels, dtype=dtype)
    want = launch_match(native, plain, 9)
    for padding in (0, 3):
        metric = guarded(plain.shape, dtype, Layout((0, 1, 2), padding=padding, before=before)).copy_(plain)
        got = launch_match(native, metric, 9, allocate=lambda shape: guarded(shape, torch.int32))
        guarded.check()
        assert_same(got, want)


def test_the_mean_of_keys_is_a_metric():
    """What a block hands in: a view of a packed projection, averaged over its heads."""
    qkv = torch.randn(2, 50, 3, 4, 16)
    keys = qkv[:, :, 1].transpose(1, 2)
    for metric in (keys.mean(1), keys[:, 0]):
        plan = ops.bipartite_match(metric, 8, class_token=True, backend="cpu")
        want = ops.bipartite_match(metric.double(), 8, class_token=True, backend="reference")
        assert torch.equal(plan.rows, want.rows)
