"""Calls of neighborhood attention's CUDA kernels on the host twin, and of the reference, for the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import twin
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels.neighborhood_attention import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

Results = dict[str, torch.Tensor]

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


def run_kernels(case: Case, inputs: Inputs, memory: Memory) -> Results:
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


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> Results:
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


def compare(case: Case, got: Results, baseline: Results, truth: Results) -> None:
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
