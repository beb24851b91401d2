"""Calls of neighborhood attention's CUDA kernels on the host twin, and of the reference, for the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import attention_calls
import torch
import twin
from attention_calls import Inputs, Results, accumulate, run
from guarded import Guarded, Layout

from vitkernels.kernels.neighborhood_attention import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

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
        where = f"{text(self.sizes)}-k{text(self.kernel)}-dil{text(self.dilation)}"
        what = f"d{self.d}-dv{self.dv}-{str(self.dtype).removeprefix('torch.')}"
        return "-".join(filter(None, (where, causal, what, bias, self.layout)))

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


def run_kernels(case: Case, inputs: Inputs, memory: Memory) -> Results:
    rows = (case.batch, *case.sizes, case.heads)
    into = memory((*rows, case.dv), case.dtype), memory(rows, accumulate(case.dtype))
    where = {"module": twin.load(), "cuda": True}
    return run(native, inputs, case.params, into, memory, case.missing, **where)


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> Results:
    return attention_calls.run_reference(reference, inputs, case.params, dtype, case.missing)


def compare(case: Case, got: Results, baseline: Results, truth: Results) -> None:
    assert set(got) == set(truth)
    reduced = {"grad_rpb": case.batch * case.tokens}
    attention_calls.compare(case, got, baseline, truth, case.dtype, reduced)


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    memory = Memory(case)
    inputs = make_inputs(case, memory)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, memory)
    memory.check()
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))
