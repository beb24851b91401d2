"""The CUDA kernels of polyline path attention, run on the host by the twin, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import twin
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

import vitkernels.kernels.polyline_path_attention as declaration
from vitkernels.kernels.polyline_path_attention import native, reference

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAMES = ("q", "k", "v", "log_decay_w", "log_decay_h")

Results = dict[str, torch.Tensor]

# How [batch, height, width, heads, channels] lies in memory; "cropped" is a map inside a larger one.
LAYOUTS = {
    "packed": Layout((0, 1, 2, 3, 4), padding=16),
    "heads_first": Layout((0, 3, 1, 2, 4), before=65),
    "columns_first": Layout((2, 0, 1, 3, 4), padding=1, before=37),
}
DECAYS = {"dense": Layout((0, 1, 2, 3)), "strided": Layout((3, 0, 2, 1), step=2, before=65)}


@dataclass(frozen=True)
class Case:
    height: int = 5
    width: int = 7
    criss_cross: bool = False
    d: int = 16
    dv: int = 16
    dtype: torch.dtype = F16
    decay: torch.dtype | None = None  # None: dtype
    strength: float = 1.0
    batch: int = 1
    heads: int = 1
    layout: str = "dense"
    missing: tuple[str, ...] = ()  # gradients that are not wanted

    def __str__(self) -> str:
        mode = "cross" if self.criss_cross else "whole"
        wide = "" if self.decay in (None, self.dtype) else "wide-decay"
        strength = "" if self.strength == 1 else f"strength{self.strength:g}"
        what = f"{self.height}x{self.width}-d{self.d}-dv{self.dv}-{str(self.dtype).removeprefix('torch.')}"
        return "-".join(filter(None, (mode, what, wide, strength, self.layout, *self.missing)))

    @property
    def params(self) -> tuple[bool, float]:
        return self.criss_cross, self.d**-0.5

    @property
    def accumulate(self) -> torch.dtype:
        return F64 if self.dtype == F64 else F32


@dataclass
class Memory:
    """Tensors between guard bands, in the case's layout."""

    case: Case
    guarded: Guarded = field(default_factory=Guarded)
    surroundings: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def map(self, channels: int) -> torch.Tensor:
        case = self.case
        shape = (case.batch, case.height, case.width, case.heads, channels)
        if case.layout != "cropped":
            return self.guarded(shape, case.dtype, LAYOUTS.get(case.layout, Layout((0, 1, 2, 3, 4))))
        larger = self.guarded((case.batch, case.height + 3, case.width + 3, *shape[3:]), case.dtype)
        crop = (slice(None), slice(2, 2 + case.height), slice(2, 2 + case.width))
        outside = torch.ones_like(larger, dtype=torch.bool)
        outside[crop] = False
        self.surroundings.append((larger, outside))
        return larger[crop]

    def decay(self) -> torch.Tensor:
        case = self.case
        layout = DECAYS["dense" if case.layout == "dense" else "strided"]
        shape = (case.batch, case.height, case.width, case.heads)
        return self.guarded(shape, case.decay or case.dtype, layout)

    def by_products(self) -> tuple[torch.Tensor, ...]:
        case, guarded = self.case, self.guarded
        pair = (2, case.batch, case.heads, case.height, case.width)
        products = 3 if case.criss_cross else 1
        partial = (products, case.batch, case.height, case.width, case.heads * case.dv)
        return (
            guarded((case.batch, case.height, case.width, case.heads, case.dv), case.dtype),
            guarded(pair, case.accumulate),
            guarded(pair, case.accumulate),
            guarded(partial, case.dtype),
        )

    def check(self) -> None:
        self.guarded.check()
        for larger, outside in self.surroundings:
            assert larger[outside].isnan().all(), "a kernel wrote outside a map"


@dataclass
class Inputs:
    tensors: list[torch.Tensor]
    grad_out: torch.Tensor


def make_inputs(case: Case, memory: Memory) -> Inputs:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.randn(tensor.shape, dtype=torch.promote_types(tensor.dtype, F32)))

    tensors = [fill(memory.map(width)) for width in (case.d, case.d, case.dv)]
    tensors += [memory.decay().copy_(-case.strength * torch.rand(tensors[0].shape[:-1])) for _ in "wh"]
    return Inputs(tensors, fill(memory.map(case.dv)))


def run_kernels(case: Case, inputs: Inputs, memory: Memory) -> Results:
    module = twin.load()
    by_products = memory.by_products()
    native.forward(*by_products, *inputs.tensors, *case.params, module=module, cuda=True)
    like = (*(memory.map(width) for width in (case.d, case.d, case.dv)), memory.decay(), memory.decay())
    grads = [None if name in case.missing else tensor for name, tensor in zip(NAMES, like, strict=True)]
    native.backward(
        *(*grads, inputs.grad_out, None, None, None, *by_products, *inputs.tensors, *case.params),
        module=module,
        cuda=True,
    )
    wanted = {f"grad_{name}": grad for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
    return {"out": by_products[0], "lse": by_products[1], "cum": by_products[2], **wanted}


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> Results:
    leaves = [tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_() for tensor in inputs.tensors]
    (out,) = reference.forward(*leaves, *case.params)
    out.backward(inputs.grad_out.to(out.dtype))
    q, k, _, *decays = (leaf.detach() for leaf in leaves)
    first, second = (x.logsumexp(-1) for x in reference.logits(q, k, *decays, *case.params))
    if case.criss_cross:
        second = second.transpose(-1, -2)
    lse = torch.stack([x.reshape(case.batch, case.heads, case.height, case.width) for x in (first, second)])
    results = {"out": out.detach(), "lse": lse, "cum": reference.cumulative(*decays)}
    for name, leaf in zip(NAMES, leaves, strict=True):
        if name not in case.missing:
            assert leaf.grad is not None
            results[f"grad_{name}"] = leaf.grad
    return results


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, memory)
    memory.check()
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    for name, grad in got.items():
        if name == "grad_log_decay_w":
            assert not grad[:, :, 0].any(), "the first column's decays have no influence"
        if name == "grad_log_decay_h":
            assert not grad[:, 0].any(), "the first row's decays have no influence"
    assert torch.equal(got["cum"], truth["cum"].to(case.accumulate)), "sums are rounded once"
    for name, expected in truth.items():
        if not expected.any():
            assert not got[name].any(), f"{name} must be zero"
            continue
        in_line = case.height * case.width if not case.criss_cross else max(case.height, case.width)
        assert_close_to_truth(
            f"{case} {name}",
            got[name],
            baseline[name],
            expected,
            factor=GRADIENT if name.startswith("grad") else FORWARD,
            reduced=in_line if "decay" in name else 1,
            dtype=case.dtype,  # lse and wide decays' gradients inherit the roundings of the tensors
        )


def _cases() -> Iterator[Case]:
    for criss_cross in (False, True):

        def case(height: int, width: int, criss_cross: bool = criss_cross, **rest: Any) -> Case:
            return Case(height, width, criss_cross, **rest)

        for dtype in (F64, F32, F16, BF16):
            yield case(5, 7, dtype=dtype, d=8, dv=20, heads=2, decay=F64 if dtype == F64 else F32)
        for dtype in (F32, F16):
            yield case(1, 1, dtype=dtype)
            yield case(1, 9, dtype=dtype)
            yield case(9, 1, dtype=dtype)
            yield case(3, 4, dtype=dtype, batch=2)
            yield case(7, 9, dtype=dtype, d=3, dv=7)  # nothing is a multiple of anything
            yield case(3, 20, dtype=dtype, heads=2)  # lines of 16 and of 32 slots
        yield case(1, 70, dtype=F16)
        yield case(70, 1, dtype=BF16)
        # Lines that have a tile to themselves, some and all of whose last eight slots are empty.
        yield case(2, 37, dtype=F16, d=16, dv=16)
        yield case(41, 2, dtype=BF16, d=32, dv=24)
        yield case(2, 67, dtype=BF16)  # a line of two tiles, a row over three
        yield case(6, 12, dtype=F32)
        yield case(9, 2, dtype=F64)
        yield case(9, 9, dtype=F16, d=32, dv=48)  # values in two passes
        yield case(4, 40, dtype=BF16, d=16, dv=16)
        yield case(13, 14, dtype=F16, heads=2, dv=16, d=32)  # three tiles, each beginning inside a row
        # Rows of the map with 8 and 16 slots of their own, of which some or none are empty, in several tiles.
        yield case(20, 7, dtype=F16, d=16, heads=2)
        yield case(9, 16, dtype=BF16, d=16)
        yield case(17, 11, dtype=BF16, decay=F32)
        yield case(4, 4, dtype=BF16, d=128, dv=128)  # the widest tiles
        yield case(3, 5, dtype=F32, d=128, dv=128)  # those of 16 rows
        yield case(2, 3, dtype=F64, d=100, dv=128)
        for strength in (0.0, 50.0):
            yield case(4, 17, dtype=F32, strength=strength)
            yield case(6, 5, dtype=F16, strength=strength)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)


@pytest.mark.thorough
@pytest.mark.parametrize("criss_cross", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(25, 42), (7, 7), (14, 14), (3, 130), (40, 3), (11, 33)], ids=str)
def test_matches_reference_on_larger_maps(
    sizes: tuple[int, int], dtype: torch.dtype, criss_cross: bool
) -> None:
    check(Case(*sizes, criss_cross, d=16, dv=16, dtype=dtype, decay=F64 if dtype == F64 else F32), seed=2)


@pytest.mark.parametrize("criss_cross", [False, True])
@pytest.mark.parametrize("layout", ["packed", "heads_first", "columns_first", "cropped"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reads_and_writes_any_strides(dtype: torch.dtype, layout: str, criss_cross: bool) -> None:
    check(Case(4, 5, criss_cross, d=24, dv=8, dtype=dtype, batch=2, heads=2, layout=layout))


@pytest.mark.parametrize("criss_cross", [False, True])
@pytest.mark.parametrize(
    "missing",
    [
        ("q",),
        ("k", "v"),
        ("log_decay_w",),
        ("log_decay_h", "q"),
        ("log_decay_w", "log_decay_h"),
        ("q", "k", "v"),
        ("q", "k", "log_decay_w", "log_decay_h"),
        ("k", "v", "log_decay_w", "log_decay_h"),
    ],
    ids="-".join,
)
def test_absent_gradients(missing: tuple[str, ...], criss_cross: bool) -> None:
    check(Case(4, 6, criss_cross, d=8, dtype=BF16, missing=missing))


@pytest.mark.parametrize("criss_cross", [False, True])
def test_what_comes_before_a_line_plays_no_part(criss_cross: bool) -> None:
    case = Case(4, 6, criss_cross, dtype=F32)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    want = run_kernels(case, inputs, memory)
    inputs.tensors[3][:, :, 0] = inputs.tensors[4][:, 0] = -torch.inf
    got = run_kernels(case, inputs, memory)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("criss_cross", [False, True])
def test_constant_decays_without_a_stride(criss_cross: bool) -> None:
    """Decays expanded from one number a head, as those of RMT."""
    case = Case(4, 6, criss_cross, dtype=F32, heads=2, missing=NAMES[3:])
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    for i in (3, 4):
        inputs.tensors[i] = torch.tensor([-0.3, -0.1]).expand(inputs.tensors[i].shape)
    got, truth = run_kernels(case, inputs, memory), run_reference(case, inputs, F64)
    baseline = run_reference(case, inputs, None)
    for name in ("out", "grad_q", "grad_v"):
        factor = FORWARD if name == "out" else GRADIENT
        assert_close_to_truth(name, got[name], baseline[name], truth[name], factor=factor)


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 14, dtype=F16, d=8, dv=8),
        Case(4, 17, dtype=F16, d=8, dv=8),
        Case(5, 14, True, dtype=F16, d=8, dv=8),
        Case(2, 66, True, dtype=BF16, d=8, dv=8),
        Case(4, 17, dtype=F32, d=8, dv=40),
        Case(4, 17, True, dtype=F32, d=8, dv=8),
        Case(1, 66, True, dtype=BF16, d=128, dv=128),
        Case(5, 4, dtype=F64, d=8, dv=8),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    torch.manual_seed(0)
    inputs = make_inputs(case, Memory(case))
    first: Results = {}
    for seed in twin.SEEDS:
        twin.load().set_seed(seed)
        results = run_kernels(case, inputs, Memory(case))
        first = first or results
        for name, tensor in first.items():
            assert torch.equal(results[name], tensor), f"{name}, seed {seed}"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(2, 2, dtype=F16, d=16, dv=144), "at most 128, got 16 and 144"),
        (Case(2, 8000, dtype=F16), "a tile needs [0-9]+ bytes of shared memory"),
    ],
    ids=["channels", "width"],
)
def test_too_large_is_refused(case: Case, message: str) -> None:
    memory = Memory(case)
    with pytest.raises(RuntimeError, match=message):
        run_kernels(case, make_inputs(case, memory), memory)


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_declaration_knows_what_fits(dtype: torch.dtype) -> None:
    case = Case(2, 2500, dtype=dtype, d=24, dv=40)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    with pytest.raises(RuntimeError, match=r"a tile needs [0-9]+ bytes of shared memory") as error:
        native.backward(
            *(memory.map(case.d), None, None, memory.decay(), None, inputs.grad_out, None, None, None),
            *(*memory.by_products(), *inputs.tensors, *case.params),
            module=twin.load(),
            cuda=True,
        )
    needed = int(str(error.value).partition("needs ")[2].split()[0])
    declared = declaration._slab_bytes(inputs.tensors[0], inputs.tensors[2])
    assert needed <= declared <= needed + 48
    (reason,) = declaration._cuda_limits(*inputs.tensors, False)
    assert "narrower maps" in reason


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over each engine and each side of the backward."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_polyline_path_attention_cuda as tests\n"
        "for dtype in (torch.float64, torch.float32, torch.float16):\n"
        "    for criss_cross in (False, True):\n"
        "        tests.check(tests.Case(6, 12, criss_cross, d=16, dv=24, dtype=dtype, layout='cropped'))\n",
        operators=("polyline_path_attention",),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
