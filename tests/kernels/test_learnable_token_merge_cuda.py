"""The CUDA kernels of learnable_token_merge, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import twin
from guarded import Guarded, Layout
from tolerance import FORWARD, GRADIENT, assert_close_to_truth

from vitkernels.kernels.learnable_token_merge import native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAMES = ("z", "g", "other")
Results = dict[str, torch.Tensor]
DENSE = Layout()

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))


@dataclass(frozen=True)
class Case:
    tokens: int = 37
    merged: int = 29
    width: int = 24
    other: int | None = None
    normalize: str = "none"
    dtype: torch.dtype = F16
    mask_dtype: torch.dtype | None = None
    shared: bool = False
    batch: int = 2
    scale: float = 1.0  # of the mask's logarithms
    layout: Layout = DENSE
    missing: tuple[str, ...] = ()  # gradients that are not wanted
    absent: tuple[str, ...] = ()  # incoming gradients that are not there

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + (
            "" if self.mask_dtype in (None, self.dtype) else "-wide"
        )
        sizes = f"{self.tokens}-{self.merged}-{self.width}" + ("" if self.other is None else f"+{self.other}")
        return f"{sizes}-{dtype}-{self.normalize}" + ("-shared" if self.shared else "")


def make_inputs(case: Case, guarded: Guarded) -> dict[str, torch.Tensor | None]:
    """A mask of positive numbers where it is summed: a random sum near 0 would only test its rounding."""
    batch, tokens, merged = case.batch, case.tokens, case.merged

    def matrix(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return guarded.random((1,) * (4 - len(shape)) + shape, dtype, case.layout)[(0,) * (4 - len(shape))]

    mask_shape = (tokens, merged) if case.shared else (batch, tokens, merged)
    g = matrix(mask_shape, case.mask_dtype or case.dtype)
    g.mul_(case.scale) if case.normalize.startswith("softmax") else g.abs_().add_(0.1)
    other = None if case.other is None else matrix((batch, tokens, case.other), case.dtype)
    tensors = {"z": matrix((batch, tokens, case.width), case.dtype), "g": g, "other": other}
    for name, width in (("y", case.width), ("y_other", case.other)):
        gone = width is None or name in case.absent
        tensors[f"grad_{name}"] = None if gone else matrix((batch, merged, width), case.dtype)
    return tensors


def run_kernels(case: Case, inputs: dict[str, Any], guarded: Guarded) -> Results:
    module, options = twin.load(), {"cuda": True}
    z, g, other = (inputs[name] for name in NAMES)
    y = guarded((case.batch, case.merged, case.width), case.dtype)
    y_other = z.new_empty(0) if other is None else guarded((case.batch, case.merged, case.other), case.dtype)
    wide = F64 if case.dtype is F64 else F32
    norms = {"none": (0,), "softmax_rows": g.shape[:-1]}.get(case.normalize, (*g.shape[:-2], g.shape[-1]))
    divisors = guarded(tuple(norms), wide)
    native.forward(y, y_other, divisors, z, g, other, case.normalize, module=module, **options)
    grads = {
        name: None
        if inputs[name] is None or name in case.missing
        else guarded(tuple(inputs[name].shape), inputs[name].dtype, case.layout)
        for name in NAMES
    }
    incoming = (inputs["grad_y"], inputs["grad_y_other"], None)
    outputs = (y, y_other, divisors)
    native.backward(
        *grads.values(), *incoming, *outputs, z, g, other, case.normalize, module=module, **options
    )
    got = {"y": y, "divisors": divisors, **{f"grad_{name}": t for name, t in grads.items() if t is not None}}
    if other is not None:
        got["y_other"] = y_other
    return got


def run_reference(case: Case, inputs: dict[str, Any], dtype: torch.dtype | None) -> Results:
    leaves = {
        n: inputs[n].detach().to(dtype or inputs[n].dtype).clone() for n in NAMES if inputs[n] is not None
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, y_other, divisors = reference.forward(leaves["z"], leaves["g"], leaves.get("other"), case.normalize)
    pairs = [(y, inputs["grad_y"]), (y_other, inputs["grad_y_other"])]
    pairs = [(out, grad.to(out.dtype)) for out, grad in pairs if grad is not None]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    results = {"y": y.detach(), "divisors": divisors.detach()}
    if case.other is not None:
        results["y_other"] = y_other.detach()
    for name, leaf in leaves.items():
        if name not in case.missing:
            results[f"grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
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
            reduced=case.batch if name == "grad_g" and case.shared else 1,
            # A wide mask's gradient inherits the roundings of the tokens; divisors are the mask's alone.
            dtype=got[name].dtype if name == "divisors" else case.dtype,
        )


def check(case: Case, seed: int = 0) -> None:
    torch.manual_seed(seed)
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, guarded)
    guarded.check()
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))


def _kinds() -> Iterator[Case]:
    """Every normalisation, sharing, operand and type."""
    for normalize in ("none", "sum", "softmax", "softmax_rows"):
        for dtype, mask_dtype in ((F64, F64), (F32, F32), (F16, F16), (BF16, F32)):
            yield Case(normalize=normalize, dtype=dtype, mask_dtype=mask_dtype, other=10)
            yield Case(normalize=normalize, dtype=dtype, mask_dtype=mask_dtype, shared=True, batch=3)
        yield Case(normalize=normalize, dtype=BF16)
        yield Case(normalize=normalize, dtype=F16, mask_dtype=F32, other=7, shared=True)


@pytest.mark.parametrize("case", list(_kinds()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)


def _sizes() -> Iterator[Case]:
    """One, prime, a tile and one more, whole tiles; alone and beside another operand."""
    for dtype in (F32, F16):
        yield Case(1, 1, 1, dtype=dtype, normalize="softmax")
        yield Case(1, 5, 8, other=1, dtype=dtype, normalize="softmax_rows")
        yield Case(9, 1, 3, dtype=dtype, normalize="sum")
        yield Case(
            65, 64, 128, dtype=dtype, normalize="softmax", batch=1
        )  # 16-byte copies; all but one of a tile
        yield Case(64, 65, 129, other=136, dtype=dtype, normalize="softmax_rows", batch=1)
        yield Case(33, 130, 40, other=264, dtype=dtype, normalize="sum", batch=1, shared=True)
        yield Case(197, 158, 72, dtype=dtype, normalize="softmax", batch=1)  # ViT-B's mask
        yield Case(64, 52, 192, dtype=dtype, mask_dtype=F32, shared=True)  # MobileViT's
    yield Case(131, 67, 50, other=9, dtype=F64, normalize="softmax", batch=1)
    yield Case(131, 67, 50, dtype=F64, normalize="softmax_rows", shared=True)
    yield Case(256, 205, 144, dtype=BF16, normalize="sum", batch=1)


@pytest.mark.parametrize("case", list(_sizes()), ids=str)
def test_any_size(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(200, 70, 136, 72, "softmax", F16),  # more stages than places, and part of one
        Case(70, 200, 72, 136, "softmax_rows", BF16, F32),
        Case(129, 65, 128, None, "sum", BF16, shared=True, batch=3),
        Case(48, 193, 8, 264, "none", F16, F32),
    ],
    ids=str,
)
def test_warpgroups(case: Case) -> None:
    """Both products by Hopper's, of tokens and gradients whose rows are whole vectors."""
    module = twin.load()
    module.count_traffic(True)
    try:
        check(case)
        products = {row[0] for row in module.traffic() if "merge_kernel" in row[0]}
    finally:
        module.count_traffic(False)
    assert products == {"warpgroup_merge_kernel"}


@pytest.mark.parametrize("normalize", ["none", "softmax", "softmax_rows"])
@pytest.mark.parametrize("sizes", [(37, 29, 24), (70, 50, 24)], ids=str)
def test_a_sample_keeps_its_nan(sizes: tuple[int, int, int], normalize: str) -> None:
    """Where a stage ends behind the last token, the next sample's are no factor of zero."""
    case = Case(*sizes, normalize=normalize, batch=3)
    inputs = make_inputs(case, Guarded())
    inputs["z"][1], inputs["grad_y"][1] = float("nan"), float("nan")
    got = run_kernels(case, inputs, Guarded())
    for name in ("y", "grad_z", "grad_g"):
        assert got[name].isnan().flatten(1).any(1).tolist() == [False, True, False], name


def _grid() -> Iterator[Case]:
    for normalize in ("none", "sum", "softmax", "softmax_rows"):
        for dtype in (F64, F32, F16, BF16):
            for tokens, merged in ((1, 1), (31, 33), (64, 128), (197, 158), (130, 257)):
                for width, other in ((1, None), (32, 130), (200, 64)):
                    for shared in (False, True):
                        if tokens == 1 and normalize == "sum":
                            continue  # the mask's gradient is 0, and the truth's is its own rounding
                        yield Case(tokens, merged, width, other, normalize, dtype, shared=shared)


@pytest.mark.thorough
@pytest.mark.parametrize("case", list(_grid()), ids=str)
def test_every_size(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("normalize", ["softmax", "softmax_rows"])
@pytest.mark.parametrize(("dtype", "mask_dtype"), [(F64, F64), (F32, F32), (F16, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_large_logarithms(normalize: str, dtype: torch.dtype, mask_dtype: torch.dtype, shared: bool) -> None:
    """Weights of nearly one and nearly zero; in float the rounding of a logarithm of 100 would show in every one."""
    check(Case(normalize=normalize, dtype=dtype, mask_dtype=mask_dtype, shared=shared, scale=40.0, other=5))


@pytest.mark.parametrize("dtype", [F64, F32, F16])
@pytest.mark.parametrize("shared", [False, True])
def test_an_empty_column_stays_finite(dtype: torch.dtype, shared: bool) -> None:
    """A column that sums to 0 is divided by 1, and its gradient is that of no normalisation; a sum of 1 is no such."""
    case = Case(merged=40, normalize="sum", dtype=dtype, shared=shared)
    inputs = make_inputs(case, Guarded())
    g = inputs["g"]
    assert g is not None
    g[..., 1] = 0
    g[..., 7] = 0
    g[..., 3, 7], g[..., 5, 7] = 2, -2
    g[..., 9] = 0
    g[..., 4, 9] = 1
    got = run_kernels(case, inputs, Guarded())
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))
    assert (got["y"][:, 1] == 0).all()
    assert (got["divisors"][..., [1, 7, 9]] == 1).all()


@pytest.mark.parametrize(
    ("normalize", "tokens", "merged"), [("sum", 1, 5), ("softmax", 1, 5), ("softmax_rows", 5, 1)]
)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_a_weight_that_is_always_one_has_no_gradient(normalize, tokens, merged, dtype) -> None:
    case = Case(tokens, merged, 40, 16, normalize, dtype)
    inputs = make_inputs(case, Guarded())
    got = run_kernels(case, inputs, Guarded())
    assert (got["grad_g"] == 0).all()
    if tokens == 1:
        z = inputs["z"]
        assert z is not None
        assert torch.equal(got["y"], z.expand(-1, merged, -1))


@pytest.mark.parametrize("normalize", ["softmax", "softmax_rows"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_minus_infinity_hides_a_token(normalize: str, dtype: torch.dtype) -> None:
    case = Case(normalize=normalize, dtype=dtype)
    inputs = make_inputs(case, Guarded())
    g = inputs["g"]
    assert g is not None
    g[:, ::3, 1:] = float("-inf")
    got = run_kernels(case, inputs, Guarded())
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax", "softmax_rows"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "change",
    [
        {"missing": ("z",)},
        {"missing": ("g",)},
        {"missing": ("other",)},
        {"missing": ("z", "other")},
        {"missing": ("z", "g")},
        {"absent": ("y",)},
        {"absent": ("y_other",)},
        {"absent": ("y_other",), "missing": ("z",)},
    ],
    ids=str,
)
def test_absent_gradients(change: dict[str, Any], dtype: torch.dtype, normalize: str) -> None:
    check(Case(20, 12, 16, 8, normalize, dtype, batch=1, **change))


def test_no_incoming_gradient_at_all() -> None:
    case = Case(20, 12, 16, 8, "softmax", F16)
    inputs = {**make_inputs(case, Guarded()), "grad_y": None, "grad_y_other": None}
    got = run_kernels(case, inputs, Guarded())
    assert all((got[f"grad_{name}"] == 0).all() for name in NAMES)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(before=65),  # nothing aligned
        Layout(padding=8),  # rows of whole vectors, with a gap behind
        Layout(padding=1),
        Layout(order=(0, 2, 1, 3), padding=16),  # tokens outside, the batch inside
        Layout(step=2),  # copied
        Layout(order=(0, 1, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_reads_and_writes_any_strides(layout: Layout, normalize: str, dtype: torch.dtype) -> None:
    check(Case(37, 34, 48, 16, normalize, dtype, layout=layout))


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax", "softmax_rows"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_broadcast_inputs(normalize: str, dtype: torch.dtype) -> None:
    """Of strides 0: a mask that is one for all but has a gradient for each, tokens that are the same everywhere."""
    case = Case(normalize=normalize, dtype=dtype, batch=3)
    inputs: dict[str, Any] = make_inputs(case, Guarded())
    inputs["g"] = inputs["g"][:1].expand(3, -1, -1)
    inputs["z"] = inputs["z"][:1, :1].expand(3, case.tokens, -1)
    inputs["grad_y"] = inputs["grad_y"][:1].expand(3, -1, -1)
    got = run_kernels(case, inputs, Guarded())
    compare(case, got, run_reference(case, inputs, None), run_reference(case, inputs, F64))


@pytest.mark.parametrize(("normalize", "dtype"), [("none", BF16), ("sum", F32), ("softmax", F32)], ids=str)
def test_many_samples_of_a_shared_mask(dtype: torch.dtype, normalize: str) -> None:
    """More samples than blocks of threads: each sums over a share of the batch, the last over a smaller one."""
    check(Case(70, 20, 8, normalize=normalize, dtype=dtype, shared=True, batch=300))


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax", "softmax_rows"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_no_samples(normalize: str, dtype: torch.dtype) -> None:
    """A shared mask is there all the same: its norms, once left out, are finite, and so is its gradient."""
    case = Case(batch=0, shared=True, normalize=normalize, dtype=dtype, other=8)
    inputs = make_inputs(case, Guarded())
    got = run_kernels(case, inputs, Guarded())
    torch.testing.assert_close(got["divisors"], run_reference(case, inputs, None)["divisors"])
    assert got["y"].numel() == 0
    assert (got["grad_g"] == 0).all()


def assert_no_schedule_changes_a_bit(case: Case) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    inputs = make_inputs(case, Guarded())
    first: Results = {}
    for seed in twin.SEEDS:
        twin.load().set_seed(seed)
        results = run_kernels(case, inputs, Guarded())
        first = first or results
        for name, tensor in first.items():
            assert torch.equal(results[name], tensor), f"{name}, seed {seed}"


@pytest.mark.parametrize(
    "case",
    [
        Case(
            130, 70, 72, 16, "softmax", batch=1
        ),  # several tiles of every kind, more stages than the pipeline has
        Case(130, 70, 75, 16, "sum", BF16, F32, shared=True, batch=9),
        Case(70, 70, 75, None, "softmax_rows", F32, batch=1),
        Case(66, 33, 40, 16, "softmax", F32, shared=True, batch=9),
        Case(66, 33, 24, 16, "sum", F64, batch=1),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    assert_no_schedule_changes_a_bit(case)


def test_workspace_is_what_the_kernels_need() -> None:
    """None without a normalisation but for shares of the batch, norms in float, a mask of floats for the chain."""
    module = twin.load()

    def sizes(case: Case) -> tuple[int, int]:
        inputs = make_inputs(case, Guarded())
        z, g, other = (inputs[name] for name in NAMES)
        tensors = native.native.arguments(module, None, g, None, inputs["grad_y"], None, z, g, other)
        forward = module.learnable_token_merge_forward_workspace_cuda(*tensors[5:], case.normalize)
        return forward, module.learnable_token_merge_workspace_cuda(*tensors, case.normalize)

    case = Case(40, 20, 8, dtype=F16)
    assert sizes(case) == (0, 0)
    assert sizes(replace(case, shared=True)) == (0, 2 * 40 * 20 * 4)
    assert sizes(replace(case, normalize="softmax")) == (0, 2 * 40 * 20 * 4)
    assert sizes(replace(case, normalize="softmax", dtype=F32)) == (
        2 * 2 * 20 * 4,
        2 * 2 * 20 * 4 + 2 * 40 * 20 * 4,
    )
    assert sizes(replace(case, normalize="softmax_rows", dtype=F64, shared=True))[0] == 2 * 40 * 8


@pytest.mark.parametrize("wrong", ["softmax_rows", "sum", "none"])
def test_another_normalisation_is_noticed(wrong: str) -> None:
    """The tolerance has teeth."""
    case = Case(normalize="softmax", other=8)
    inputs = make_inputs(case, Guarded())
    got = run_reference(replace(case, normalize=wrong), inputs, None)
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    for name in ("y", "y_other", "grad_z", "grad_g", "grad_other"):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(name, got[name], baseline[name], truth[name], factor=GRADIENT)


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over every kernel."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_learnable_token_merge_cuda as tests\n"
        "for dtype in (torch.float64, torch.float32, torch.float16):\n"
        "    for normalize in ('none', 'sum', 'softmax', 'softmax_rows'):\n"
        "        for shared in (False, True):\n"
        "            tests.check(tests.Case(66, 67, 35, 9, normalize, dtype, shared=shared))\n"
        "tests.check(tests.Case(66, 68, 32, 16, 'softmax', torch.bfloat16, torch.float32, shared=True))\n",
        operators=("learnable_token_merge",),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
