"""The Triton kernels of polyline path attention in Triton's interpreter, against the reference.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_polyline_path_attention_triton.py`. bfloat16 is left to GPUs: tl.dot
on it is wrong in the interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from guarded import Guarded, Layout

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from gpu_sums import assert_shorter_sums, sum_as_a_gpu
from tolerance import FORWARD, GRADIENT, assert_cancelled, assert_close_to_truth

from vitkernels import ops
from vitkernels.core.backends import BackendError
from vitkernels.kernels.polyline_path_attention import reference, triton_lines_backward, triton_whole_backward
from vitkernels.kernels.polyline_path_attention import triton as launcher

F64, F32, F16 = torch.float64, torch.float32, torch.float16
NAN = float("nan")
INPUTS = ("q", "k", "v", "log_decay_w", "log_decay_h")

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    height: int = 3
    width: int = 4
    criss_cross: bool = False
    dtype: torch.dtype = F32
    d: int = 8
    dv: int = 8
    batch: int = 1
    heads: int = 1
    layout: str = "dense"
    decay: float = 1.0  # decays lie between -decay and 0
    wide_decays: bool = True  # float32 beside half precision
    missing: tuple[str, ...] = ()  # gradients that are not wanted

    def __str__(self) -> str:
        mode = "criss_cross" if self.criss_cross else "whole"
        what = f"d{self.d}-dv{self.dv}-{str(self.dtype).removeprefix('torch.')}"
        extra = [] if self.wide_decays else ["narrow-decays"]
        return "-".join([mode, f"{self.height}x{self.width}", what, self.layout, *extra])

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.heads

    @property
    def params(self) -> tuple[bool, float]:
        return self.criss_cross, self.d**-0.5


# How [batch, height, width, heads, channels] lies in memory.
LAYOUTS = {
    "packed": Layout((0, 1, 2, 3, 4), padding=16),
    "heads_first": Layout((0, 3, 1, 2, 4), before=65),
    "channels_apart": Layout((0, 4, 3, 1, 2), padding=3, before=37),
}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """An allocator, which the launcher takes its scratch from too."""
    guarded = Guarded()
    monkeypatch.setattr(launcher, "_scratch", lambda like, dtype, *shape: guarded(shape, dtype))
    return guarded


def make_inputs(case: Case, guarded: Guarded) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs, grad_out)."""

    def random(channels: int) -> torch.Tensor:
        return guarded.random((*case.grid, channels), case.dtype, LAYOUTS.get(case.layout, Layout()))

    inputs = {"q": random(case.d), "k": random(case.d), "v": random(case.dv)}
    for name in INPUTS[3:]:
        decay = guarded(case.grid, F32 if case.wide_decays else case.dtype)
        inputs[name] = decay.copy_(-case.decay * torch.rand(case.grid))
    return inputs, random(case.dv)


def run_kernels(
    case: Case, inputs: dict[str, torch.Tensor], grad_out: torch.Tensor | None, guarded: Guarded
) -> Results:
    batch, height, width, heads = case.grid
    planes = (2, batch, heads, height, width)
    saved = (
        guarded((*case.grid, case.dv), case.dtype),
        guarded(planes, F32),
        guarded(planes, F32),
        guarded((3 if case.criss_cross else 1, batch, height, width, heads * case.dv), case.dtype),
    )
    arguments = [inputs[name] for name in INPUTS]
    launcher.forward(*saved, *arguments, *case.params)
    grads = [
        None if name in case.missing else guarded(tuple(inputs[name].shape), inputs[name].dtype, layout)
        for name, layout in zip(
            INPUTS, [LAYOUTS.get(case.layout, Layout())] * 3 + [Layout()] * 2, strict=True
        )
    ]
    launcher.backward(*grads, grad_out, None, None, None, *saved, *arguments, *case.params)
    guarded.check()
    named = {f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True) if grad is not None}
    return {"out": saved[0], **named}


def run_reference(
    case: Case, inputs: dict[str, torch.Tensor], grad_out: torch.Tensor, dtype: torch.dtype | None
) -> Results:
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()
        for name, tensor in inputs.items()
    }
    (out,) = reference.forward(*(leaves[name] for name in INPUTS), *case.params)
    out.backward(grad_out.to(out.dtype))
    grads = {f"grad_{name}": leaves[name].grad for name in INPUTS if name not in case.missing}
    return {"out": out.detach(), **grads}


def compare(case: Case, got: Results, baseline: Results, truth: Results) -> None:
    assert set(got) == set(truth)
    for name, expected in truth.items():
        if not expected.any():  # decays that lie between no two tokens, or a softmax of one key
            assert "decay" not in name or not got[name].any(), f"{name} must be zero"
            assert_cancelled(f"{case} {name}", got[name])
            continue
        assert_close_to_truth(
            f"{case} {name}",
            got[name],
            baseline[name],
            expected,
            factor=GRADIENT if name.startswith("grad") else FORWARD,
            dtype=case.dtype,  # the decays' gradients inherit the roundings of the tensors
        )


def check(case: Case, guarded: Guarded) -> Results:
    inputs, grad_out = make_inputs(case, guarded)
    got = run_kernels(case, inputs, grad_out, guarded)
    baseline, truth = (run_reference(case, inputs, grad_out, dtype) for dtype in (None, F64))
    compare(case, got, baseline, truth)
    return got


CASES = [
    Case(1, 1, d=3, dv=2),
    Case(1, 9, d=16, dv=16, layout="channels_apart"),
    Case(9, 1, dtype=F16, d=5, dv=7),
    Case(3, 4, batch=2, heads=2, layout="packed"),
    Case(7, 9, dtype=F16, d=24, dv=20, layout="heads_first"),
    Case(2, 18, d=72, dv=80),  # several tiles of owners, several blocks of a row
    # Several blocks of what each row subtracts, too.
    Case(5, 7, dtype=F16, d=128, dv=100, wide_decays=False, heads=2),
]


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).removeprefix("whole-"))
def test_matches_reference(case: Case, criss_cross: bool, guarded: Guarded) -> None:
    got = check(replace(case, criss_cross=criss_cross), guarded)
    assert not got["grad_log_decay_w"][:, :, 0].any()
    assert not got["grad_log_decay_h"][:, 0].any()


@pytest.mark.parametrize("case", [Case(2, 96, decay=0.0), Case(192, 1, True, decay=0.0)], ids=str)
def test_long_sums_are_made_in_parts(case: Case, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chain for each output of a criss-cross map of 56x56 erred 1.04 times what is allowed on a GPU."""
    sum_as_a_gpu(monkeypatch)
    inputs, grad_out = make_inputs(case, guarded)
    inputs["q"].mul_(0.01)  # the logits' errors would hide those of the sums
    got = run_kernels(case, inputs, grad_out, guarded)
    baseline, truth = (run_reference(case, inputs, grad_out, dtype) for dtype in (None, F64))
    compare(case, got, baseline, truth)
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        layer = lambda: run_reference(case, inputs, grad_out, None)  # noqa: E731
        assert_shorter_sums(name, got, layer, truth, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (3, 4), (7, 9), (14, 14), (17, 35)], ids=str)
def test_every_grid(
    grid: tuple[int, int], seed: int, dtype: torch.dtype, criss_cross: bool, guarded: Guarded
) -> None:
    torch.manual_seed(seed)
    d, dv, layout = ((16, 16, "packed"), (40, 8, "heads_first"), (7, 65, "channels_apart"))[seed]
    check(Case(*grid, criss_cross, dtype, d, dv, 1 + seed % 2, 1, layout), guarded)


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
@pytest.mark.parametrize("decay", [0.0, 50.0])
def test_no_decay_and_strong_decay(decay: float, criss_cross: bool, guarded: Guarded) -> None:
    """Of decays that have underflowed to 0 the order of positions still gives a gradient."""
    got = check(Case(5, 6, criss_cross, decay=decay), guarded)
    if decay == 0.0:
        assert got["grad_log_decay_w"][:, :, 1:].all()
        assert got["grad_log_decay_h"][:, 1:].all()


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_what_comes_before_a_line_plays_no_part(criss_cross: bool, guarded: Guarded) -> None:
    case = Case(3, 4, criss_cross)
    inputs, grad_out = make_inputs(case, guarded)
    want = run_kernels(case, inputs, grad_out, guarded)
    inputs["log_decay_w"][:, :, 0] = inputs["log_decay_h"][:, 0] = -torch.inf
    got = run_kernels(case, inputs, grad_out, guarded)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_large_logits_and_expanded_tensors(criss_cross: bool, guarded: Guarded) -> None:
    """Decays constant by head, as RMT's, and the gradient of out.sum(), have strides of 0."""
    case = Case(4, 5, criss_cross, dtype=F16, heads=2)
    inputs, _ = make_inputs(case, guarded)
    inputs["q"].mul_(30)
    for name in INPUTS[3:]:
        inputs[name] = torch.tensor([-0.3, -0.05]).expand(case.grid)
    grad_out = torch.full((), 0.5, dtype=F16).expand(*case.grid, case.dv)
    got = run_kernels(case, inputs, grad_out, guarded)
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    results = [got, *(run_reference(case, inputs, grad_out, dtype) for dtype in (None, F64))]
    compare(case, *({name: result[name] for name in ("out", "grad_v")} for result in results))


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_no_incoming_gradient_gives_zeros(criss_cross: bool, guarded: Guarded) -> None:
    case = Case(2, 3, criss_cross)
    inputs, _ = make_inputs(case, guarded)
    got = run_kernels(case, inputs, None, guarded)
    assert all(not tensor.any() for name, tensor in got.items() if name.startswith("grad"))


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_each_gradient_alone_is_the_joint_one(criss_cross: bool, guarded: Guarded) -> None:
    # Rows that a program owns whole, and such as it does not.
    case = Case(1, 17, criss_cross, d=65) if criss_cross else Case(3, 5)
    inputs, grad_out = make_inputs(case, guarded)
    joint, again = (run_kernels(case, inputs, grad_out, guarded) for _ in range(2))
    assert all(torch.equal(joint[name], again[name]) for name in joint)
    for wanted in INPUTS:
        missing = tuple(name for name in INPUTS if name != wanted)
        alone = run_kernels(replace(case, missing=missing), inputs, grad_out, guarded)
        assert set(alone) == {"out", f"grad_{wanted}"}
        for name, tensor in alone.items():
            assert torch.equal(tensor, joint[name]), name


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_nan_stays_in_its_map_and_head(criss_cross: bool, guarded: Guarded) -> None:
    case = Case(2, 3, criss_cross, batch=2, heads=2)
    inputs, grad_out = make_inputs(case, guarded)
    clean = run_kernels(case, inputs, grad_out, guarded)
    for tensor in inputs.values():
        tensor[1, :, :, 0] = NAN
    got = run_kernels(case, inputs, grad_out, guarded)
    hit = torch.zeros(case.grid, dtype=torch.bool)
    hit[1, :, :, 0] = True
    for name, tensor in got.items():
        assert torch.equal(tensor[~hit], clean[name][~hit]), name


def test_criss_cross_sees_no_other_line(guarded: Guarded) -> None:
    """With decays of e^-200 between neighbors an output is its own value: lines that share a tile do not mix."""
    case = Case(5, 3, True)
    inputs, grad_out = make_inputs(case, guarded)
    for name in INPUTS[3:]:
        inputs[name].fill_(-200.0)
    got = run_kernels(case, inputs, grad_out, guarded)
    torch.testing.assert_close(got["out"], inputs["v"])
    torch.testing.assert_close(got["grad_v"], grad_out)


@triton.jit
def by_sign(
    sums_w, sums_h, table, right, corner_h, own_h, y, x, row, columns, valid, column_valid, size
):  # fmt: skip
    """Both masks with the owner's corner."""
    walked = row * size[1] + columns
    walked_h = tl.load(sums_h + walked, mask=column_valid, other=0.0)
    below = tl.where(y >= row, 1.4426950408889634, -1.4426950408889634)
    own = table + below[:, None] * (corner_h - walked_h[None, :])
    return own, own


@triton.jit
def no_mask(own, other, later):
    return 0.0 * (own[:, None] - other[None, :])


@pytest.mark.parametrize("criss_cross", [False, True], ids=["whole", "criss_cross"])
def test_wrong_results_are_rejected(
    criss_cross: bool, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison sees a scale off by 1 %, swapped decays, and in the gradients the wrong corner or no mask."""
    case = Case(3, 4, criss_cross)
    inputs, grad_out = make_inputs(case, guarded)
    baseline, truth = (run_reference(case, inputs, grad_out, dtype) for dtype in (None, F64))
    right = run_kernels(case, inputs, grad_out, guarded)
    compare(case, right, baseline, truth)
    wrong = [
        {"q": inputs["q"] * 1.01},
        {"log_decay_w": inputs["log_decay_h"], "log_decay_h": inputs["log_decay_w"]},
    ]
    results = [run_kernels(case, {**inputs, **change}, grad_out, guarded) for change in wrong]
    monkeypatch.setattr(triton_whole_backward, "masks", by_sign)
    monkeypatch.setattr(triton_lines_backward, "line_mask", no_mask)
    results.append({**run_kernels(case, inputs, grad_out, guarded), "out": results[0]["out"]})
    for result, name in product(results, truth):
        with pytest.raises(AssertionError, match=r"exceeds|not finite"):
            compare(case, {**right, name: result[name]}, baseline, truth)


@pytest.mark.parametrize("mode", ["whole", "criss_cross"])
def test_public_call_reads_a_packed_projection(mode: str) -> None:
    qkv = torch.randn(1, 3, 5, 3, 2, 8, requires_grad=True)
    decays = [(-torch.rand(1, 3, 5, 2)).requires_grad_() for _ in range(2)]
    results = {}
    for backend in ("triton", "reference"):
        out = ops.polyline_path_attention(*qkv.unbind(3), *decays, mode=mode, backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.square().sum(), (qkv, *decays)))
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_limits_name_themselves() -> None:
    with pytest.raises(BackendError, match="takes head_dim and value_dim up to 128, got 129"):
        ops.polyline_path_attention(
            *(torch.empty(1, 3, 3, 1, 129),) * 3, *(torch.empty(1, 3, 3, 1),) * 2, backend="triton"
        )


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_map(itemsize: int) -> None:
    for height, width, d in product((1, 7, 14, 25, 50), (1, 7, 14, 42, 56, 84, 336), (16, 128)):
        size, constants = launcher.whole_configuration(height, width, d, d, itemsize)
        assert size[2] * constants["TILE_Y"] >= height
        assert size[3] * constants["TILE_X"] >= width
        assert constants["TILE_Y"] * constants["TILE_X"] >= 16
        size, constants = launcher.line_configuration(height, width, d, d, itemsize)
        assert size[2] * constants["LINES"] >= height
        assert size[3] * constants["BLOCK_M"] >= width
        assert constants["LINES"] * constants["BLOCK_N"] >= 16
        # Lines share a tile only where it holds them whole.
        assert constants["LINES"] == 1 or constants["BLOCK_M"] == constants["BLOCK_N"] >= width
