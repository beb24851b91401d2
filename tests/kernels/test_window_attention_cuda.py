"""The CUDA kernels of window attention, run on the host by the twin, against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import attention_calls
import pytest
import torch
import twin
from attention_calls import Inputs, Results, accumulate, run
from far import far
from guarded import Guarded
from tolerance import GRADIENT, assert_close_to_truth

from vitkernels.bench.cases.window_attention import table_entries, table_terms
from vitkernels.core.native import arguments
from vitkernels.kernels.window_attention import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAMES = ("q", "k", "v", "bias_table")

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))


@dataclass(frozen=True)
class Case:
    window: tuple[int, int] = (7, 7)
    d: int = 16
    dv: int = 32
    dtype: torch.dtype = F16
    bias: str | None = "absolute"
    bias_dtype: torch.dtype | None = None
    batch: int = 2
    heads: int = 2
    layout: str = "dense"
    results: str | None = None  # their layout, where it is another
    grad_out: bool = True
    grad_lse: bool = True
    missing: tuple[str, ...] = ()  # gradients that are not wanted

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.window[0]}x{self.window[1]}-d{self.d}-dv{self.dv}-{dtype}-{self.bias}-{self.layout}"
        return (
            name + ("" if self.bias_dtype is None else "-wide") + (f"-{self.results}" if self.results else "")
        )

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def params(self) -> tuple[Any, ...]:
        return *self.window, self.bias == "signed", self.d**-0.5


def make_inputs(case: Case, guarded: Guarded) -> Inputs:
    rows = (case.batch, case.heads, case.tokens)
    entries = table_entries(case.window, case.bias)
    tensors = {
        "q": guarded.random((*rows, case.d), case.dtype, case.layout),
        "k": guarded.random((*rows, case.d), case.dtype, case.layout),
        "v": guarded.random((*rows, case.dv), case.dtype, case.layout),
        "bias_table": None
        if case.bias is None
        else guarded.random((case.heads, entries), case.bias_dtype or case.dtype),
    }
    return Inputs(
        tensors,
        guarded.random((*rows, case.dv), case.dtype, case.layout) if case.grad_out else None,
        guarded.random(rows, accumulate(case.dtype)) if case.grad_lse else None,
    )


def run_kernels(case: Case, inputs: Inputs, guarded: Guarded) -> Results:
    rows, layout = (case.batch, case.heads, case.tokens), case.results or case.layout
    into = guarded((*rows, case.dv), case.dtype, layout), guarded(rows, accumulate(case.dtype))
    empty = partial(guarded, layout=layout)
    where = {"module": twin.load(), "cuda": True}
    return run(native, inputs, case.params, into, empty, case.missing, **where)


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> Results:
    return attention_calls.run_reference(reference, inputs, case.params, dtype, case.missing)


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, guarded)
    guarded.check()
    compare(case, inputs, got)


def compare(case: Case, inputs: Inputs, got: Results) -> None:
    """Holds results to the reference in float64, by the house rule."""
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    assert set(got) == set(truth)
    reduced = {"grad_bias_table": table_terms(case.batch, case.window, case.bias)}
    attention_calls.compare(case, got, baseline, truth, case.dtype, reduced)


def _cases() -> Iterator[Case]:
    for dtype in (F64, F32, F16, BF16):
        for bias in ("absolute", "signed", None):
            yield Case((3, 5), 24, 16, dtype, bias)  # one small tile
            yield Case((7, 5), 16, 24, dtype, bias, batch=1)  # one large tile, dv no multiple of 16
    for dtype in (F32, F16):
        yield Case((1, 1), 16, 16, dtype)
        yield Case((4, 4), 16, 112, dtype, heads=1, batch=5)  # more windows than a block holds
        yield Case((7, 7), 16, 64, dtype, heads=1)
        yield Case((8, 8), 32, 32, dtype, "signed", batch=1)
        yield Case((12, 12), 32, 32, dtype, "signed", batch=1, heads=1)  # several tiles
        yield Case((9, 8), 24, 80, dtype, batch=1, heads=1)
    yield Case((7, 7), 16, 96, BF16, heads=1)
    yield Case((9, 8), 96, 128, BF16, batch=1, heads=1)  # the widest accumulators
    yield Case((5, 4), 16, 100, F64, batch=1, heads=1)  # values in two passes, several small tiles
    yield Case((7, 7), 100, 128, F32, batch=1, heads=1)  # too wide for large tiles in fp32
    yield Case((4, 5), 200, 256, F32, batch=1, heads=1)  # gradients in two passes
    yield Case((7, 7), 256, 144, F16, "signed", batch=1, heads=1)
    yield Case((4, 4), 136, 250, BF16, batch=1, heads=1)
    yield Case((7, 7), 3, 7, F16, batch=1, heads=1)  # nothing is a multiple of anything
    yield Case((7, 7), 16, 32, F16, bias_dtype=F32)
    yield Case((4, 4), 16, 48, BF16, "signed", bias_dtype=F32)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("window", [(4, 4), (7, 7)], ids=str)
def test_rounding_of_lse_does_not_scale_the_weights(window: tuple[int, int]) -> None:
    # lse is as large as the logits, and so is its rounding, a common factor of the weights that are made with it.
    torch.manual_seed(0)
    guarded, case = Guarded(), Case(window, dtype=F32, batch=4)
    inputs = make_inputs(case, guarded)
    inputs.tensors["bias_table"].mul_(10)
    compare(case, inputs, run_kernels(case, inputs, guarded))


@pytest.mark.parametrize(
    "case",
    [
        *(Case(window, dtype=dtype) for window in ((4, 3), (7, 7), (9, 8)) for dtype in (F64, F32, F16)),
        Case((9, 8), dv=80),
    ],
    ids=str,
)
def test_slots_without_a_query_take_no_part(case: Case) -> None:
    # Their gradients are zero, and a weight that overflowed there would make them NaN.
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    inputs.tensors["bias_table"].add_(1000)
    for name, result in run_kernels(case, inputs, guarded).items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("layout", ["offset", "packed", "nchw", "every_second"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("window", [(4, 4), (7, 7)], ids=str)
def test_reads_and_writes_any_strides(window: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    check(Case(window, 16, 40, dtype, layout=layout))


@pytest.mark.parametrize(("batch", "heads"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("window", [(4, 4), (7, 7), (9, 8)], ids=str)
def test_batch_entries_and_heads_need_not_be_aligned(window: tuple[int, int], batch: int, heads: int) -> None:
    # Tokens and the first element are; other batch entries or heads begin between two multiples of 16 bytes.
    check(Case(window, batch=batch, heads=heads, layout="tokens_outermost"))


@pytest.mark.parametrize(
    "case", [Case(d=136, dv=144, dtype=F32), Case(d=136, dv=144), Case(d=16, dv=100, dtype=F64)], ids=str
)
def test_further_passes_over_channels_begin_at_the_channel_stride(case: Case) -> None:
    # Values and gradients from channel 128 on, in float64 values from 64 on.
    check(replace(case, window=(4, 5), batch=1, heads=1, layout="nchw"))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "tokens"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_offsets_of_64_bits(dtype: torch.dtype, dim: int) -> None:
    case = Case((1, 3), 16, 16, dtype, batch=3, heads=3)
    inputs = make_inputs(case, Guarded())
    expected = run_kernels(case, inputs, Guarded())

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return far(tensor, dim) if tensor.ndim == 4 else tensor

    assert inputs.grad_out is not None
    tensors = {name: apart(tensor) for name, tensor in inputs.tensors.items()}
    got = run(
        native,
        Inputs(tensors, apart(inputs.grad_out), inputs.grad_lse),
        case.params,
        (apart(torch.zeros_like(expected["out"])), torch.zeros_like(expected["lse"])),
        lambda shape, dtype: apart(torch.zeros(shape, dtype=dtype)),
        module=twin.load(),
        cuda=True,
    )
    for name, result in got.items():
        # Without copies of 16 bytes the same numbers meet in the same order.
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("window", [(3, 3), (5, 4), (9, 8)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"grad_out": False},
        {"grad_lse": False},
        {"missing": ("q",)},
        {"missing": ("k", "v")},
        {"missing": ("q", "k", "v")},
        {"missing": ("v", "bias_table")},
        {"missing": ("q", "k", "bias_table")},
        {"missing": ("q", "bias_table"), "grad_lse": False},
    ],
    ids=str,
)
def test_absent_gradients(window: tuple[int, int], change: dict[str, Any]) -> None:
    check(replace(Case(window, 8, 16, BF16, batch=1, heads=1), **change))


@pytest.mark.parametrize(
    "case", [Case((9, 8), dtype=F32), Case((5, 4), dtype=F64), Case((9, 8), dv=80)], ids=str
)
def test_the_tables_gradient_without_that_of_q(case: Case) -> None:
    # Several tiles: both come from the queries' side, which must run for either.
    check(replace(case, missing=("q",)))


def assert_no_schedule_changes_a_bit(case: Case, seeds: Sequence[int]) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    first: dict[str, torch.Tensor] = {}
    for seed in seeds:
        twin.load().set_seed(seed)
        results = run_kernels(case, inputs, Guarded())
        first = first or results
        for name, tensor in first.items():
            assert torch.equal(results[name], tensor), f"{name}, seed {seed}"
    guarded.check()


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 5), dtype=F16, batch=1),
        Case((3, 3), dtype=F32, batch=1),
        Case((9, 8), 16, 16, F16, batch=1),  # two tiles; keys and values in one pass
        Case((9, 8), 16, 80, BF16, batch=1, heads=1),  # ... and in two
        Case((12, 12), 16, 32, F32, batch=1, heads=1),
        Case((12, 12), 48, 64, F32, "signed", batch=1, heads=1),  # small tiles
        Case((5, 4), 16, 24, F64, batch=1, heads=1),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    assert_no_schedule_changes_a_bit(case, twin.SEEDS)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2), 8, 8, F32, batch=2, heads=2049),  # tiles of one warp
        Case((1, 17), 8, 8, F16, batch=2, heads=1025),  # of four
        pytest.param(Case((1, 17), 8, 8, F32, batch=2, heads=1025), marks=pytest.mark.thorough),
        # The next window's values then come over the results by other threads than those that store these.
        Case((1, 2), 16, 32, F32, batch=2, heads=2049, results="nchw"),
        Case((1, 17), 16, 32, F16, batch=2, heads=1025, results="nchw"),
    ],
    ids=str,
)
def test_no_schedule_changes_a_walk_over_windows(case: Case) -> None:
    """More heads than work items: groups take two windows in turn, and the first must not meet the second.

    As many times the same head gives what that head gives alone, where no group takes two windows.
    """
    one = replace(case, heads=1)
    inputs = make_inputs(one, Guarded())
    expected = run_kernels(one, inputs, Guarded())

    def repeat(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return (
            tensor.expand(case.heads, -1)
            if tensor.ndim == 2
            else tensor.expand(-1, case.heads, *tensor.shape[2:])
        )

    tensors = {name: repeat(tensor) for name, tensor in inputs.tensors.items()}
    repeated = Inputs(tensors, repeat(inputs.grad_out), repeat(inputs.grad_lse))
    for seed in twin.SEEDS[1 : max(2, len(twin.SEEDS) // 8)]:
        twin.load().set_seed(seed)
        got = run_kernels(case, repeated, Guarded())
        # The two windows of a head meet in its table: in a reduction here, and in the group's own sum there.
        table = got.pop("grad_bias_table")
        compare(one, inputs, expected | {"grad_bias_table": table[:1]})
        assert torch.equal(table, table[:1].expand_as(table)), f"grad_bias_table, seed {seed}"
        for name, tensor in got.items():
            assert torch.equal(tensor, repeat(expected[name])), f"{name}, seed {seed}"


def test_chunks_of_windows_sum_the_table_gradient() -> None:
    """More windows than work items: groups walk over chunks, and partial sums meet in the reduction."""
    check(Case((1, 2), 16, 16, F16, "signed", batch=4099, heads=1))


def test_workspace_is_sized_for_the_tiles_that_run() -> None:
    """Without its table this window would fit large tiles; the workspace was once sized for those."""
    case = Case((12, 12), 48, 64, F32, batch=1, heads=1)
    small_tiles, entries = 144 // 16, 23 * 23
    module, inputs = twin.load(), make_inputs(case, Guarded())
    table = torch.empty(1, 144)
    q, k, v = (inputs.tensors[name] for name in "qkv")
    for wanted, size in ((table, small_tiles * entries * 4), (None, 0)):
        tensors = arguments(module, wanted, q, k, v, table)
        assert module.window_attention_workspace_cuda(*tensors, 12, 12, False, 48**-0.5) == size
    check(case)


def test_a_wrong_table_index_is_noticed() -> None:
    """The tolerance has teeth: bias entries of the transposed window are rejected."""
    case = Case((5, 7), dtype=F16)
    inputs = make_inputs(case, Guarded())
    got = run_reference(replace(case, window=(7, 5)), inputs, None)
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    for name in ("out", "lse", "grad_q", "grad_bias_table"):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(name, got[name], baseline[name], truth[name], factor=GRADIENT)


def test_too_wide_is_refused() -> None:
    case = Case((2, 2), 16, 257, F16)
    with pytest.raises(RuntimeError, match="at most 256, got 16 and 257"):
        run_kernels(case, make_inputs(case, Guarded()), Guarded())


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over each engine and each owner of the backward."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_window_attention_cuda as tests\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    for window in ((3, 3), (5, 4), (9, 8)):\n"
        "        tests.check(tests.Case(window, 16, 24, dtype, layout='nchw', batch=1, heads=1))\n"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
