"""The CUDA kernels of cascaded group attention, run on the host by the twin, against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import twin
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels.cascaded_group_attention import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
WEIGHTS = (
    "qkv_weight",
    "qkv_bias",
    "dw_weight",
    "dw_bias",
    "attn_bias",
    "proj_weight",
    "proj_bias",
)
LAYOUTS = {
    "nchw": Layout(),
    "nchw_offset": Layout(before=65),
    "channels_last": Layout((0, 2, 3, 1)),
    "channels_last_offset": Layout((0, 2, 3, 1), before=65),
    "channels_last_padded": Layout((0, 2, 3, 1), padding=3),
    "odd": Layout((3, 1, 0, 2), step=2, before=37),
}

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))


@dataclass(frozen=True)
class Case:
    channels: int = 64
    kernels: tuple[int, ...] = (3, 3)
    window: tuple[int, int] = (4, 4)
    size: tuple[int, int] = (4, 4)
    dtype: torch.dtype = F16
    batch: int = 1
    key_dim: int = 16
    kernel_max: int | None = None
    layout: str = "channels_last"
    weight_dtype: torch.dtype | None = None
    table_dtype: torch.dtype | None = None
    residual: bool = True
    with_heads: bool = True
    grad_out: bool = True
    grad_heads: bool = False
    missing: tuple[str, ...] = ()  # gradients that are not wanted
    # Half-precision heads next to zero change sign by rounding, and ReLU with them passes another gradient, a
    # whole one: inputs whose heads keep away from zero say what else a backward errs.
    clear_signs: bool | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kernels = "".join(map(str, self.kernels))
        window, size = ("x".join(map(str, pair)) for pair in (self.window, self.size))
        wide = "-wide" if self.weight_dtype else ""
        return f"{self.channels}-{kernels}-{window}-map{size}-b{self.batch}-{dtype}-{self.layout}{wide}"

    @property
    def params(self) -> tuple[Any, ...]:
        return *self.window, list(self.kernels), self.key_dim**-0.5, self.residual

    @property
    def windows(self) -> int:
        return self.batch * -(-self.size[0] // self.window[0]) * -(-self.size[1] // self.window[1])

    @property
    def rows(self) -> int:
        return self.windows * self.window[0] * self.window[1]


@dataclass
class Inputs:
    tensors: dict[str, torch.Tensor]
    grad_out: torch.Tensor | None
    grad_heads: torch.Tensor | None


def make_inputs(case: Case, guarded: Guarded) -> Inputs:
    heads, k, d = len(case.kernels), case.key_dim, case.channels // len(case.kernels)
    largest, tokens = case.kernel_max or max(case.kernels), case.window[0] * case.window[1]
    weight_dtype, layout = case.weight_dtype or case.dtype, LAYOUTS[case.layout]

    def weights(*shape: int, scale: float = 0.5, dtype: torch.dtype = weight_dtype) -> torch.Tensor:
        return guarded(shape, dtype).copy_(torch.randn(shape, dtype=F64) * scale)

    map_shape = (case.batch, case.channels, *case.size)
    tensors = {
        "x": guarded.random(map_shape, case.dtype, layout),
        "qkv_weight": weights(heads, 2 * k + d, d, scale=d**-0.5),
        "qkv_bias": weights(heads, 2 * k + d),
        "dw_weight": weights(heads, k, largest, largest, scale=1 / largest),
        "dw_bias": weights(heads, k),
        "attn_bias": weights(heads, tokens, scale=1.0, dtype=case.table_dtype or case.dtype),
        "proj_weight": weights(case.channels, case.channels, scale=case.channels**-0.5),
        "proj_bias": weights(case.channels),
    }
    if case.clear_signs or (case.clear_signs is None and case.dtype in (F16, BF16) and case.with_heads):
        tensors["qkv_weight"][:, 2 * k :] *= 0.2
        tensors["qkv_bias"][:, 2 * k :] = torch.randn(heads, d).sign() * 2
    for i, size in enumerate(case.kernels):  # nothing may come of the dead taps
        dead = (largest - size) // 2
        live = tensors["dw_weight"][i, :, dead : largest - dead, dead : largest - dead].clone()
        tensors["dw_weight"][i] = float("nan")
        tensors["dw_weight"][i, :, dead : largest - dead, dead : largest - dead] = live
    return Inputs(
        tensors,
        guarded.random(map_shape, case.dtype, layout) if case.grad_out else None,
        guarded.random((case.windows, tokens, case.channels), case.dtype) if case.grad_heads else None,
    )


def run_kernels(case: Case, inputs: Inputs, guarded: Guarded) -> dict[str, torch.Tensor]:
    module = twin.load()
    layout, x = LAYOUTS[case.layout], inputs.tensors["x"]
    out = guarded(tuple(x.shape), case.dtype, layout)
    heads_shape = (case.windows, case.window[0] * case.window[1], case.channels)
    heads = guarded(heads_shape, case.dtype) if case.with_heads else None
    native.forward(out, heads, *inputs.tensors.values(), *case.params, module=module, cuda=True)
    if heads is None:
        return {"out": out}
    grads: dict[str, Any] = {
        f"grad_{name}": None
        if name in case.missing
        else guarded(tuple(tensor.shape), tensor.dtype, layout if name == "x" else "dense")
        for name, tensor in inputs.tensors.items()
    }
    native.backward(
        *grads.values(),
        *(inputs.grad_out, inputs.grad_heads, out, heads),
        *inputs.tensors.values(),
        *case.params,
        module=module,
        cuda=True,
    )
    return {"out": out, "heads": heads, **{name: g for name, g in grads.items() if g is not None}}


def run_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    leaves = {n: t.detach().to(dtype or t.dtype).clone().requires_grad_() for n, t in inputs.tensors.items()}
    out, heads = reference.forward(*leaves.values(), *case.params)  # type: ignore[arg-type]
    if not case.with_heads:
        return {"out": out.detach()}
    pairs = [(out, inputs.grad_out), (heads, inputs.grad_heads)]
    pairs = [(result, grad.to(result.dtype)) for result, grad in pairs if grad is not None]
    torch.autograd.backward([result for result, _ in pairs], [grad for _, grad in pairs])
    results = {"out": out.detach(), "heads": heads.detach()}
    for name, tensor in leaves.items():
        if name not in case.missing:
            results[f"grad_{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def terms(case: Case, name: str) -> int:
    """How many terms a result sums: a weight's gradient sums over all tokens."""
    if name == "grad_attn_bias":
        return case.rows * case.window[0] * case.window[1]
    return case.rows if name.startswith("grad_") and name != "grad_x" else 1


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, guarded)
    guarded.check()
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
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
            reduced=terms(case, name),
            dtype=case.dtype,  # the gradients of wider weights inherit the roundings of the map
        )
