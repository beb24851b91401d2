"""The CUDA kernels of neighborhood attention, run on the host by the twin, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import twin
from neighborhood_twin import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    Inputs,
    Memory,
    Results,
    check,
    line,
    make_inputs,
    run_kernels,
    square,
)

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

GOLDEN_RPB = (-0.2, -0.1, 0.0, 0.1, 0.2)
GOLDEN = {  # the specification's vectors A, B and C: (causal, rpb, grad_lse), then the results
    "A": (
        (False, True, False),
        {
            "out": ".720355 1.407047 .933247 1.704691 2.746178 4.039624 5.568698 7.320040 5.847636 7.584704",
            "lse": "1.201943 1.528390 1.580270 2.155712 2.952265 3.967191 5.197735 6.641311 6.595613 8.258660",
            "grad_q": ".107904 .158128 .102317 .136649 .157983 .167386 .167221 .160252 .114159 .107351",
            "grad_k": "-.034777 -.099431 -.131453 -.205660 -.275622 -.212211 -.291872 -.307337 .733724 .824640",
            "grad_v": ".486933 .381158 .744582 .685177 1.214891 1.299189 .988766 .995592 1.564828 1.638883",
            "grad_rpb": "-.213632 -1.976265 -1.503005 2.892576 .800324",
        },
    ),
    "B": (
        (False, True, True),
        {
            "out": ".720355 1.407047 .933247 1.704691 2.746178 4.039624 5.568698 7.320040 5.847636 7.584704",
            "lse": "1.201943 1.528390 1.580270 2.155712 2.952265 3.967191 5.197735 6.641311 6.595613 8.258660",
            "grad_q": ".321215 .497540 .366348 .523089 .664188 .790572 .904691 1.009549 .873137 .974191",
            "grad_k": ".002488 -.033022 -.027949 -.049468 -.015821 .163407 .204196 .276567 1.837087 2.142515",
            "grad_v": ".486933 .381158 .744582 .685177 1.214891 1.299189 .988766 .995592 1.564828 1.638883",
            "grad_rpb": "-.167099 -1.094454 2.171855 7.485456 1.604242",
        },
    ),
    "C": (
        (True, False, False),
        {
            "out": "0 .100000 .239475 .616525 1.077825 1.892361 2.958662 4.261275 5.787628 7.528177",
            "lse": "0 .100000 .913015 1.337488 2.101518 2.907606 3.930678 5.168046 6.617253 8.276155",
            "grad_q": "0 0 .019221 .036605 .089604 .113119 .125504 .128977 .126031 .118933",
            "grad_k": "-.071935 -.135592 -.154615 -.175959 -.159797 -.134108 -.007886 .014139 .394233 .431520",
            "grad_v": "1.523583 1.444374 .935981 .936897 .854802 .876767 .880908 .903474 .804726 .838488",
        },
    ),
}


@dataclass(frozen=True)
class GoldenCase(Case):
    @property
    def params(self) -> tuple[Any, ...]:
        return *super().params[:-1], 0.1


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("shape", ["line", "row", "column"])
def test_golden_vectors(name: str, shape: str) -> None:
    (causal, with_rpb, with_lse), expected = GOLDEN[name]

    def on_map(value: Any, other: Any) -> tuple[Any, ...]:
        return {"line": (value,), "row": (other, value), "column": (value, other)}[shape]

    case = GoldenCase(
        *(on_map(10, 1), on_map(3, 1), on_map(2, 1), on_map(causal, False)),
        *(1, 1, F64, F64 if with_rpb else None),
    )
    position = torch.arange(10, dtype=F64).view(1, *case.sizes, 1, 1)
    rpb = torch.tensor(GOLDEN_RPB, dtype=F64).view(1, *on_map(5, 1)) if with_rpb else None
    inputs = Inputs(
        {"q": position, "k": position, "v": position**2 / 10, "rpb": rpb},
        torch.ones_like(position),
        torch.ones_like(position[..., 0]) if with_lse else None,
    )
    memory = Memory(case)
    results = run_kernels(case, inputs, memory)
    memory.check()
    for key, numbers in expected.items():
        truth = torch.tensor([float(number) for number in numbers.split()], dtype=F64)
        torch.testing.assert_close(results[key].flatten(), truth, rtol=0, atol=1e-6)


def _cases() -> Iterator[Case]:
    for dtype in (F64, F32, F16, BF16):
        yield square((5, 7), 3, d=24, dv=16, dtype=dtype, rpb=dtype, heads=2)
        yield line(37, 5, 3, d=8, dv=20, dtype=dtype, rpb=dtype)  # groups of 13 and 12
    for dtype in (F32, F16):
        yield square((4, 4), 4, dtype=dtype, rpb=dtype, batch=2)  # one small tile, even kernel
        yield square((6, 8), 3, 2, dtype=dtype, rpb=dtype, batch=2)  # groups that are one small tile
        yield square((7, 7), 7, dtype=dtype, rpb=dtype, heads=2)  # one large tile
        yield square((14, 15), 7, 2, dtype=dtype, rpb=dtype)  # groups that are one large tile
        yield square((11, 13), 4, 2, dtype=dtype, rpb=dtype)  # groups of four sizes, even kernel
        yield square((10, 9), 6, dtype=dtype, rpb=dtype, heads=1)
        yield Case((13, 5), (5, 2), (2, 1), (True, False), dtype=dtype)
        yield Case((9, 11), (4, 3), (2, 3), (False, True), dtype=dtype)
        yield Case((6, 12), (3, 6), (2, 2), (True, True), dtype=dtype)
        yield Case((17, 1), (6, 1), (2, 1), dtype=dtype, rpb=dtype)
        yield Case((3, 29), (1, 5), (3, 1), dtype=dtype, rpb=dtype)
        yield line(70, 64, dtype=dtype)
        yield line(67, 67, causal=True, dtype=dtype)
        yield line(40, 3, 13, dtype=dtype, rpb=dtype)
        yield line(1, 1, dtype=dtype, rpb=dtype)
        yield square((9, 9), 3, d=8, dv=72, dtype=dtype, rpb=dtype)
        yield square((9, 9), 5, d=100, dv=40, dtype=dtype)
        yield square((12, 6), 5, d=3, dv=7, dtype=dtype, rpb=dtype)  # nothing is a multiple of anything
    yield square((9, 8), 5, d=128, dv=128, dtype=BF16)  # the widest accumulators
    yield square((9, 8), 5, d=256, dv=136, dtype=F16, rpb=F16, heads=1, batch=1)  # gradients in two passes
    yield square((9, 4), 3, d=136, dv=250, dtype=BF16, heads=1, batch=1)
    yield square((6, 5), 3, d=200, dv=256, dtype=F32, rpb=F32, heads=1, batch=1)
    yield square(
        (8, 8), 4, 2, d=144, dv=200, dtype=F16, rpb=F16, heads=1, batch=1
    )  # groups in one small tile
    yield square((16, 14), 7, d=32, dv=32, dtype=BF16, rpb=BF16)
    # Several tiles whose shared memory, with that of the table's gradient, has no room to fetch ahead.
    yield square((9, 9), 5, d=64, dv=48, dtype=F16, rpb=F16)
    yield line(576, 575, d=8, dv=8, dtype=F16)  # more tiles of keys than a tile of queries keeps the codes of
    yield square((24, 24), 3, d=8, dv=8, dtype=F16)  # the first tile of keys has none that some queries see
    yield square((7, 9), 3, d=20, dv=100, dtype=F64, rpb=F64)  # values in two passes
    yield square((9, 8), 3, dtype=F16, rpb=F32)
    yield line(24, 8, 3, dtype=BF16, rpb=F32)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "cropped"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [line(19, 4, 2), square((7, 9), 3), square((6, 7), 3, 2)], ids=str)
def test_reads_and_writes_any_strides(case: Case, dtype: torch.dtype, layout: str) -> None:
    check(replace(case, d=24, dv=8, dtype=dtype, rpb=dtype, batch=2, heads=2, layout=layout))


@pytest.mark.parametrize("case", [square((4, 4), 3), square((6, 5), 5), square((9, 9), 3)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"grad_out": False},
        {"grad_lse": False},
        {"missing": ("q",)},
        {"missing": ("k", "v")},
        {"missing": ("q", "k", "v")},
        {"missing": ("v", "rpb")},
        {"missing": ("q", "k", "rpb")},
        {"missing": ("q", "rpb"), "grad_lse": False},
    ],
    ids=str,
)
def test_absent_gradients(case: Case, change: dict[str, Any]) -> None:
    check(replace(case, d=8, dtype=BF16, rpb=BF16, **change))


def assert_no_schedule_changes_a_bit(case: Case) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    first: Results = {}
    for seed in twin.SEEDS:
        twin.load().set_seed(seed)
        results = run_kernels(case, inputs, Memory(case))
        first = first or results
        for name, tensor in first.items():
            assert torch.equal(results[name], tensor), f"{name}, seed {seed}"
    memory.check()


@pytest.mark.parametrize(
    "case",
    [
        square((6, 6), 3, 2, rpb=F16, heads=2),  # groups in one small tile
        square((5, 5), 5, rpb=F16),  # in one large tile
        square((9, 9), 3, rpb=F16),  # several tiles; keys and values in one pass
        square((9, 8), 5, dv=72, dtype=BF16, rpb=BF16),  # ... and in two
        square((9, 9), 4, d=8, dv=8, dtype=F32, rpb=F32),
        square((5, 9), 3, d=136, dv=144, rpb=F16, heads=1, batch=1),  # in passes over small tiles
        line(20, 3, 2, dtype=F64, rpb=F64),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    assert_no_schedule_changes_a_bit(case)


def test_walks_over_chunks_of_the_batch() -> None:
    """More maps than work items: groups of threads take several in turn, and their partial sums meet."""
    check(line(2, 2, dtype=F16, rpb=F16, d=8, dv=8, batch=4099))
    check(line(18, 3, dtype=F16, rpb=F16, d=8, dv=8, batch=1027))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (square((2, 2), 2, d=16, dv=257), "at most 256, got 16 and 257"),
        (line(70000, 70000, d=1, dv=1), "a map of 1 x 70000 tokens with a kernel of 1 x 70000 is too large"),
        (square((48, 48), 48, rpb=F16), "a tile needs [0-9]+ bytes of shared memory"),
    ],
    ids=["channels", "box", "table"],
)
def test_too_large_is_refused(case: Case, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_kernels(case, make_inputs(case, Memory(case)), Memory(case))


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over each engine and each owner of the backward."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_neighborhood_attention_cuda as tests\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    for size, kernel, dilation in ((4, 2, 2), (8, 3, 2), (9, 3, 1)):\n"
        "        case = tests.square((size, size), kernel, dilation, d=16, dv=24, dtype=dtype, rpb=dtype)\n"
        "        tests.check(tests.replace(case, layout='cropped'))\n"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
