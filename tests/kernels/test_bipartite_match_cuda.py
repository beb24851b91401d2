"""The CUDA kernels of bipartite_match, run on the host by the twin, against the definition."""

from __future__ import annotations

import pytest
import torch
import twin
from guarded import Guarded
from token_merge_calls import (
    NAMES,
    NOTHING,
    PROTECTED,
    assert_same,
    check_match,
    expected,
    launch_match,
    tied_metric,
)

from vitkernels.kernels.bipartite_match import clipped, native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
each_protection = pytest.mark.parametrize(("class_token", "distill_token"), PROTECTED)
# Tokens and channels: the smallest; one block of even tokens, not full and full; more of them, of one tile of
# odd tokens and of several; less than a chunk of channels, whole ones, one and a bit, several.
SMALL = [(2, 1), (3, 7), (4, 64), (5, 80), (37, 7), (197, 64), (255, 17), (256, 40)]
LARGE = [(257, 1), (300, 80), (530, 130)]
MOST = 10**6


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


@each_dtype
@pytest.mark.parametrize(("tokens", "channels"), SMALL + LARGE)
def test_the_plan(tokens, channels, dtype, kernels):
    metric = torch.randn(2, tokens, channels).to(dtype)
    for class_token, distill_token in PROTECTED if tokens < 40 else PROTECTED[::3]:
        for r in (1, max(1, tokens // 5), MOST):
            if clipped(tokens, r, class_token, distill_token) == 0:
                continue
            options = (r, class_token, distill_token)
            check_match(launch_match(native, metric, *options, **kernels), metric, *options)
            if tokens > 40 and r > 1:
                break


@pytest.mark.parametrize(("tokens", "channels"), [(8, 5), (37, 7), (100, 64), (290, 6)])
def test_without_ties_the_plan_is_the_definitions(tokens, channels, kernels):
    """In float64 and float32, which leave no two scores nearer than their rounding here."""
    for dtype in DTYPES[:2]:
        metric = torch.randn(1, tokens, channels).to(dtype)
        got = launch_match(native, metric, tokens // 4, True, **kernels)
        assert check_match(got, metric, tokens // 4, True), "choose another seed: two scores are too near"


@each_dtype
@each_protection
@pytest.mark.parametrize("tokens", [3, 12, 61, 300])
def test_ties_go_to_the_lower_token(tokens, class_token, distill_token, dtype, kernels):
    if clipped(tokens, 1, class_token, distill_token) == 0:
        return
    tied, same = tied_metric(2, tokens, 12, dtype), torch.full((1, tokens, 9), 0.37).to(dtype)
    # Scores of equal tokens are equal whatever their rounding; those of the second metric need none.
    for metric, exact in ((tied, tied), (same, torch.ones(1, tokens, 4))):
        for r in (tokens // 3, MOST):
            options = (r, class_token, distill_token)
            assert_same(launch_match(native, metric, *options, **kernels), expected(exact.double(), *options))


@each_dtype
@pytest.mark.parametrize("tokens", [21, 270])
def test_a_token_of_zeros_and_numbers_that_are_none(tokens, dtype, kernels):
    metric = tied_metric(6, tokens, 12, dtype)
    clean = launch_match(native, metric, 6, True, **kernels)
    metric[1, [3, 8]] = 0
    metric[2, 4] = float("nan")
    metric[2, 7, 2] = float("nan")
    metric[3, [1, 6], 5] = torch.tensor([float("inf"), -float("inf")], dtype=dtype)
    metric[4, 1::2] = float("nan")
    metric[5] = float("nan")
    for distill_token in (False, True):
        for r in (6, MOST):
            options = (r, True, distill_token)
            got = launch_match(native, metric, *options, **kernels)
            assert_same(got, expected(metric.double(), *options))
    got = launch_match(native, metric, 6, True, **kernels)
    assert all(torch.equal(got[name][0], clean[name][0]) for name in NAMES), "an image saw another's NaN"


@each_dtype
@pytest.mark.parametrize(("tokens", "channels"), [(50, 16), (270, 24)])
def test_strided_metrics(tokens, channels, dtype, kernels):
    """Views of a packed projection, of every second token, of a map, off alignment, and one image for all."""
    plain = torch.randn(2, tokens, channels).to(dtype)
    want = launch_match(native, plain, 9, **kernels)
    packed = torch.full((2, tokens, 3, channels), float("nan"), dtype=dtype)
    packed[:, :, 1] = plain
    odd = torch.full((2, tokens, channels + 3), float("nan"), dtype=dtype)
    odd[:, :, 2:-1] = plain
    views = {
        "packed": packed[:, :, 1],
        "odd": odd[:, :, 2:-1],
        "every second": torch.stack([plain, plain + 1], 2).flatten(1, 2)[:, ::2],
        "channels last": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed": plain.mT.contiguous().mT,
        "backwards in the batch": plain.flip(0).clone()[[1, 0]],
    }
    for label, view in views.items():
        got = launch_match(native, view, 9, **kernels)
        for name in NAMES:
            assert torch.equal(got[name], want[name]), f"{label}: {name}"
    got = launch_match(native, plain[:1].expand(3, -1, -1), 9, **kernels)
    for name in NAMES:
        assert torch.equal(got[name], want[name][:1].expand(3, -1)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_split_of_the_odd_tokens_changes_nothing(dtype, kernels):
    """A single image is split among blocks, 70 are not."""
    metric = tied_metric(1, 280, 12, dtype)
    want = launch_match(native, metric, 40, **kernels)
    got = launch_match(native, metric.expand(70, -1, -1), 40, **kernels)
    for name in NAMES:
        assert (got[name] == want[name]).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [61, 270])
def test_every_schedule_gives_the_same(tokens, dtype, kernels):
    """A missing barrier would show as a difference between orders of threads."""
    metric = torch.randn(1, tokens, 140).to(dtype)
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch_match(native, metric, 12, True, True, **kernels)
        want = want or got
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels", "before"), [(37, 7, 65), (52, 64, 64), (270, 12, 64)])
def test_nothing_is_read_or_written_outside(tokens, channels, before, dtype, kernels):
    guarded, kept = Guarded(), []
    plain = torch.randn(2, tokens, channels).to(dtype)
    metric = guarded((2, tokens, channels), dtype).copy_(plain)
    if before % 2:
        buffer = torch.full((before + plain.numel() + 64,), float("nan"), dtype=dtype)
        metric = buffer[before : before + plain.numel()].view(plain.shape).copy_(plain)

    def allocate(shape):
        count = torch.Size(shape).numel()
        kept.append((torch.full((count + 128,), NOTHING, dtype=torch.int32), count))
        return kept[-1][0][64 : 64 + count].view(shape)

    got = launch_match(native, metric, 9, allocate=allocate, **kernels)
    assert_same(got, launch_match(native, plain, 9, **kernels))
    guarded.check()
    for buffer, count in kept:
        assert (buffer[:64] == NOTHING).all()
        assert (buffer[64 + count :] == NOTHING).all()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.thorough), torch.float16])
def test_long_sequences(dtype, kernels):
    """With more even tokens than a block that counts has keys of in shared memory."""
    metric = tied_metric(1, 2311, 4, dtype)
    for class_token, distill_token in PROTECTED[::3]:
        for r in (700, MOST):
            options = (r, class_token, distill_token)
            assert_same(
                launch_match(native, metric, *options, **kernels), expected(metric.double(), *options)
            )


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from token_merge_calls import launch_match\n"
        "from vitkernels.kernels.bipartite_match import native\n"
        "for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):\n"
        "    for tokens, channels in ((2, 1), (61, 7), (40, 80), (263, 72)):\n"
        "        metric = torch.randn(2, tokens, channels).to(dtype)\n"
        "        launch_match(native, metric, 10**6, module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("bipartite_match",))
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_wrong_plan_fails_the_check(kernels):
    metric = torch.randn(2, 37, 8)
    good = launch_match(native, metric, 9, **kernels)
    check_match(good, metric, 9)
    for name in NAMES:
        bad = {key: value.clone() for key, value in good.items()}
        bad[name][1, [3, 4]] = bad[name][1, [4, 3]]
        assert not torch.equal(bad[name], good[name])
        with pytest.raises(AssertionError):
            check_match(bad, metric, 9)
