from __future__ import annotations

import collections
import time

import pytest
import torch

from vitkernels.bench import runner, timing
from vitkernels.bench.case import Cost, Inputs
from vitkernels.bench.peaks import Peaks, measure_copy, measure_exp, measure_gemm, measured_peaks


def test_percentiles_interpolate():
    values = [float(v) for v in range(1, 12)]
    assert timing.percentile(values, 0.5) == 6
    assert timing.percentile(values, 0.2) == 3
    assert timing.percentile([1.0, 2.0], 0.5) == 1.5
    assert timing.percentile([3.0], 0.8) == 3


def test_a_summary_has_each_statistic_in_its_place():
    timing_of_rounds = timing.summarize([float(v) for v in (11, *range(1, 11))])
    assert timing_of_rounds == timing.Timing(median=6.0, p20=3.0, p80=9.0, best=1.0, samples=11)
    assert timing_of_rounds.each(2) == timing.Timing(median=3.0, p20=1.5, p80=4.5, best=0.5, samples=11)


def test_other_work_is_told_from_a_quiet_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 9.0, 9.0))
    assert timing.busy() == ""
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0.0, 0.0))
    assert "load 2.1 on 4 cores" in timing.busy()


def test_time_in_a_graph_is_without_flushes_and_for_one_call(monkeypatch):
    timer = object.__new__(timing.CudaTimer)
    timer.repeats = 8
    graph = type("Graph", (), {"replay": lambda self: None})
    monkeypatch.setattr(timer, "capture", lambda step: graph(), raising=False)
    samples = {"": [2.0, 2.0, 9.0], "x": [10.0, 18.0, 26.0], "none": [1.0, 1.0, 1.0]}
    monkeypatch.setattr(timer, "_rounds", lambda *_: dict(samples), raising=False)
    timings, failed = timer.time_graphs({"x": lambda: None, "none": lambda: None})
    assert not failed
    assert (timings["x"].best, timings["x"].median) == (1.0, 2.0)
    assert timings["none"].median == 0.0


def test_geometric_mean():
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_cpu_times_are_per_call_and_in_proportion():
    steps = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}
    measured = timing.time_on_cpu(steps, seconds=0.06, rounds=6)
    assert measured["short"].best >= 0.001
    assert measured["long"].best >= 0.004
    assert measured["short"].best < measured["long"].best
    assert measured["short"].samples == measured["long"].samples >= timing.MIN_ROUNDS


def test_providers_take_turns_in_changing_order():
    order = []
    steps = {name: (lambda name=name: (order.append(name), time.sleep(0.002))) for name in "abc"}
    timing.time_on_cpu(steps, seconds=0.001, rounds=6)
    turns = "".join(order)
    assert "aabbcc" in turns
    assert "bbccaa" in turns


@pytest.mark.parametrize("names", ["ab", "abc", "abcdef"])
def test_nobody_always_runs_behind_the_same_neighbour(names):
    """Turns that only rotated kept the order: in all rounds but one everybody had the same one before it."""
    orders = [timing._order(list(names), turn) for turn in range(2 * len(names))]
    for name in names:
        before = collections.Counter(order[order.index(name) - 1] for order in orders if order[0] != name)
        assert len(before) == min(2, len(names) - 1)
        assert max(before.values()) == min(before.values())
        assert len({order.index(name) for order in orders}) == len(names)


def test_slow_machine_ends_the_rounds_early():
    begin = time.perf_counter()
    measured = timing.time_on_cpu({"x": lambda: time.sleep(0.02)}, seconds=0.01, rounds=1000)
    assert time.perf_counter() - begin < 2
    assert measured["x"].samples >= timing.MIN_ROUNDS


def test_floor_is_the_slowest_resource():
    peaks = Peaks("x", 1, "x", {"1000": 100.0, "1000000": 10.0}, {"float32": 50.0}, 5.0)
    assert peaks.floor(Cost(flops=50, bytes=500, exps=1), torch.float32) == (5.0, "memory")
    assert peaks.floor(Cost(flops=500, bytes=500, exps=1), torch.float32) == (10.0, "matrix")
    assert peaks.floor(Cost(flops=50, bytes=500, exps=100), torch.float32) == (20.0, "exp")
    # A working set beyond the small cache moves at the rate of the larger one, and nothing beats the best.
    assert peaks.bandwidth(1000) == 100.0
    assert peaks.bandwidth(5000) == 10.0
    assert peaks.bandwidth(1e9) == 10.0


def test_a_slow_product_of_16_bit_numbers_is_no_peak(tmp_path, monkeypatch):
    peaks = Peaks("x", 1, "x", {"1000": 1e9}, {"float16": 2.0, "float32": 50.0, "float64": 25.0}, 5.0)
    cost = Cost(flops=100, bytes=1, exps=0)
    assert peaks.floor(cost, torch.float16) == (2.0, "matrix")
    assert peaks.floor(cost, torch.float64) == (4.0, "matrix")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("vitkernels.bench.peaks.CPU_COPY_BYTES", (1 << 20,))
    monkeypatch.setattr("vitkernels.bench.peaks.measure_gemm", lambda device, dtype, _: dtype.itemsize)
    found = measured_peaks(torch.device("cpu"), (torch.bfloat16,), seconds=0.01)
    assert found.gemm == {"bfloat16": 2, "float32": 4}


def test_rates_count_what_a_step_moves_and_computes(monkeypatch):
    """A copy reads as much as it writes, and a product of matrices multiplies and adds."""
    device = torch.device("cpu")
    steps = []
    monkeypatch.setattr("vitkernels.bench.peaks.CPU_COPY_BYTES", (1 << 20, 2 << 20))
    monkeypatch.setattr("vitkernels.bench.peaks._best_seconds", lambda step, *_: (steps.append(step), 0.5)[1])
    assert measure_copy(device, 0.0) == {str(1 << 20): 2 << 20, str(2 << 20): 4 << 20}
    assert steps[0]().nbytes == 1 << 19
    assert measure_gemm(device, torch.float32, 0.0) == 2 * 2 * 1024**3
    assert steps[-1]().shape == (1024, 1024)
    rate = measure_exp(device, 0.0)
    assert steps[-1]().numel() == rate / 2


def test_peaks_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("vitkernels.bench.peaks.CPU_COPY_BYTES", (1 << 20,))
    device = torch.device("cpu")
    monkeypatch.setattr("vitkernels.bench.peaks.busy", lambda: "somebody else is")
    first = measured_peaks(device, (torch.float32,), seconds=0.01)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("vitkernels.bench.peaks.busy", lambda: "")
    first = measured_peaks(device, (torch.float32,), seconds=0.01)
    assert 1e6 < first.bandwidth(1 << 20) < 1e13
    assert 1e6 < first.gemm["float32"] < 1e15
    assert first.exp > 1e4
    monkeypatch.setattr("vitkernels.bench.peaks.measure_copy", lambda *_: pytest.fail("measured again"))
    assert measured_peaks(device, (torch.float32,), seconds=0.01) == first
    (file,) = (tmp_path / "vitkernels").iterdir()
    file.write_text("{broken")
    monkeypatch.setattr("vitkernels.bench.peaks.measure_copy", lambda *_: {"1": 7.0})
    assert measured_peaks(device, (torch.float32,), seconds=0.01).copy == {"1": 7.0}


def test_missing_exponential_rate_is_measured_once_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("vitkernels.bench.peaks.CPU_COPY_BYTES", (1 << 20,))
    monkeypatch.setattr("vitkernels.bench.peaks.busy", lambda: "")
    for rate in (None, 3.0, 3.0):
        monkeypatch.setattr("vitkernels.bench.peaks.measure_exp", lambda *_, rate=rate: rate)
        assert measured_peaks(torch.device("cpu"), (torch.float32,), seconds=0.01).exp == rate
    monkeypatch.setattr("vitkernels.bench.peaks.measure_exp", lambda *_: pytest.fail("measured again"))
    assert measured_peaks(torch.device("cpu"), (torch.float32,), seconds=0.01).exp == 3.0


@pytest.mark.gpu
def test_cuda_timer_flushes_and_times_device_work():
    device = torch.device("cuda")
    timer = timing.CudaTimer(device)
    small, large = (torch.randn(n, device=device) for n in (1 << 20, 1 << 26))
    steps = {"small": lambda: small * 2, "large": lambda: large * 2}
    calls = timer.time_calls(steps, rounds=10)
    graphs, failed = timer.time_graphs(steps, rounds=10)
    assert not failed
    for measured in (calls, graphs):
        assert 0 < measured["small"].median < measured["large"].median
    # 512 MB cannot move faster than any GPU's memory does.
    assert graphs["large"].median > 2 * large.nbytes / 20e12


@pytest.mark.gpu
def test_cuda_step_that_synchronizes_is_reported_not_timed():
    x = torch.ones(4, device="cuda")
    timings, failed = timing.CudaTimer(x.device).time_graphs(
        {"item": lambda: x.sum().item(), "ok": lambda: x + 1}
    )
    assert set(timings) == {"ok"}
    assert set(failed) == {"item"}


@pytest.mark.parametrize("calls", [1, 3])
def test_calls_share_one_backward_and_none_of_their_tensors(calls):
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", x.data_ptr()))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", grad.data_ptr()))
            return 2 * grad

    x, grad = torch.ones(3), torch.ones(3)
    step = runner.make_step(lambda x: Double.apply(x), Inputs({"x": x}, {}, grad), training=True, calls=calls)
    gradients = step()
    assert [kind for kind, _ in seen] == ["forward"] * calls + ["backward"] * calls
    assert len(gradients) == calls  # nothing is summed into one leaf
    assert all(torch.equal(g, 2 * grad) for g in gradients)


def test_a_row_has_its_rates_and_its_share_of_the_floor():
    row = runner.Row("op", "p", "s", "1", 1, "float32", "cpu", "fwd", "mine", True, median=4.0)
    machine = Peaks("x", 1, "x", {"1000": 10.0}, {"float32": 50.0}, 5.0)
    runner.add_cost(row, Cost(flops=80, bytes=20, exps=1), torch.float32, machine)
    assert (row.flops_per_second, row.bytes_per_second) == (20.0, 5.0)
    assert (row.floor, row.bound, row.floor_share) == (2.0, "memory", 0.5)


def test_a_summary_is_of_the_timed_rows_of_one_provider_and_method():
    def row(provider, speedup, status="ok", method="wall"):
        return runner.Row(
            *("op", "p", "s", "1", 1, "float32", "cpu", "fwd", provider, True, status),
            method=method, speedup=speedup, floor_share=0.5,
        )  # fmt: skip

    rows = [row("a", 2.0), row("a", 8.0), row("a", 9.0, "wrong"), row("a", None), row("b", 3.0)]
    found = {
        (s["provider"], s["method"]): (s["speedup"], s["count"])
        for s in runner.summarize([*rows, row("a", 5.0, method="graph")])
    }
    expected = {("a", "wall"): (4.0, 2), ("b", "wall"): (3.0, 1), ("a", "graph"): (5.0, 1)}
    assert found == {key: (pytest.approx(speedup), count) for key, (speedup, count) in expected.items()}


def test_short_calls_share_a_backward_and_are_timed_one_by_one():
    settings = runner.Settings(torch.device("cpu"), torch.float32)
    assert runner.calls_to_share(lambda: None, settings, training=True) == runner.SHARING_CALLS
    assert runner.calls_to_share(lambda: None, settings, training=False) == 1
    assert runner.calls_to_share(lambda: time.sleep(0.002), settings, training=True) == 1

    row = runner.Row("op", "p", "s", "1", 1, "float32", "cpu", "fwd+bwd", "mine", True, calls=8)
    timed = runner.record(row, "wall", timing.summarize([0.8]), timing.summarize([1.6]))
    assert timed.median == pytest.approx(0.1)
    assert timed.speedup == pytest.approx(2.0)
