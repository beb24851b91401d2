"""The Triton kernels of merging and unmerging in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_token_merge_triton.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from far import far
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels import MergePlan, ops
from vitkernels.core import triton_token_groups
from vitkernels.kernels.token_merge import reference as merging
from vitkernels.kernels.token_merge import triton as launcher
from vitkernels.kernels.token_unmerge import reference as unmerging
from vitkernels.kernels.token_unmerge import triton as unmerge_launcher

F32, F16 = torch.float32, torch.float16
DTYPES = [pytest.param(F32, id="fp32"), pytest.param(F16, id="fp16")]
MODES = ("wavg", "sum", "mean", "amax")
NAN = float("nan")
ODD = Layout((2, 0, 1), padding=1, before=37)  # nothing dense
DENSE = Layout((0, 1, 2), before=65)


def random_plan(batch: int, tokens: int, merged: int) -> MergePlan:
    """Groups of any size, of any tokens; the last image has one that holds all it can."""
    rows = torch.randint(merged, (batch, tokens))
    rows[-1] = merged // 2
    for image in rows:
        image[torch.randperm(tokens)[:merged]] = torch.arange(merged)
    return MergePlan.from_rows(rows, merged)


def tensors_of(plan: MergePlan) -> tuple[torch.Tensor, ...]:
    """Those of the plan between numbers that are no token's."""
    guarded = []
    for tensor in (plan.rows, plan.starts, plan.members):
        buffer = torch.full((tensor.numel() + 64,), -(10**9), dtype=torch.int32)
        view = buffer[32 : 32 + tensor.numel()].view(tensor.shape)
        guarded.append(view.copy_(tensor))
    return tuple(guarded)


def merge(
    plan: MergePlan, x: torch.Tensor, size: torch.Tensor | None, mode: str, grad: torch.Tensor, guarded: Guarded,
    layout: Layout = DENSE,
) -> dict[str, torch.Tensor]:  # fmt: skip
    y, sizes = guarded(grad.shape, x.dtype), guarded(grad.shape[:2], F32)
    inputs = (x, size, *tensors_of(plan), mode)
    launcher.forward(y, sizes, *inputs)
    grad_x = guarded(x.shape, x.dtype, layout)
    launcher.backward(grad_x, None, None, None, None, grad, None, y, sizes, *inputs)
    guarded.check()
    return {"y": y, "sizes": sizes, "grad_x": grad_x}


def merge_reference(
    plan: MergePlan, x: torch.Tensor, size: torch.Tensor | None, mode: str, grad: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:  # fmt: skip
    leaf = x.detach().to(dtype).requires_grad_()
    wide = torch.float64 if dtype is torch.float64 else F32
    size = None if size is None else size.to(wide)
    y, sizes = merging.forward(leaf, size, plan.rows, plan.starts, plan.members, mode)
    (grad_x,) = torch.autograd.grad(y, leaf, grad.to(dtype))
    return {"y": y.detach(), "sizes": sizes, "grad_x": grad_x}


def unmerge(
    plan: MergePlan, y: torch.Tensor, grad: torch.Tensor, guarded: Guarded, layout: Layout = DENSE
) -> dict[str, torch.Tensor]:
    x, grad_y = guarded(grad.shape, y.dtype), guarded(y.shape, y.dtype, layout)
    unmerge_launcher.forward(x, y, *tensors_of(plan))
    unmerge_launcher.backward(grad_y, None, None, None, grad, x, y, *tensors_of(plan))
    guarded.check()
    return {"x": x, "grad_y": grad_y}


def unmerge_reference(
    plan: MergePlan, y: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    leaf = y.detach().to(dtype).requires_grad_()
    (x,) = unmerging.forward(leaf, plan.rows, plan.starts, plan.members)
    (grad_y,) = torch.autograd.grad(x, leaf, grad.to(dtype))
    return {"x": x.detach(), "grad_y": grad_y}


def compare(got: dict[str, torch.Tensor], reference: Any, dtype: torch.dtype) -> None:
    """reference: a function of the dtype that it computes in."""
    truth, baseline = reference(torch.float64), reference(dtype)
    for name, tensor in got.items():
        factor = GRADIENT if name.startswith("grad") else FORWARD
        kind = F32 if name == "sizes" else dtype
        assert_close_to_truth(name, tensor, baseline[name], truth[name], factor=factor, dtype=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 40, 130, pytest.param(300, marks=pytest.mark.thorough)])
def test_merging(channels: int, mode: str, dtype: torch.dtype) -> None:
    guarded = Guarded()
    plan = random_plan(2, 25, 14)
    layout = ODD if channels == 40 else DENSE
    x = guarded.random((2, 25, channels), dtype, layout)
    grad = guarded.random((2, 14, channels), dtype, layout)
    size = guarded((2, 25), F32).copy_(torch.randint(1, 198, (2, 25)))
    for sizes in (size, None) if channels == 1 or mode == "wavg" else (size,):
        got = merge(plan, x, sizes, mode, grad, guarded, layout)
        compare(got, lambda kind, s=sizes: merge_reference(plan, x, s, mode, grad, kind), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 40, 130])
def test_unmerging(channels: int, dtype: torch.dtype) -> None:
    guarded = Guarded()
    plan = random_plan(3, 37, 20)
    layout = ODD if channels == 40 else DENSE
    y = guarded.random((3, 20, channels), dtype, layout)
    grad = guarded.random((3, 37, channels), dtype, layout)
    got = unmerge(plan, y, grad, guarded, layout)
    compare(got, lambda kind: unmerge_reference(plan, y, grad, kind), dtype)


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("mode", ["wavg", "amax"])
def test_one_group_of_all_tokens(mode: str, tokens: int) -> None:
    guarded = Guarded()
    plan = random_plan(2, tokens, 1)
    x, grad = guarded.random((2, tokens, 8), F32), guarded.random((2, 1, 8), F32)
    got = merge(plan, x, None, mode, grad, guarded)
    compare(got, lambda kind: merge_reference(plan, x, None, mode, grad, kind), F32)


@pytest.mark.parametrize("mode", ["wavg", "mean"])
def test_the_mean_of_equal_tokens_is_that_token(mode: str) -> None:
    plan = random_plan(2, 41, 12)
    x = torch.full((2, 41, 3), 0.75)
    y, sizes = torch.empty(2, 12, 3), torch.empty(2, 12)
    launcher.forward(y, sizes, x, None, plan.rows, plan.starts, plan.members, mode)
    assert torch.equal(y, x[:, :12])
    assert torch.equal(sizes.sum(1), torch.full((2,), 41.0))


def test_the_largest_share_evenly() -> None:
    plan = MergePlan.from_rows(torch.tensor([[0, 1, 0, 1, 0, 2]]), 3)
    x = torch.tensor([[[3.0], [-1.0], [3.0], [-2.0], [1.0], [-7.0]]])
    got = merge(plan, x, None, "amax", torch.tensor([[[6.0], [5.0], [4.0]]]), Guarded())
    assert got["y"].flatten().tolist() == [3, -1, -7]
    assert got["grad_x"].flatten().tolist() == [3, 5, 3, 0, 0, 4]


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_stay_in_their_group_and_channel(mode: str) -> None:
    plan, guarded = random_plan(2, 37, 20), Guarded()
    x, grad = torch.randn(2, 37, 5), torch.randn(2, 20, 5)
    clean = merge(plan, x, None, mode, grad, guarded)
    x[0, 3, 2], x[1, 8, 4] = NAN, -float("inf")
    got = merge(plan, x, None, mode, grad, guarded)
    ill = torch.zeros(2, 20, 5, dtype=torch.bool)
    ill[0, plan.rows[0, 3], 2] = ill[1, plan.rows[1, 8], 4] = True
    assert got["y"][0, plan.rows[0, 3], 2].isnan()
    assert torch.equal(got["y"][~ill], clean["y"][~ill])
    reached = ill.gather(1, plan.rows.long()[..., None].expand(2, 37, 5))
    assert torch.equal(got["grad_x"][~reached], clean["grad_x"][~reached])
    if mode == "amax":
        alone = x[1, plan.rows[1] == plan.rows[1, 8], 4]
        assert got["y"][1, plan.rows[1, 8], 4] == alone.max()


@pytest.mark.parametrize("mode", MODES)
def test_tokens_further_apart_than_32_bits_count(mode: str) -> None:
    plan = MergePlan.from_rows(torch.tensor([[0, 1, 1]]), 2)
    x, grad, size = torch.randn(1, 3, 4).half(), torch.randn(1, 2, 4).half(), torch.tensor([[1.0, 2.0, 5.0]])
    want = merge(plan, x, size, mode, grad, Guarded())
    y, sizes = torch.empty_like(grad), torch.empty(1, 2)
    inputs = (far(x, 1), size, *tensors_of(plan), mode)
    launcher.forward(y, sizes, *inputs)
    grad_x = far(torch.zeros_like(x), 1)
    launcher.backward(grad_x, None, None, None, None, grad, None, y, sizes, *inputs)
    for name, got in (("y", y), ("sizes", sizes), ("grad_x", grad_x)):
        assert torch.equal(got, want[name]), name


def test_a_plan_may_lie_anyhow() -> None:
    plan, x = random_plan(2, 9, 4), torch.randn(2, 9, 3)
    scattered = MergePlan(*(t.T.contiguous().T for t in (plan.rows, plan.starts, plan.members)))
    for mode in MODES:
        results = []
        for either in (plan, scattered):
            leaf = x.clone().requires_grad_()
            y, sizes = ops.token_merge(leaf, either, mode=mode, backend="triton")
            back = ops.token_unmerge(y, either, backend="triton")
            results.append((sizes, back, *torch.autograd.grad(back.square().sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_absent_gradients() -> None:
    plan, x = random_plan(2, 9, 4), torch.randn(2, 9, 3)
    y, sizes = torch.empty(2, 4, 3), torch.empty(2, 4)
    inputs = (x, None, plan.rows, plan.starts, plan.members, "wavg")
    launcher.backward(None, None, None, None, None, y, None, y, sizes, *inputs)
    grad_x = torch.full_like(x, NAN)
    launcher.backward(grad_x, None, None, None, None, None, None, y, sizes, *inputs)
    assert (grad_x == 0).all()
    grad_y = torch.full_like(y, NAN)
    unmerge_launcher.backward(grad_y, None, None, None, None, x, y, *inputs[2:5])
    assert (grad_y == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_runs_agree_bit_for_bit(mode: str) -> None:
    plan, x, grad = random_plan(2, 30, 7), torch.randn(2, 30, 5), torch.randn(2, 7, 5)
    size = torch.rand(2, 30) + 0.5
    first = merge(plan, x, size, mode, grad, Guarded())
    for _ in range(2):
        again = merge(plan, x, size, mode, grad, Guarded())
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("elements", [512, pytest.param(128, marks=pytest.mark.thorough)])
def test_the_size_of_a_tile_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x, grad = random_plan(2, 37, 20), torch.randn(2, 37, 70), torch.randn(2, 20, 70)
    want = {mode: merge(plan, x, None, mode, grad, Guarded()) for mode in MODES}
    monkeypatch.setattr(triton_token_groups, "ELEMENTS", elements)
    for mode in MODES:
        got = merge(plan, x, None, mode, grad, Guarded())
        assert all(torch.equal(got[name], want[mode][name]) for name in got)


@pytest.mark.parametrize("mode", MODES)
def test_the_public_functions_run_the_kernels(mode: str) -> None:
    metric = torch.randn(2, 23, 6)
    plan = ops.bipartite_match(metric, 7, class_token=True, backend="reference")
    x, size = torch.randn(2, 23, 5, requires_grad=True), torch.rand(2, 23) + 0.5
    results = {}
    for backend in ("triton", "reference"):
        y, sizes = ops.token_merge(x, plan, size=size, mode=mode, backend=backend)
        back = ops.token_unmerge(y, plan, backend=backend)
        results[backend] = (y, sizes, back, *torch.autograd.grad(back.square().sum(), x))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want)
    empty = MergePlan(plan.rows[:0], plan.starts[:0], plan.members[:0])
    assert ops.token_merge(x[:0], empty, mode=mode, backend="triton")[0].shape == (0, 16, 5)


def test_a_wrong_kernel_fails_the_rule() -> None:
    """One member too few, a weight that is off, another's row: each is seen."""
    plan, x, grad = random_plan(2, 37, 20), torch.randn(2, 37, 6), torch.randn(2, 20, 6)
    size = torch.randint(1, 5, (2, 37)).float()
    got = merge(plan, x, size, "wavg", grad, Guarded())
    reference = lambda kind: merge_reference(plan, x, size, "wavg", grad, kind)  # noqa: E731
    compare(got, reference, F32)
    wrong = {"y": got["y"].roll(1, 1), "sizes": got["sizes"] + 0.01, "grad_x": got["grad_x"] * (1 + 3e-5)}
    for name, tensor in wrong.items():
        with pytest.raises(AssertionError, match="exceeds"):
            compare({name: tensor}, reference, F32)
