"""A query to which a table of -inf forbids every key: as in plain PyTorch its out is NaN and its lse -inf.

The Triton kernels have the same test in their own file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import twin
from guarded import Guarded, drawn
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.bench.cases.window_attention import table_terms
from vitkernels.core import native as extension
from vitkernels.kernels.window_attention import native, reference

NAMES = ("q", "k", "v", "bias_table")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WINDOWS = {"small": (1, 5), "one_tile": (1, 20), "tiles": (1, 150)}


def native_results(tensors: dict[str, torch.Tensor], params: tuple[Any, ...], grads: Any, **how: Any) -> Any:
    guarded = Guarded()

    def fresh(like: torch.Tensor) -> torch.Tensor:
        return guarded(tuple(like.shape), like.dtype)

    out, lse = fresh(tensors["v"]), fresh(grads[1])
    native.forward(out, lse, *tensors.values(), *params, **how)
    results = [fresh(tensor) for tensor in tensors.values()]
    native.backward(*results, *grads, out, lse, *tensors.values(), *params, **how)
    guarded.check()
    return {"out": out, "lse": lse, **dict(zip(NAMES, results, strict=True))}


def reference_results(tensors: dict[str, torch.Tensor], params: tuple[Any, ...], grads: Any) -> Any:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = reference.forward(*leaves.values(), *params)
    results = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {"out": outputs[0], "lse": outputs[1], **dict(zip(NAMES, results, strict=True))}


def run(backend: str, tensors: dict[str, torch.Tensor], params: tuple[Any, ...], grads: Any) -> Any:
    if backend == "reference":
        return reference_results(tensors, params, grads)
    if backend == "cuda":
        if reason := twin.missing_tools():
            pytest.skip(reason)
        return native_results(tensors, params, grads, module=twin.load(), cuda=True)
    if reason := extension.why_missing():
        pytest.skip(reason)
    return native_results(tensors, params, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_fully_masked_row(backend: str, window: tuple[int, int], dtype: torch.dtype) -> None:
    tokens = window[1]
    shape = (2, 2, tokens)
    tensors = {name: drawn(*shape, 16, dtype=dtype) for name in "qkv"}
    table = drawn(2, 2 * tokens - 1, dtype=dtype)
    # Entry n - m + tokens - 1: head 1 forbids query 0 all keys, and every other query the keys from its own
    # on; head 0 forbids nothing.
    table[1, :tokens] = float("-inf")
    tensors["bias_table"] = table
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    grads = (drawn(*shape, 16, dtype=dtype), drawn(*shape, dtype=accumulate))
    params = (*window, True, 0.25)
    got = run(backend, tensors, params, grads)
    baseline = reference_results(tensors, params, grads)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = reference_results(wide, params, tuple(grad.double() for grad in grads))

    assert got["out"][:, 1, 0].isnan().all()
    assert (got["lse"][:, 1, 0] == float("-inf")).all()
    for name, want in truth.items():
        # Every other query of the head is untouched; its keys and values are not, NaN times a gradient being NaN.
        assert torch.equal(got[name].isnan(), baseline[name].isnan()), name
        finite = [torch.where(want.isfinite(), x[name].double(), 0.0) for x in (got, baseline, truth)]
        assert_close_to_truth(
            name,
            *finite,
            factor=FORWARD if name in ("out", "lse") else GRADIENT,
            reduced=table_terms(2, window, "signed") if name == "bias_table" else 1,
            dtype=dtype,
        )
    assert not got["out"][:, 1, 1:].isnan().any()
    assert not got["q"][:, 0].isnan().any()
