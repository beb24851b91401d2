"""The Triton kernels of cascaded group attention in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_cascaded_group_attention_triton.py`. bfloat16 is left to GPUs:
tl.dot on it is wrong in the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

import vitkernels
from vitkernels import ops
from vitkernels.kernels.cascaded_group_attention import reference
from vitkernels.kernels.cascaded_group_attention import triton as launcher
from vitkernels.kernels.cascaded_group_attention.triton_shapes import parts

F32, F16 = torch.float32, torch.float16
NAMES = (
    *("x", "qkv_weight", "qkv_bias", "dw_weight", "dw_bias"),
    *("attn_bias", "proj_weight", "proj_bias"),
)
# Of maps [B, C, H, W] and of matrices of four dimensions.
MAPS = {
    "nchw": Layout(),
    "nchw_offset": Layout(before=65),
    "nhwc": Layout((0, 2, 3, 1)),
    "odd": Layout((3, 0, 1, 2), padding=1, step=2, before=37),
}


@dataclass(frozen=True)
class Case:
    channels: int = 32
    heads: int = 2
    window: tuple[int, int] = (3, 3)
    sizes: tuple[int, ...] = (3, 1)
    batch: int = 1
    map: tuple[int, int] = (3, 3)
    key_dim: int = 16
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # the map's
    layout: str = "nchw"
    residual: bool = True
    grad_out: bool = True
    grad_heads: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kernels = "".join(map(str, self.sizes))
        return f"C{self.channels}-h{self.heads}-{self.window[0]}x{self.window[1]}-{kernels}-{dtype}-{self.layout}"

    @property
    def params(self) -> tuple[Any, ...]:
        return *self.window, list(self.sizes), self.key_dim**-0.5, self.residual

    @property
    def heads_shape(self) -> tuple[int, int, int]:
        (window_h, window_w), (height, width) = self.window, self.map
        windows = self.batch * -(-height // window_h) * -(-width // window_w)
        return windows, window_h * window_w, self.channels


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """An allocator, which the launcher takes its scratch from too."""
    guarded = Guarded()
    monkeypatch.setattr(launcher, "_scratch", lambda like, dtype, *shape: guarded(shape, dtype))
    return guarded


def make_inputs(case: Case, guarded: Guarded) -> dict[str, torch.Tensor | None]:
    h, k, d, largest = case.heads, case.key_dim, case.channels // case.heads, max(case.sizes)
    dtype = case.weight_dtype or case.dtype
    map_shape = (case.batch, case.channels, *case.map)
    tensors = {
        "x": guarded.random(map_shape, case.dtype, MAPS[case.layout]),
        "qkv_weight": guarded.random((h, 2 * k + d, d), dtype).mul_(d**-0.5),
        "qkv_bias": guarded.random((h, 2 * k + d), dtype).mul_(0.5),
        "dw_weight": guarded.random((h, k, largest, largest), dtype).mul_(1 / largest),
        "dw_bias": guarded.random((h, k), dtype).mul_(0.5),
        "attn_bias": guarded.random((h, case.window[0] * case.window[1]), dtype),
        "proj_weight": guarded.random((case.channels,) * 2, dtype).mul_(case.channels**-0.5),
        "proj_bias": guarded.random((case.channels,), dtype).mul_(0.5),
    }
    # Values far from zero, of either sign: where ReLU's argument is next to zero, plain PyTorch and a kernel
    # may each round it to another side, and a gradient then differs by all of it rather than by a rounding.
    tensors["qkv_weight"][:, 2 * k :] *= 0.15
    tensors["qkv_bias"][:, 2 * k :] = torch.randn(h, d).sign() * (2 + torch.rand(h, d))
    # Taps beyond a head's kernel are never read.
    for head, size in enumerate(case.sizes):
        dead = (largest - size) // 2
        live = tensors["dw_weight"][head, :, dead : dead + size, dead : dead + size].clone()
        tensors["dw_weight"][head] = float("nan")
        tensors["dw_weight"][head, :, dead : dead + size, dead : dead + size] = live
    tensors["grad_out"] = guarded.random(map_shape, case.dtype, MAPS[case.layout]) if case.grad_out else None
    tensors["grad_heads"] = guarded.random(case.heads_shape, case.dtype) if case.grad_heads else None
    return tensors


def run_kernels(
    case: Case, inputs: dict[str, Any], guarded: Guarded, wanted: tuple[str, ...] = NAMES
) -> dict[str, torch.Tensor]:
    arguments = [inputs[name] for name in NAMES]
    layout = MAPS[case.layout]
    out, heads = guarded(arguments[0].shape, case.dtype, layout), guarded(case.heads_shape, case.dtype)
    launcher.forward(out, heads, *arguments, *case.params)
    results = {"out": out, "heads": heads}
    if wanted:
        grads = [
            guarded(tensor.shape, tensor.dtype, layout if name == "x" else "dense")
            if name in wanted
            else None
            for name, tensor in zip(NAMES, arguments, strict=True)
        ]
        incoming = inputs["grad_out"], inputs["grad_heads"]
        launcher.backward(*grads, *incoming, out, heads, *arguments, *case.params)
        results |= {f"grad_{n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}
    guarded.check()
    return results


def run_reference(case: Case, inputs: dict[str, Any], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """In `dtype`, or in the inputs' own for None."""
    leaves = {name: inputs[name].to(dtype).detach().clone().requires_grad_() for name in NAMES}
    out, heads = reference.forward(*leaves.values(), *case.params)
    pairs = [(out, inputs["grad_out"]), (heads, inputs["grad_heads"])]
    incoming = [(output, grad.to(output.dtype)) for output, grad in pairs if grad is not None]
    torch.autograd.backward(*zip(*incoming, strict=True))
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = {f"grad_{n}": zero[n] if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
    return {"out": out, "heads": heads, **grads}


def compare(case: Case, inputs: dict[str, Any], got: dict[str, torch.Tensor]) -> None:
    truth, baseline = run_reference(case, inputs, torch.float64), run_reference(case, inputs, None)
    assert truth["heads"].abs().min() > 0.1
    tokens = case.heads_shape[0] * case.heads_shape[1]
    for name, tensor in got.items():
        if not truth[name].any():
            assert not tensor.any(), f"{name}: expected zeros"
            continue
        # Weights meet every token; an entry of a table meets every pair at its offset.
        reduced = 1 if name in ("out", "heads", "grad_x") else tokens
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_close_to_truth(
            name, tensor, baseline[name], truth[name], factor=factor, reduced=reduced, dtype=case.dtype
        )


# Every (C, heads, window, kernel sizes) of the six models once.
MODELS = [
    Case(64, 4, (7, 7), (5, 5, 5, 5), map=(7, 7), residual=False),
    Case(128, 4, (7, 7), (5, 5, 5, 5), map=(7, 7), dtype=F16, layout="nhwc"),
    Case(192, 4, (4, 4), (5, 5, 5, 5), map=(4, 4), layout="nhwc"),
    Case(128, 2, (7, 7), (7, 5), map=(7, 7), dtype=F16),
    Case(144, 3, (7, 7), (7, 5, 3), map=(7, 7)),
    Case(192, 3, (4, 4), (7, 5, 3), map=(4, 4), dtype=F16, batch=2),
    Case(128, 4, (7, 7), (7, 5, 3, 3), map=(7, 7), layout="nhwc", dtype=F16),
    Case(192, 3, (7, 7), (7, 5, 3), map=(7, 7), layout="nhwc"),
    Case(224, 2, (4, 4), (7, 5), map=(4, 4), dtype=F16),
    Case(240, 3, (7, 7), (5, 5, 5), map=(7, 7), dtype=F16, layout="nhwc"),
    Case(320, 4, (4, 4), (5, 5, 5, 5), map=(4, 4), dtype=F16, layout="nhwc"),
    Case(256, 4, (7, 7), (7, 5, 3, 3), map=(7, 7), dtype=F16),
    Case(384, 4, (4, 4), (7, 5, 3, 3), map=(4, 4), dtype=F16),
    Case(288, 3, (7, 7), (7, 5, 3), map=(7, 7), dtype=F16, layout="nhwc"),
]


# By default four: heads of 16, 48, 64 and 112 channels, both windows, both dtypes.
FEW_MODELS = (MODELS[0], MODELS[8])


@pytest.mark.parametrize(
    "case",
    [case if case in FEW_MODELS else pytest.param(case, marks=pytest.mark.thorough) for case in MODELS],
    ids=str,
)
def test_models(case: Case, guarded: Guarded) -> None:
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))


CASES = [
    Case(16, 1, (1, 1), (1,), map=(1, 1)),
    Case(32, 2, (2, 2), (3, 5), map=(5, 3), batch=2, layout="odd"),
    Case(10, 2, (2, 3), (3, 1), map=(4, 7), key_dim=3, batch=2),
    Case(36, 3, (3, 5), (3, 3, 5), map=(4, 6), key_dim=20, dtype=F16, layout="odd"),
    Case(32, 2, (4, 4), (3, 5), map=(6, 9), layout="nhwc", grad_heads=True),
    Case(32, 2, (6, 6), (7, 3), map=(6, 6), dtype=F16, weight_dtype=F32, layout="nchw_offset"),
    Case(32, 2, (7, 7), (3, 5), map=(8, 7), residual=False),
    Case(32, 2, (3, 3), (3, 1), grad_out=False, grad_heads=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_shapes_and_padded_maps(case: Case, guarded: Guarded) -> None:
    inputs = make_inputs(case, guarded)
    compare(case, inputs, run_kernels(case, inputs, guarded))


SMALL = Case(channels=32, window=(2, 2), map=(2, 3))


def test_gradients_alone_are_the_joint_ones(guarded: Guarded) -> None:
    inputs = make_inputs(SMALL, guarded)
    joint = run_kernels(SMALL, inputs, guarded)
    subsets = (("x",), ("qkv_weight", "proj_bias"), ("dw_bias",), ("qkv_bias", "dw_weight"), ("proj_weight",))
    for wanted in (*subsets, ("attn_bias",)):
        got = run_kernels(SMALL, inputs, guarded, wanted)
        assert set(got) == {"out", "heads", *(f"grad_{name}" for name in wanted)}
        for name, tensor in got.items():
            assert torch.equal(tensor, joint[name]), name


def test_no_incoming_gradient_gives_zeros(guarded: Guarded) -> None:
    case = replace(SMALL, grad_out=False)
    got = run_kernels(case, make_inputs(case, guarded), guarded)
    assert all(not got[f"grad_{name}"].any() for name in NAMES)


def test_dead_taps_get_no_gradient(guarded: Guarded) -> None:
    case = replace(SMALL, sizes=(5, 1), window=(3, 3), map=(3, 3))  # every tap meets a token
    grad = run_kernels(case, make_inputs(case, guarded), guarded, ("dw_weight",))["grad_dw_weight"]
    assert grad[0].all()
    assert grad[1, :, 2, 2].all()
    grad[1, :, 2, 2] = 0
    assert not grad[1].any()


def test_same_bits_every_time_and_in_any_number_of_chunks(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs loop over tokens, and the windows take several launches that share their partials."""
    case = replace(SMALL, channels=16, heads=1, sizes=(3,), batch=10, map=(2, 2), layout="nhwc")
    inputs = make_inputs(case, guarded)
    first, second = (run_kernels(case, inputs, guarded) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.setattr(launcher, "PRODUCT_PROGRAMS", 1)
    monkeypatch.setattr(launcher, "PARTIAL_BYTES", 4 * 4 * 4)
    few = run_kernels(case, inputs, guarded)
    compare(case, inputs, few)
    for name in ("out", "heads", "grad_x"):
        assert torch.equal(first[name], few[name]), name


def test_expanded_gradient(guarded: Guarded) -> None:
    """out.sum() hands a gradient whose strides are all zero."""
    inputs = make_inputs(SMALL, guarded)
    inputs["grad_out"] = torch.ones(()).expand(inputs["x"].shape)
    compare(SMALL, inputs, run_kernels(SMALL, inputs, guarded))


def test_nan_stays_in_its_window(guarded: Guarded) -> None:
    """Windows share a tile; what is wrong with one must not reach another."""
    case = replace(SMALL, heads=1, channels=16, sizes=(3,), map=(2, 2), batch=5)
    inputs = make_inputs(case, guarded)
    clean = run_kernels(case, inputs, guarded, ("x",))
    inputs["x"][1] = float("nan")
    got = run_kernels(case, inputs, guarded, ("x",))
    assert got["out"][1].isnan().all()
    for name in ("out", "heads", "grad_x"):
        assert torch.equal(got[name][[0, 2, 3, 4]], clean[name][[0, 2, 3, 4]]), name


def test_wrong_results_are_rejected(guarded: Guarded) -> None:
    """The comparison sees a mirrored table, shifted taps, a lost channel and a scale off by 2 %."""
    case = replace(SMALL, channels=16, heads=1, sizes=(3,), window=(3, 3), map=(3, 3))
    inputs = make_inputs(case, guarded)
    lost = inputs["qkv_weight"].clone()
    lost[:, :, -1] = 0
    for wrong in (
        {**inputs, "attn_bias": inputs["attn_bias"].flip(1)},
        {**inputs, "dw_weight": inputs["dw_weight"].flip(3)},
        {**inputs, "dw_weight": inputs["dw_weight"] * 1.02, "dw_bias": inputs["dw_bias"] * 1.02},
        {**inputs, "qkv_weight": lost},
    ):
        got = run_kernels(case, wrong, guarded)
        for name in ("out", "heads", "grad_x", "grad_qkv_weight", "grad_dw_weight", "grad_attn_bias"):
            with pytest.raises(AssertionError, match="exceeds"):
                compare(case, inputs, {name: got[name]})


def test_public_call_reaches_the_kernels() -> None:
    inputs = make_inputs(replace(SMALL, sizes=(3, 3)), Guarded())
    results = {}
    for backend, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        tensors = [inputs[name].detach().to(dtype).requires_grad_() for name in NAMES]
        out = ops.cascaded_group_attention(*tensors, window_size=2, kernel_sizes=(3, 3), backend=backend)
        grads = torch.autograd.grad(out, tensors, inputs["grad_out"].to(dtype))
        results[backend, dtype] = (out, *grads)
    for name, *values in zip(("out", *NAMES), *results.values(), strict=True):
        factor = FORWARD if name == "out" else GRADIENT
        assert_close_to_truth(name, *values, factor=factor, reduced=1 if name in ("out", "x") else 9 * 4)


def test_limits_are_named() -> None:
    def reasons(**kwargs: Any) -> list[str]:
        inputs = make_inputs(replace(SMALL, **kwargs), Guarded())
        return vitkernels.supported_backends(
            "cascaded_group_attention", *(inputs[name] for name in NAMES),
            window_size=kwargs.get("window", (2, 2)), kernel_sizes=kwargs.get("sizes", (3, 1)),
        )["triton"]  # fmt: skip

    assert reasons() == []
    assert "windows of up to 64 tokens, got 81" in reasons(window=(9, 9))[0]
    assert "C / heads up to 128, got 16 and 136" in reasons(channels=272)[0]
    assert "up to 15 x 15, got 17" in reasons(sizes=(17, 1))[0]


def test_chunks_cover_all_blocks_evenly() -> None:
    for blocks in (1, 2, 7, 511, 513, 8192):
        for tiles in (1, 3, 700):
            chunks = launcher.split(blocks, tiles, 512)
            sizes = [len(range(chunk, blocks, chunks)) for chunk in range(chunks)]
            assert sum(sizes) == blocks
            assert min(sizes) >= 1
            assert chunks * tiles <= max(512, tiles)


def test_widths_are_held_by_two_powers_of_two() -> None:
    exact = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
    assert {width: parts(width) for width in exact} == exact
    for width in range(1, 129):
        part, rest = parts(width)
        assert width <= part + rest < width + max(16, width)
