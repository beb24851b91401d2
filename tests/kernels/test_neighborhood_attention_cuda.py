"""The CUDA kernels of neighborhood attention, run on the host by the twin, against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import twin
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels.neighborhood_attention import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

# How [batch, *map, heads, channels] lies in memory; "cropped" is a map inside a larger one, its rows apart.
LAYOUTS = {
    4: {"packed": Layout((0, 1, 2, 3), padding=16), "heads_first": Layout((0, 2, 1, 3), before=65)},
    5: {"packed": Layout((0, 1, 2, 3, 4), padding=16), "heads_first": Layout((0, 3, 1, 2, 4), before=65)},
}


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (5, 7)
    kernel: tuple[int, ...] = (3, 3)
    dilation: tuple[int, ...] = (1, 1)
    causal: tuple[bool, ...] = (False, False)
    d: int = 16
    dv: int = 16
    dtype: torch.dtype = F16
    rpb: torch.dtype | None = None
    batch: int = 1
    heads: int = 1
    layout: str = "dense"
    grad_out: bool = True
    grad_lse: bool = True
    missing: tuple[str, ...] = ()  # gradients that are not wanted

    def __str__(self) -> str:
        def text(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values))

        causal = "".join("c" if c else "n" for c in self.causal) if any(self.causal) else ""
        bias = {None: "", self.dtype: "rpb"}.get(self.rpb, "wide-rpb")
        parts = (
            text(self.sizes),
            f"k{text(self.kernel)}",
            f"dil{text(self.dilation)}",
            *(causal, f"d{self.d}", f"dv{self.dv}", str(self.dtype).removeprefix("torch."), bias, self.layout),
        )
        return "-".join(filter(None, parts))

    @property
    def params(self) -> tuple[Any, ...]:
        return self.kernel, (1,) * len(self.sizes), self.dilation, self.causal, self.d**-0.5

    @property
    def tokens(self) -> int:
        return torch.Size(self.sizes).numel()


def line(size: int, kernel: int, dilation: int = 1, causal: bool = False, **rest: Any) -> Case:
    return Case((size,), (kernel,), (dilation,), (causal,), **rest)


def square(sizes: tuple[int, int], kernel: int, dilation: int = 1, **rest: Any) -> Case:
    return Case(sizes, (kernel, kernel), (dilation, dilation), **rest)


@dataclass
class Memory:
    """Tensors between guard bands, in the case's layout."""

    case: Case
    guarded: Guarded = field(default_factory=Guarded)
    surroundings: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if len(shape) < len(self.case.sizes) + 3 or self.case.layout == "dense":
            return self.guarded(shape, dtype)
        if self.case.layout != "cropped":
            return self.guarded(shape, dtype, LAYOUTS[len(shape)][self.case.layout])
        batch, *sizes, heads, width = shape
        larger = self.guarded((batch, *(size + 3 for size in sizes), heads, width), dtype)
        crop = (slice(None), *(slice(2, 2 + size) for size in sizes))
        outside = torch.ones_like(larger, dtype=torch.bool)
        outside[crop] = False
        self.surroundings.append((larger, outside))
        return larger[crop]

    def random(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self(shape, dtype).copy_(torch.randn(shape, dtype=torch.promote_types(dtype, F32)))

    def check(self) -> None:
        self.guarded.check()
        for larger, outside in self.surroundings:
            assert larger[outside].isnan().all(), "a kernel wrote outside a map"


@dataclass
class Inputs:
    tensors: dict[str, torch.Tensor | None]
    grad_out: torch.Tensor | None
    grad_lse: torch.Tensor | None


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def make_inputs(case: Case, memory: Memory) -> Inputs:
    rows = (case.batch, *case.sizes, case.heads)
    entries = tuple(2 * kernel - 1 for kernel in case.kernel)
    tensors = {
        "q": memory.random((*rows, case.d), case.dtype),
        "k": memory.random((*rows, case.d), case.dtype),
        "v": memory.random((*rows, case.dv), case.dtype),
        "rpb": None if case.rpb is None else memory.random((case.heads, *entries), case.rpb),
    }
    return Inputs(
        tensors,
        memory.random((*rows, case.dv), case.dtype) if case.grad_out else None,
        memory.random(rows, accumulate(case.dtype)) if case.grad_lse else None,
    )


def run_kernels(case: Case, inputs: Inputs, memory: Memory) -> dict[str, torch.Tensor]:
    module = twin.load()
    rows = (case.batch, *case.sizes, case.heads)
    out = memory((*rows, case.dv), case.dtype)
    lse = memory(rows, accumulate(case.dtype))
    arguments: list[Any] = list(inputs.tensors.values())
    native.forward(out, lse, *arguments, *case.params, module=module, cuda=True)
    grads: dict[str, Any] = {
        f"grad_{name}": None
        if tensor is None or name in case.missing
        else memory(tuple(tensor.shape), tensor.dtype)
        for name, tensor in inputs.tensors.items()
    }
    native.backward(
        *grads.values(),
        *(inputs.grad_out, inputs.grad_lse, out, lse),
        *arguments,
        *case.params,
        module=module,
        cuda=True,
    )
    return {"out": out, "lse": lse, **{name: grad for name, grad in grads.items() if grad is not None}}


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    def leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()

    leaves = {name: leaf(tensor) for name, tensor in inputs.tensors.items()}
    arguments: list[Any] = list(leaves.values())
    out, lse = reference.forward(*arguments, *case.params)
    pairs = [(out, inputs.grad_out), (lse, inputs.grad_lse)]
    pairs = [(result, grad.to(result.dtype)) for result, grad in pairs if grad is not None]
    torch.autograd.backward([result for result, _ in pairs], [grad for _, grad in pairs])
    results = {"out": out.detach(), "lse": lse.detach()}
    for name, tensor in leaves.items():
        if tensor is not None and name not in case.missing:
            results[f"grad_{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def compare(
    case: Case, got: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]
) -> None:
    assert set(got) == set(truth)
    for name, expected in truth.items():
        if not expected.any():
            assert not got[name].any(), f"{name} must be zero"
            continue
        assert_close_to_truth(
            f"{case} {name}",
            got[name],
            baseline[name],
            expected,
            factor=GRADIENT if name.startswith("grad") else FORWARD,
            reduced=case.batch * case.tokens if name == "grad_rpb" else 1,
            dtype=case.dtype,  # lse and a wide table's gradient inherit the roundings of the tensors
        )


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, memory)
    memory.check()
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))


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
    yield square((16, 14), 7, d=32, dv=32, dtype=BF16, rpb=BF16)
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


def seen_by_kernels(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token sees which, [tokens, tokens], by the forward and by the gradient of the values."""
    rows, tokens = (1, *case.sizes, 1), case.tokens
    one_hot = torch.eye(tokens, dtype=case.dtype).view(*rows, tokens)
    zeros = torch.zeros(*rows, case.d, dtype=case.dtype)
    inputs = Inputs({"q": zeros, "k": zeros, "v": one_hot, "rpb": None}, one_hot, None)
    case = replace(case, dv=tokens, missing=("q", "k", "rpb"))
    results = run_kernels(case, inputs, Memory(case))
    forward, backward = (results[name].view(tokens, tokens) > 0 for name in ("out", "grad_v"))
    return forward, backward.T


def seen_by_rule(case: Case) -> torch.Tensor:
    token, _, seen = reference.neighbors(case.sizes, *case.params[:4])
    matrix = torch.zeros(case.tokens, case.tokens, dtype=torch.bool)
    for key, valid in zip(token.T, seen.T, strict=True):
        matrix[torch.arange(case.tokens)[valid], key[valid]] = True
    return matrix


def axes(size: int) -> list[tuple[int, int, bool]]:
    """Every (kernel, dilation, causal) of an axis."""
    return [
        (kernel, dilation, causal)
        for dilation in range(1, size + 1)
        for causal in (False, True)
        for kernel in range(1, size // dilation + 1)
    ]


def assert_neighbors(sizes: tuple[int, ...], *of_axis: tuple[int, int, bool], dtype: torch.dtype) -> None:
    kernel, dilation, causal = zip(*of_axis, strict=True)
    case = Case(sizes, kernel, dilation, causal, d=8, dtype=dtype)
    expected = seen_by_rule(case)
    for seen in seen_by_kernels(case):
        assert torch.equal(seen, expected), case


@pytest.mark.parametrize("size", range(1, 41))
def test_every_neighborhood_of_an_axis(size: int) -> None:
    for of_axis, dtype in zip(axes(size), itertools.cycle((F64, F16))):
        assert_neighbors((size,), of_axis, dtype=dtype)


@pytest.mark.parametrize("seed", range(6))
def test_neighborhoods_of_random_maps(seed: int) -> None:
    """Two axes at a time, of up to 40 tokens, in maps of as many tokens as the values have channels."""
    pick = torch.Generator().manual_seed(seed)

    def choose(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=pick))]

    for _ in range(4):
        height = choose(range(1, 41))
        width = choose(range(1, min(40, 128 // height) + 1))
        assert_neighbors(
            (height, width), choose(axes(height)), choose(axes(width)), dtype=choose((F64, F32, F16))
        )


def assert_no_schedule_changes_a_bit(case: Case) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    first: dict[str, torch.Tensor] = {}
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


Rule = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def _clamp(start: torch.Tensor, last: Any) -> torch.Tensor:
    return torch.minimum(start.clamp(min=0), torch.as_tensor(last))


# The first key of a window: of the query's number in its group, the group's length, the kernel, size / dilation.
RIGHT_RULE: Rule = lambda number, length, kernel, _: _clamp(number - kernel // 2, length - kernel)  # noqa: E731
WRONG_RULES: dict[str, Rule] = {
    "truncated": lambda number, length, kernel, _: number - kernel // 2,
    "mirrored": lambda number, length, kernel, _: _clamp(number - (kernel - 1) // 2, length - kernel),
    "shortest_group": lambda number, length, kernel, short: _clamp(number - kernel // 2, short - kernel),
    "late": lambda number, length, kernel, _: _clamp(number - kernel // 2 + 1, length - kernel),
}


def run_dense(case: Case, inputs: Inputs, start_of: Rule, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Attention with a mask of all pairs of tokens, whose windows begin where `start_of` says."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    entry = torch.zeros(1, 1, dtype=torch.int64)
    for size, kernel, dilation in zip(case.sizes, case.kernel, case.dilation, strict=True):
        group, number = torch.arange(size) % dilation, torch.arange(size) // dilation
        length = size // dilation + (group < size % dilation)
        start = start_of(number, length, kernel, size // dilation)[:, None]
        inside = (group[:, None] == group) & (number >= start) & (number < start + kernel)
        seen = torch.kron(seen.int(), inside.int()).bool()
        offset = (number - number[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)
        entry = (entry[:, None, :, None] * (2 * kernel - 1) + offset[None, :, None, :]).reshape(seen.shape)

    def leaf(name: str) -> torch.Tensor:
        tensor = inputs.tensors[name]
        assert tensor is not None
        return tensor.to(dtype or tensor.dtype).clone().requires_grad_()

    leaves = {name: leaf(name) for name in inputs.tensors}
    q, k, v = (leaves[name].flatten(1, -3).transpose(1, 2) for name in "qkv")
    logits = (q @ k.mT) * case.params[-1] + leaves["rpb"].flatten(1)[:, entry]
    logits = logits.masked_fill(~seen, float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(leaves["v"].shape)
    lse = logits.to(accumulate(logits.dtype)).logsumexp(-1).transpose(1, 2).reshape(out.shape[:-1])
    assert inputs.grad_out is not None
    assert inputs.grad_lse is not None
    torch.autograd.backward([out, lse], [inputs.grad_out.to(out.dtype), inputs.grad_lse.to(lse.dtype)])
    grads = {f"grad_{name}": tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


@pytest.mark.parametrize("wrong", WRONG_RULES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_wrong_map_is_noticed(wrong: str, dtype: torch.dtype) -> None:
    """The tolerance has teeth: no result of the kernels passes for that of another border rule."""
    case = square((11, 9), 4, 2, dtype=dtype, rpb=dtype)
    inputs = make_inputs(case, Memory(case))
    got = run_kernels(case, inputs, Memory(case))
    compare(case, got, run_dense(case, inputs, RIGHT_RULE, None), run_dense(case, inputs, RIGHT_RULE, F64))
    rule = WRONG_RULES[wrong]
    baseline, truth = run_dense(case, inputs, rule, None), run_dense(case, inputs, rule, F64)
    for name in truth:
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(
                name, got[name], baseline[name], truth[name], factor=GRADIENT, reduced=case.tokens
            )


def test_a_wrong_bias_entry_is_noticed() -> None:
    case = square((6, 7), 3, dtype=F16, rpb=F16)
    inputs = make_inputs(case, Memory(case))
    got = run_kernels(case, inputs, Memory(case))
    assert inputs.tensors["rpb"] is not None
    inputs.tensors["rpb"] = inputs.tensors["rpb"].flip(1)
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    for name in truth:
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(name, got[name], baseline[name], truth[name], factor=GRADIENT)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (square((2, 2), 2, d=16, dv=144), "at most 128, got 16 and 144"),
        (line(70000, 70000, d=1, dv=1), "a map of 1 x 70000 tokens with a kernel of 1 x 70000 is too large"),
        (square((48, 48), 48, rpb=F16), "a tile needs [0-9]+ bytes of shared memory"),
    ],
    ids=["channels", "box", "table"],
)
def test_too_large_is_refused(case: Case, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_kernels(case, make_inputs(case, Memory(case)), Memory(case))


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
