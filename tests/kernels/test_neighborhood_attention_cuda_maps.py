"""Which keys the CUDA kernels of neighborhood attention see: brute force, and the teeth of the tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
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
    accumulate,
    compare,
    make_inputs,
    run_kernels,
    run_reference,
    square,
)
from tolerance import GRADIENT, assert_close_to_truth

from vitkernels.kernels.neighborhood_attention import reference

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))


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


# The short ones, where every border meets every other, and two that pass tiles of 16 and of 32.
FEW_SIZES = (*range(1, 15), 17, 33)


@pytest.mark.parametrize(
    "size", [n if n in FEW_SIZES else pytest.param(n, marks=pytest.mark.thorough) for n in range(1, 41)]
)
def test_every_neighborhood_of_an_axis(size: int) -> None:
    for of_axis, dtype in zip(axes(size), itertools.cycle((F64, F16)), strict=False):
        assert_neighbors((size,), of_axis, dtype=dtype)


@pytest.mark.parametrize("seed", range(6))
def test_neighborhoods_of_random_maps(seed: int) -> None:
    """Two axes at a time, of up to 40 tokens, in maps of as many tokens as the values have channels."""
    pick = torch.Generator().manual_seed(seed)

    def choose(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=pick))]

    for _ in range(10):
        height = choose(range(1, 41))
        width = choose(range(1, min(40, 128 // height) + 1))
        assert_neighbors(
            (height, width), choose(axes(height)), choose(axes(width)), dtype=choose((F64, F32, F16))
        )


Rule = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def _clamp(start: torch.Tensor, last: Any) -> torch.Tensor:
    return torch.minimum(start.clamp(min=0), torch.as_tensor(last))


def _right_rule(number: torch.Tensor, length: torch.Tensor, kernel: int, _: int) -> torch.Tensor:
    """The first key of a window, of: number in the group, length of the group, kernel, size // dilation."""
    return _clamp(number - kernel // 2, length - kernel)


WRONG_RULES: dict[str, Rule] = {
    "truncated": lambda number, length, kernel, _: number - kernel // 2,
    "mirrored": lambda number, length, kernel, _: _clamp(number - (kernel - 1) // 2, length - kernel),
    "shortest_group": lambda number, length, kernel, short: _clamp(number - kernel // 2, short - kernel),
    "late": lambda number, length, kernel, _: _clamp(number - kernel // 2 + 1, length - kernel),
}


def run_dense(case: Case, inputs: Inputs, start_of: Rule, dtype: torch.dtype | None) -> Results:
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
    compare(case, got, run_dense(case, inputs, _right_rule, None), run_dense(case, inputs, _right_rule, F64))
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
