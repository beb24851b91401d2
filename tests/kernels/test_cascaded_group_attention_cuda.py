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

from vitkernels.kernels.cascaded_group_attention import _cuda_limits, native, reference

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


# (channels, window side, kernels) of the stages of EfficientViT M0 to M5, each once.
STAGES = [
    (64, 7, "5555"),
    (128, 7, "5555"),
    (192, 4, "5555"),
    (128, 7, "75"),
    (144, 7, "753"),
    (192, 4, "753"),
    (128, 7, "7533"),
    (192, 7, "753"),
    (224, 4, "75"),
    (240, 7, "555"),
    (320, 4, "5555"),
    (256, 7, "7533"),
    (384, 4, "7533"),
    (288, 7, "753"),
]


def _stages():
    """Every stage in every dtype; by default in one, each dtype with both layouts."""
    for i, stage in enumerate(STAGES):
        for j, dtype in enumerate((F16, BF16, F32)):
            yield pytest.param(stage, dtype, marks=() if i % 3 == j else pytest.mark.thorough)


@pytest.mark.parametrize(("stage", "dtype"), list(_stages()), ids=str)
def test_stages_of_the_models(stage: tuple[int, int, str], dtype: torch.dtype) -> None:
    channels, side, kernels = stage
    odd = STAGES.index(stage) % 2
    layout = ("nchw", "channels_last")[odd]
    case = Case(channels, tuple(map(int, kernels)), (side, side), (side, side), dtype, layout=layout)
    # Backward in fp32 and one of the halves.
    if dtype != F32 and odd == (dtype == F16):
        case = replace(case, with_heads=False)
    check(case)


def _cases() -> Iterator[Case]:
    for dtype in (F64, F32, F16, BF16):
        yield Case(32, (3, 5), (3, 5), (13, 5), dtype, layout="nchw")  # padded below
        yield Case(48, (5,), (7, 7), (8, 8), dtype, kernel_max=7, residual=False)  # padded on both sides
        yield Case(64, (3, 1, 3, 7), (2, 3), (1, 1), dtype)  # one token, the rest padding
        yield Case(14, (3, 5), (3, 2), (4, 5), dtype, key_dim=3, batch=2)  # nothing is a multiple of anything
        yield Case(33, (1, 3, 1), (1, 1), (2, 3), dtype, key_dim=4)
    for dtype in (F32, F16):
        yield Case(32, (3,), (12, 12), (12, 12), dtype)  # the largest of the models' windows
        yield Case(16, (9,), (13, 12), (13, 12), dtype)  # beyond the tensor-core kernels
        yield Case(64, (3, 3), (4, 4), (4, 8), dtype, key_dim=32)
        yield Case(32, (5, 5), (1, 16), (2, 40), dtype, layout="nchw")  # windows of one row
        yield Case(32, (3, 3), (6, 6), (6, 6), dtype)
        yield Case(32, (5, 3), (8, 8), (8, 8), dtype, layout="nchw")  # no row without a token
    yield Case(32, (3, 3), (4, 4), (5, 4), F16, weight_dtype=F32, table_dtype=F32)
    yield Case(32, (3, 3), (3, 3), (5, 4), BF16, weight_dtype=F32, layout="nchw")
    yield Case(32, (3, 3), (3, 3), (5, 4), BF16, table_dtype=F32)
    yield Case(20, (3, 3), (3, 3), (5, 4), F16, weight_dtype=F32)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)
    if case.dtype in (F16, BF16):
        check(replace(case, with_heads=False))  # heads of any sign, and as an inference call leaves them out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("nchw", "channels_last")])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_reads_and_writes_any_strides(dtype: torch.dtype, layout: str) -> None:
    check(Case(32, (5, 3), (4, 3), (5, 7), dtype, batch=2, layout=layout))
    check(Case(32, (5, 3), (7, 7), (7, 7), dtype, layout=layout))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"grad_out": False},
        {"grad_out": False, "grad_heads": True},
        {"grad_heads": True},
        {"missing": ("x",)},
        {"missing": WEIGHTS},
        {"missing": ("qkv_weight", "qkv_bias", "dw_weight")},
        {"missing": ("x", *WEIGHTS[:5])},
        {"missing": ("qkv_weight", "dw_bias", "attn_bias", "proj_weight", "proj_bias")},
        {"missing": ("x", *WEIGHTS)},
    ],
    ids=str,
)
def test_absent_gradients(change: dict[str, Any], dtype: torch.dtype) -> None:
    check(replace(Case(32, (3, 3), (3, 3), (3, 4), dtype), **change))


def test_several_windows_share_a_block() -> None:
    """More windows than a large device takes at once: blocks hold several, and the last one fewer."""
    check(Case(16, (3,), (2, 2), (62, 73), F16, with_heads=False))
    check(Case(16, (3,), (1, 3), (23, 73), BF16, with_heads=False, layout="nchw"))
    check(Case(16, (3,), (7, 7), (7, 7 * 530), F16, with_heads=False))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_blocks_walk_over_windows(dtype: torch.dtype) -> None:
    """More windows than blocks of the backward: each adds up its own sums, over several chunks of tokens."""
    check(Case(16, (3,), (1, 2), (2 * 27, 41), dtype))


def test_windows_do_not_see_each_other() -> None:
    """NaN in one window, next to others in a block, reaches no other."""
    case = Case(16, (3,), (2, 2), (48, 48), F16, with_heads=False)
    inputs = make_inputs(case, Guarded())
    clean = run_kernels(case, inputs, Guarded())["out"].clone()
    inputs.tensors["x"][0, :, 20:22, 30:32] = float("nan")
    out = run_kernels(case, inputs, Guarded())["out"]
    assert out[0, :, 20:22, 30:32].isnan().all()
    clean[0, :, 20:22, 30:32] = out[0, :, 20:22, 30:32]
    assert torch.equal(out.nan_to_num(7.0), clean.nan_to_num(7.0))


def test_a_window_that_outgrows_shared_memory() -> None:
    """What lies between the steps then lies in a workspace, which the forward asks for."""
    check(Case(96, (3, 3), (12, 12), (12, 12), F64, with_heads=False))
    check(Case(288, (3, 3, 3), (12, 12), (12, 12), F16, with_heads=False))


def test_limits_name_what_does_not_fit() -> None:
    def reasons(case: Case) -> list[str]:
        heads, k, d = len(case.kernels), case.key_dim, case.channels // len(case.kernels)
        shapes = ((1, case.channels, *case.size), (heads, 2 * k + d, d), (), (heads, k, 3, 3), (), (), (), ())
        tensors = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in shapes]
        return _cuda_limits(*tensors, *case.params)

    assert reasons(Case(384, (3,) * 4, (12, 12), (12, 12))) == []
    assert reasons(Case(33, (3,) * 3, (64, 64), (64, 64), F64)) == []
    assert "below 2 GB" in reasons(Case(64, (3, 3), (128, 128), (128, 128), F32))[0]
    assert "up to 16 heads, got 17" in reasons(Case(34, (3,) * 17))[0]


def assert_no_schedule_changes_a_bit(case: Case, seeds: Sequence[int]) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    guarded = Guarded()
    inputs = make_inputs(case, guarded)
    first: dict[str, torch.Tensor] = {}
    for seed in seeds:
        twin.load().set_seed(seed)
        results = run_kernels(case, inputs, Guarded())
        first = first or results
        for name, tensor in first.items():
            assert torch.equal(results[name], tensor), f"{name}, seed {seed}"
    guarded.check()


@pytest.mark.parametrize(
    "case",
    [
        Case(32, (3, 5), (4, 4), (4, 5), F16, layout="nchw"),
        Case(48, (5, 3, 3), (7, 7), (7, 7), BF16),
        Case(160, (3, 3), (4, 4), (4, 4), F16),  # more columns than a tile of weights has
        Case(32, (3, 5), (3, 4), (3, 5), F32),
        Case(32, (3, 5), (3, 4), (3, 5), F64, layout="nchw"),
        Case(32, (3,), (12, 12), (12, 12), F16, with_heads=False),
        Case(20, (3, 5), (3, 4), (3, 4), F16),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    assert_no_schedule_changes_a_bit(case, twin.SEEDS)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_no_schedule_changes_a_walk_over_windows(dtype: torch.dtype) -> None:
    case = Case(16, (3,), (1, 2), (27, 41), dtype)
    assert_no_schedule_changes_a_bit(case, twin.SEEDS[: max(2, len(twin.SEEDS) // 8)])


def _wrong(case: Case, inputs: Inputs, mistake: str) -> dict[str, torch.Tensor]:
    """What a kernel with this mistake would give, from the reference in the dtype under test."""
    if mistake == "transposed window":
        return run_reference(replace(case, window=case.window[::-1]), inputs, None)
    tensors = dict(inputs.tensors)
    if mistake == "one tap off":
        tensors["dw_weight"] = tensors["dw_weight"].roll(1, -1)
    elif mistake == "no cascade":
        tensors["x"] = tensors["x"].clone()
        tensors["x"][:, case.channels // 2 :] += 0.05
    elif mistake == "bias of another offset":
        tensors["attn_bias"] = tensors["attn_bias"].roll(1, -1)
    return run_reference(case, replace(inputs, tensors=tensors), None)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "mistake", ["transposed window", "one tap off", "no cascade", "bias of another offset"]
)
def test_mistakes_are_noticed(mistake: str, dtype: torch.dtype) -> None:
    """The tolerance has teeth, forward and backward."""
    case = Case(32, (3, 3), (3, 5), (15, 15), dtype, clear_signs=False)
    inputs = make_inputs(case, Guarded())
    got = _wrong(case, inputs, mistake)
    baseline, truth = run_reference(case, inputs, None), run_reference(case, inputs, F64)
    for name in ("out", "grad_x", "grad_qkv_weight"):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(name, got[name], baseline[name], truth[name], factor=GRADIENT, dtype=dtype)


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over each path, forward and backward."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_cascaded_group_attention_cuda as tests\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    for window in ((3, 3), (7, 7)):\n"
        "        tests.check(tests.Case(32, (5, 3), window, (4, 8), dtype, layout='nchw'))\n"
        "    tests.check(tests.Case(14, (3, 5), (3, 2), (4, 5), dtype, key_dim=3))\n"
        "tests.check(tests.Case(32, (3,), (12, 12), (12, 12), torch.bfloat16, with_heads=False))\n"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
