"""A wrong provider gets no speed; a right one passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerance import FORWARD, assert_cancelled, assert_close_to_truth

from vitkernels.bench import gate, runner
from vitkernels.bench.case import Inputs, Provider, Unavailable, load_case
from vitkernels.bench.providers import eager, ours

CASE = load_case("window_attention")
SETTINGS = runner.Settings(torch.device("cpu"), torch.float32, seconds=0.005, rounds=2)
PROBLEM = CASE.parse_shape("windows=2,window=3x2,heads=2,d=8,dv=16,layout=map")


def transposed_bias(inputs: Inputs, training: bool):
    """Wrong the way a kernel is wrong: dy and dx swapped in the bias index."""

    def function(*, q, k, v, bias_table):
        swapped = bias_table.unflatten(1, (3, 2)).transpose(1, 2).flatten(1)
        return CASE.eager(q=q, k=k, v=v, bias_table=swapped, **inputs.options)

    return function


def wrong_gradient(inputs: Inputs, training: bool):
    """Right forward, but the bias gets only half its gradient."""

    def function(*, bias_table, **tensors):
        half = 0.5 * bias_table + 0.5 * bias_table.detach()
        return CASE.eager(**tensors, bias_table=half, **inputs.options)

    return function


def not_a_number(inputs: Inputs, training: bool):
    def function(**tensors):
        out = CASE.eager(**tensors, **inputs.options)
        return torch.where(torch.arange(out.shape[-1]) == 3, float("nan"), out)

    return function


def unavailable(inputs: Inputs, training: bool):
    raise Unavailable("not on this machine")


def raising(inputs: Inputs, training: bool):
    raise RuntimeError("no kernel image")


def rows_of(*providers: Provider, mode: str = "fwd") -> dict[str, runner.Row]:
    rows = runner.run_problem(CASE, "shape", PROBLEM, 2, mode, (eager(CASE), *providers), SETTINGS, None)
    return {row.provider: row for row in rows}


@pytest.mark.parametrize(
    ("prepare", "mode"),
    [
        (transposed_bias, "fwd"),
        (transposed_bias, "fwd+bwd"),
        (wrong_gradient, "fwd+bwd"),
        (not_a_number, "fwd"),
    ],
)
def test_wrong_provider_is_shown_without_a_speed(prepare, mode):
    row = rows_of(Provider("suspect", prepare), mode=mode)["suspect"]
    assert row.status == "wrong"
    assert row.median is None
    assert row.speedup is None
    assert "max" in row.reason


def test_gradient_gate_sees_what_the_forward_gate_cannot():
    assert rows_of(Provider("suspect", wrong_gradient), mode="fwd")["suspect"].status == "ok"


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_right_providers_are_timed(mode):
    rows = rows_of(ours(CASE, "reference"), mode=mode)
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert rows["eager"].speedup == 1.0
    assert all(row.p20 <= row.median <= row.p80 for row in rows.values())


@pytest.mark.parametrize(
    ("prepare", "reason"), [(unavailable, "not on this machine"), (raising, "RuntimeError: no kernel image")]
)
def test_provider_that_cannot_run_is_skipped_with_its_reason(prepare, reason):
    row = rows_of(Provider("absent", prepare))["absent"]
    assert (row.status, row.reason, row.median) == ("skipped", reason, None)


def test_disagreeing_references_stop_the_run():
    def other(**inputs):
        return CASE.eager(**inputs) * 1.001

    with pytest.raises(RuntimeError, match="disagree in float64 on out"):
        runner.run_problem(
            dataclasses.replace(CASE, eager=other), "shape", PROBLEM, 1, "fwd", [], SETTINGS, None
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_threshold_is_the_house_rule(dtype):
    torch.manual_seed(0)
    truth = torch.randn(4096, dtype=torch.float64)
    baseline = truth.to(dtype)
    slack = 4 * torch.finfo(dtype).eps * truth.square().mean().sqrt()
    allowed = 2 * (baseline.double() - truth).square().mean().sqrt() + slack
    inside = truth + 0.5 * allowed * torch.randn_like(truth).sign()
    outside = truth + 1.5 * allowed * torch.randn_like(truth).sign()
    # `got` stays in float64 so that rounding it does not blur the threshold; the dtype under test is given.
    assert gate.check("x", inside, baseline, truth, factor=2, dtype=dtype).rms_error <= allowed
    assert gate.check("x", inside, baseline, truth, factor=2, dtype=dtype).ok
    assert not gate.check("x", outside, baseline, truth, factor=2, dtype=dtype).ok


def test_one_outlier_fails_on_the_largest_error():
    truth = torch.randn(100_000, dtype=torch.float64)
    got = truth.float()
    got[7] += 1e-3
    verdict = gate.check("x", got, truth.float(), truth, factor=2)
    assert not verdict.ok
    assert verdict.share > 1


def test_outputs_may_err_twice_and_gradients_three_times_as_much_as_pytorch():
    truth = torch.randn(4096, dtype=torch.float64)
    baseline = truth + 1e-3

    def passes(name: str, times: float) -> bool:
        got = truth + times * 1e-3
        (verdict,) = gate.check_results({name: got}, {name: baseline}, {name: truth}, {}, torch.float32)
        return verdict.ok

    assert passes("out", 1.99)
    assert not passes("out", 2.01)
    assert passes("q", 2.99)
    assert not passes("q", 3.01)


@pytest.mark.parametrize(("reduced", "ulps"), [(1, 4), (9, 12)])
def test_where_pytorch_does_not_err_a_few_ulp_are_allowed(reduced, ulps):
    truth = torch.ones(4096, dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps

    def passes(error: float) -> bool:
        got = truth + error * ulp
        return gate.check("x", got, truth, truth, factor=2, reduced=reduced, dtype=torch.float32).ok

    assert passes(0.99 * ulps)
    assert not passes(1.01 * ulps)


def test_an_error_everywhere_fails_though_pytorch_has_one_that_is_larger():
    truth = torch.randn(100_000, dtype=torch.float64)
    baseline = truth.float()
    baseline[7] += 1.0
    verdict = gate.check("x", truth + 0.1, baseline, truth, factor=2, dtype=torch.float32)
    assert verdict.max_error < verdict.max_allowed
    assert not verdict.ok
    assert verdict.share > 1


def test_a_result_of_another_shape_is_refused_not_broadcast():
    truth = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 4\); got \(4,\)"):
        gate.check("x", torch.ones(4), truth, truth, factor=2)


def test_nan_is_worse_than_any_error():
    nan, inside, outside = (
        gate.check("x", torch.full((4,), value), torch.ones(4), torch.ones(4).double(), factor=2)
        for value in (float("nan"), 1.0, 9.0)
    )
    for checks in ([nan, inside, outside], [outside, inside, nan]):
        assert gate.worst(checks) is nan
        (pooled,) = gate.pool([[check] for check in checks])
        assert not pooled.ok
        assert pooled.max_error != pooled.max_error
    assert gate.worst([inside, outside]) is outside


def test_float64_is_not_asked_for_more_than_its_digits_hold() -> None:
    """One element far above the rest: 256 ulp of the RMS are less than the distance between two doubles there."""
    truth = torch.zeros(1_000_000, dtype=torch.float64)
    truth[7] = 1.5
    ulp = torch.finfo(torch.float64).eps
    assert 256 * ulp * truth.square().mean().sqrt() < 2 * ulp

    def passes(error: float, dtype: torch.dtype = torch.float64) -> bool:
        got = truth.clone()
        got[7] += error
        return gate.check("x", got, truth, truth, factor=2, dtype=dtype).ok

    assert passes(16 * ulp)
    assert not passes(32 * ulp)
    assert not passes(1e-8), "a rounding to float32"
    assert not passes(1e-8, torch.float32), "the rule of the other dtypes changed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_terms_that_cancel_leave_a_few_ulp_of_the_sum_and_no_more(dtype):
    """As in the gradient of the queries of a single key, which plain PyTorch gives as exactly zero."""
    zeros = torch.zeros(50, dtype=torch.float64)
    ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps

    def passes(error):
        return gate.check("q", zeros + error, zeros, zeros, factor=3.0, dtype=dtype).ok

    assert passes(0.0)
    assert passes(15 * ulp)
    assert not passes(17 * ulp)


def test_the_tests_assertions_raise():
    truth = torch.ones(4, dtype=torch.float64)
    right, wrong = truth.float(), truth.float() + 1e-3
    assert_close_to_truth("x", right, right, truth, factor=FORWARD)
    assert_cancelled("x", right - 1)
    for got, expected, why in (
        (wrong, truth, "exceeds what is allowed"),
        (right / 0, truth, "4 elements are not finite"),
        (right[:1], truth, "against"),
        (right - 1, truth - 1, "nothing is tested"),
    ):
        with pytest.raises(AssertionError, match=why):
            assert_close_to_truth("x", got, expected.float(), expected, factor=FORWARD)
    with pytest.raises(AssertionError, match="exceeds what is allowed"):
        assert_cancelled("x", wrong - 1)


def test_only_a_rare_largest_error_is_judged_over_three_draws():
    """The largest error of one draw of heavy-tailed errors says little; a typical error too large says enough."""
    draws = runner.Draws(CASE, PROBLEM, 2, False, SETTINGS)
    asked = []

    def rare(inputs: Inputs, training: bool):
        """Eager, but for one element of the first draw."""
        asked.append(inputs)

        def function(**tensors):
            out = CASE.eager(**tensors, **inputs.options).clone()
            if inputs is draws[0][0]:
                out.view(-1)[0] += shift
            return out

        return function

    provider = Provider("rare", rare)
    errors = [
        gate.check("out", b["out"], b["out"], t["out"], factor=2)
        for _, t, b in map(draws.__getitem__, range(3))
    ]
    shift = 1.5 * errors[0].max_allowed
    verdict = draws.judge(provider, rare(draws[0][0], False))
    assert len(asked) == 3
    assert verdict.max_allowed == max(check.max_allowed for check in errors)
    assert verdict.max_error >= shift - errors[0].max_error
    asked.clear()
    shift = 1.0  # beyond the rule in its root mean square too
    assert not draws.judge(provider, rare(draws[0][0], False)).ok
    assert len(asked) == 1
