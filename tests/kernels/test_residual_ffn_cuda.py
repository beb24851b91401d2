"""The CUDA kernels of the residual FFN, run on the host by the twin, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import twin
from far import far
from guarded import Guarded, Layout
from tolerance import FORWARD, assert_close_to_truth

from vitkernels.core import native as extension
from vitkernels.kernels.residual_ffn import _cuda_limits, native, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAYOUTS = {
    "nchw": Layout(),
    "nchw_offset": Layout(before=65),
    "nchw_padded_rows": Layout(padding=3),
    "channels_last": Layout((0, 2, 3, 1)),
    "channels_last_offset": Layout((0, 2, 3, 1), before=65),
    "channels_last_of_wider": Layout((0, 2, 3, 1), padding=16),
    "channels_last_padded": Layout((0, 2, 3, 1), padding=3),
    # Channels at multiples of 16 bytes but for the step from one image, row or column to the next.
    "odd_images": Layout((2, 3, 0, 1), padding=4),
    "odd_rows": Layout((0, 3, 2, 1), padding=4),
    "odd_columns": Layout((0, 2, 3, 1), padding=4),
    "odd": Layout((3, 1, 0, 2), step=2, before=37),
}

WEIGHTS = {
    "dense": Layout(),
    "offset": Layout(before=65),
    "transposed": Layout((1, 0, 2, 3)),
    "strided": Layout(step=2),
    # Rows apart: at multiples of 16 bytes, and not.
    "padded": Layout((2, 3, 0, 1), padding=8),
    "odd_rows": Layout((2, 3, 0, 1), padding=3),
}

VECTORS = {  # biases and scales; the convolution's weights
    "dense": (Layout((0,)), Layout((0, 1, 2))),
    "offset": (Layout((0,), before=65), Layout((0, 1, 2), before=65)),
    "strided": (Layout((0,), step=2), Layout((0, 2, 1), step=2)),
}

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

Tensors = list[torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    channels: int
    hidden: int
    size: tuple[int, int]
    dtype: torch.dtype = F16
    batch: int = 1
    layout: str = "channels_last"
    wide_vectors: bool = True  # as apply has them
    scales: bool = True
    dw: bool = True
    weights: str = "dense"  # [out, in, 1, 1]
    vectors: str = "dense"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, self.size))
        parts = "".join(("-dw" * self.dw, "-scales" * self.scales, "-wide" * self.wide_vectors))
        return f"{self.channels}-{self.hidden}-{size}-b{self.batch}-{dtype}-{self.layout}{parts}"


# Tiles of tokens and of weights in two launches, the last of each in part. Hopper's kernels, which would take so
# many tokens, do not take these weights.
TILES = Case(240, 432, (8, 71), F16, layout="nchw", weights="offset")
# One launch without a workspace, if Hopper's kernels do not take it.
MANY = Case(192, 384, (14, 14), batch=32)
# Hopper's: several maps a block, the last of them in part; bands of a map; a line that is a map. On one multiprocessor
# products take large tiles, on as many as an H200 has small ones.
HOPPER = [
    Case(96, 176, (5, 5), F16, batch=29, layout="nchw"),
    Case(80, 208, (18, 47), BF16, layout="channels_last"),
    Case(144, 64, (17, 31), BF16, layout="nchw", wide_vectors=False, scales=False),
    Case(128, 320, (1, 530), F16, layout="channels_last"),
    Case(208, 96, (600, 1), F16, layout="nchw", dw=False),
]
each_size_of_device = pytest.mark.parametrize("processors", [1, 132])


def make_inputs(case: Case, guarded: Guarded) -> Tensors:
    channels, hidden = case.channels, case.hidden
    vectors = torch.promote_types(case.dtype, F32) if case.wide_vectors else case.dtype

    def vector(*shape: int) -> torch.Tensor:
        return guarded.random(shape, vectors, VECTORS[case.vectors][len(shape) > 1])

    return [
        guarded.random((case.batch, channels, *case.size), case.dtype, LAYOUTS[case.layout]),
        guarded.random((hidden, channels, 1, 1), case.dtype, WEIGHTS[case.weights]).mul_(channels**-0.5),
        vector(hidden),
        guarded.random((channels, hidden, 1, 1), case.dtype, WEIGHTS[case.weights]).mul_(hidden**-0.5),
        vector(channels),
        vector(hidden) if case.scales else None,
        vector(channels) if case.scales else None,
        vector(channels, 3, 3).mul_(1 / 3) if case.dw else None,
        vector(channels) if case.dw else None,
    ]


@pytest.fixture
def device() -> Iterator[Callable[[int], None]]:
    """Sets the number of multiprocessors that the twin has."""
    yield twin.load().set_processors
    twin.load().set_processors(1)


def run_kernels(case: Case, inputs: Tensors, walls: bool = False) -> torch.Tensor:
    guarded, module = Guarded(walls), twin.load()
    assert inputs[0] is not None
    out = guarded(tuple(inputs[0].shape), case.dtype, LAYOUTS[case.layout])
    if walls:  # behind the workspace too
        arguments = extension.arguments(module, out, *inputs)
        size = module.residual_ffn_workspace_cuda(0, *arguments) // case.dtype.itemsize
        kept = guarded((size,), case.dtype, Layout((0,)))
        module.residual_ffn_forward_cuda(0, 0, kept.data_ptr(), *arguments)
    else:
        native.forward(out, *inputs, module=module, cuda=True)  # type: ignore[arg-type]
    guarded.check()
    return out


def run_reference(inputs: Tensors, dtype: torch.dtype | None) -> torch.Tensor:
    (out,) = reference.forward(*(t if t is None or dtype is None else t.to(dtype) for t in inputs))  # type: ignore[arg-type]
    return out


def check(case: Case, seed: int = 0, walls: bool = False) -> None:
    torch.manual_seed(seed)
    guarded = Guarded(walls)
    inputs = make_inputs(case, guarded)
    twin.load().set_seed(seed)
    got = run_kernels(case, inputs, walls)
    guarded.check()
    baseline, truth = run_reference(inputs, None), run_reference(inputs, F64)
    assert_close_to_truth(str(case), got, baseline, truth, factor=FORWARD, dtype=case.dtype)


# (channels, map side) of the stages of EfficientViT M0 to M5, each once.
STAGES = [
    *((64, 14), (128, 14), (192, 14)),
    *((128, 7), (144, 7), (192, 7), (240, 7), (256, 7), (288, 7)),
    *((192, 4), (224, 4), (320, 4), (384, 4)),
]


@pytest.mark.parametrize(("channels", "side"), STAGES)
def test_stages_of_the_models(channels: int, side: int) -> None:
    odd = STAGES.index((channels, side)) % 2
    layout = ("nchw", "channels_last")[odd]
    check(Case(channels, 2 * channels, (side, side), (F16, BF16)[odd], layout=layout))


def _cases() -> Iterator[Case]:
    for dtype in (F64, F32, F16, BF16):
        yield Case(32, 64, (7, 7), dtype, batch=2, layout="nchw")
        yield Case(48, 80, (4, 4), dtype, batch=3)
        yield Case(16, 16, (1, 13), dtype, layout="nchw", wide_vectors=False)
        yield Case(32, 16, (13, 1), dtype, wide_vectors=False)
        yield Case(17, 31, (3, 5), dtype, batch=2)  # nothing is a multiple of anything
        yield Case(5, 7, (1, 1), dtype, layout="nchw")
        yield Case(70, 130, (9, 8), dtype, layout="nchw")  # several tiles each way
    for dtype in (F16, BF16):
        yield Case(160, 208, (5, 7), dtype, layout="nchw", wide_vectors=False)  # two launches
        yield Case(272, 288, (3, 3), dtype, batch=2)
    yield TILES
    yield replace(TILES, dtype=BF16, layout="channels_last", wide_vectors=False, scales=False)
    yield Case(1040, 32, (3, 2), F16)  # more channels than a turn of the threads has
    yield Case(1600, 3216, (1, 2), F16)  # beyond the shared memory of both


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_reference(case: Case) -> None:
    check(case)


@each_size_of_device
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_many_tokens_on_hopper(case: Case, processors: int, device: Callable[[int], None]) -> None:
    device(processors)
    check_on_hopper(case, walls=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hopper_reads_and_writes_any_strides(layout: str) -> None:
    case = Case(96, 64, (9, 40), batch=2, layout=layout)
    check_on_hopper(case)


def test_hopper_reads_weights_and_vectors_with_steps() -> None:
    check_on_hopper(Case(96, 80, (2, 345), BF16, layout="nchw", weights="padded", vectors="strided"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_reads_and_writes_any_strides(dtype: torch.dtype, layout: str) -> None:
    check(Case(32, 48, (6, 2), dtype, batch=2, layout=layout))
    if dtype == F16:
        check(Case(192, 256, (6, 2), dtype, batch=2, layout=layout))


@pytest.mark.parametrize("weights", ["offset", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_weights_of_any_strides(dtype: torch.dtype, weights: str) -> None:
    check(Case(32, 48, (5, 3), dtype, weights=weights))
    if dtype == F16:
        check(Case(192, 256, (5, 3), dtype, weights=weights))


@pytest.mark.parametrize("vectors", ["offset", "strided"])
@pytest.mark.parametrize("case", [Case(32, 48, (5, 3)), Case(192, 208, (5, 3)), TILES], ids=str)
def test_vectors_of_any_strides(case: Case, vectors: str) -> None:
    check(replace(case, vectors=vectors))


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["ones", "scales"])
@pytest.mark.parametrize("dw", [False, True], ids=["ffn", "dw"])
def test_absent_arguments(dtype: torch.dtype, scales: bool, dw: bool) -> None:
    for channels in (32, 208, 20):
        check(Case(channels, 64, (4, 5), dtype, batch=2, scales=scales, dw=dw))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(32, 3), (192, 3), (192, 11)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_images_far_apart(layout: str, channels: int, side: int, dtype: torch.dtype) -> None:
    """Offsets of 64 bits: 32 would wrap."""
    case = Case(channels, 256 if side == 3 else 32, (side, side), dtype, batch=3)
    inputs = make_inputs(case, Guarded())
    expected = run_kernels(case, inputs)
    order = (0, 2, 3, 1) if layout == "channels_last" else (0, 1, 2, 3)
    back = (0, 3, 1, 2) if layout == "channels_last" else (0, 1, 2, 3)
    x, out = (far(t.permute(order), 0).permute(back) for t in (inputs[0], torch.zeros_like(expected)))
    native.forward(out, x, *inputs[1:], module=twin.load(), cuda=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_tiles_of_many_tokens(layout: str) -> None:
    """More tokens than a large device takes at once in tiles of 16, and of 32."""
    check(Case(16, 32, (53, 81), F16, batch=2, layout=layout))
    check(Case(16, 16, (14, 14), BF16, batch=87, layout=layout, dw=False))


def workspace(case: Case, inputs: Tensors | None = None) -> int:
    inputs = inputs or make_inputs(case, Guarded())
    module = twin.load()
    return module.residual_ffn_workspace_cuda(
        0, *extension.arguments(module, torch.empty_like(inputs[0]), *inputs)
    )


def check_on_hopper(case: Case, walls: bool = False) -> None:
    """`check`, of calls that Hopper's kernels take."""
    module = twin.load()
    module.count_traffic(True)
    try:
        check(case, walls=walls)
        assert {row[0] for row in module.traffic()} == {"hopper_inputs_kernel", "hopper_product_kernel"}
    finally:
        module.count_traffic(False)


def test_every_path_is_taken() -> None:
    """One launch without a workspace, two with the hidden layer and u in it, three with the hidden layer.

    On Hopper many tokens take three with both.
    """
    assert workspace(Case(64, 128, (14, 14))) == 0
    assert workspace(Case(192, 384, (14, 14))) == 2 * 196 * (192 + 384)
    assert workspace(MANY) == 2 * 32 * 196 * (192 + 384)
    assert workspace(TILES) == 2 * 568 * (240 + 432)
    assert workspace(Case(65, 130, (14, 14))) == 2 * 196 * 130
    assert workspace(Case(64, 128, (14, 14), F32)) == 4 * 196 * 128


@pytest.mark.parametrize("weights", ["offset", "transposed", "strided", "odd_rows", "one_row"])
def test_hopper_leaves_weights_that_the_copy_engine_does_not_take(weights: str) -> None:
    inputs = make_inputs(MANY, Guarded())
    if weights == "one_row":
        others = [t if t is None else t[:1].expand_as(t) for t in inputs]
    else:
        others = make_inputs(replace(MANY, batch=1, weights=weights), Guarded())
    for i in (1, 3):
        assert workspace(MANY, [*inputs[:i], others[i], *inputs[i + 1 :]]) == 0


def test_hopper_leaves_lines_beyond_shared_memory() -> None:
    assert workspace(replace(MANY, size=(1, 600), batch=10)) == 0


@pytest.mark.parametrize(("channels", "batch"), [(32, 2), (192, 2), (24, 2), (208, 9)])
def test_a_nan_reaches_exactly_its_neighbourhood(channels: int, batch: int) -> None:
    for dw, reach in ((False, 0), (True, 1)):
        for layout in ("nchw", "channels_last"):
            case = Case(channels, 256, (6, 7), F16, batch=batch, layout=layout, dw=dw)
            inputs = make_inputs(case, Guarded())
            inputs[0][1, 3, 2, 6] = float("nan")
            hit = torch.zeros(batch, 6, 7, dtype=torch.bool)
            hit[1, 2 - reach : 3 + reach, 6 - reach :] = True
            out = run_kernels(case, inputs)
            assert torch.equal(out.isnan().all(1), hit)
            assert torch.equal(out.isnan().any(1), hit)


@pytest.mark.parametrize(
    "case",
    [
        Case(32, 48, (5, 7), F16, batch=2, layout="nchw"),
        Case(64, 144, (7, 7), BF16),
        Case(192, 256, (4, 5), F16, layout="nchw"),
        Case(208, 192, (4, 5), BF16, wide_vectors=False),
        Case(20, 70, (9, 8), F16),
        Case(20, 70, (9, 8), F32, layout="nchw"),
        Case(33, 17, (5, 4), F64),
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    assert_no_schedule_changes_a_bit(case, twin.SEEDS)


def test_no_schedule_changes_a_bit_of_tiles() -> None:
    assert_no_schedule_changes_a_bit(TILES, twin.SEEDS[: max(2, len(twin.SEEDS) // 8)])


@each_size_of_device
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_no_schedule_changes_a_bit_on_hopper(
    layout: str, processors: int, device: Callable[[int], None]
) -> None:
    device(processors)
    case = Case(208, 112, (6, 9), BF16, batch=6, layout=layout)
    assert_no_schedule_changes_a_bit(case, twin.SEEDS[: max(2, len(twin.SEEDS) // 4)])


def assert_no_schedule_changes_a_bit(case: Case, seeds: Sequence[int]) -> None:
    """A missing barrier shows as a result that depends on the order in which the fibers run."""
    inputs = make_inputs(case, Guarded())
    first = None
    for seed in seeds:
        twin.load().set_seed(seed)
        out = run_kernels(case, inputs)
        first = out if first is None else first
        assert torch.equal(out, first), seed


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_mistakes_are_noticed(dtype: torch.dtype) -> None:
    """The tolerance sees a tap at another place, a ReLU left out, a scale off by 1 % and a lost row."""
    case = Case(32, 64, (5, 4), dtype, batch=2, wide_vectors=False)
    inputs = make_inputs(case, Guarded())
    baseline, truth = run_reference(inputs, None), run_reference(inputs, F64)
    for index, change in (
        (7, lambda t: t.flip(2)),
        (2, lambda t: t + 100),
        (6, lambda t: t * 1.02),
        (1, lambda t: torch.cat([t[:-1], 0 * t[-1:]])),
    ):
        wrong = [change(t) if i == index else t for i, t in enumerate(inputs)]
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_truth(
                "out", run_reference(wrong, None), baseline, truth, factor=FORWARD, dtype=dtype
            )


def test_limits_name_what_does_not_fit() -> None:
    def reasons(*shape: int) -> list[str]:
        return _cuda_limits(torch.empty(shape, device="meta"))

    assert reasons(2**15 - 1, 7, 2**8, 2**8) == []
    assert reasons(2**15, 7, 2**8, 2**8) == ["takes fewer than 2^31 positions, got 2147483648"]


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing() -> None:
    """Address and undefined-behaviour sanitizers over each path."""
    done = twin.run_sanitized(
        "import torch\n"
        "import twin as builder\n"
        "builder.load = lambda: twin\n"
        "import kernels.test_residual_ffn_cuda as tests\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    for layout in ('nchw', 'channels_last'):\n"
        "        for channels in (32, 192, 17):\n"
        "            tests.check(tests.Case(channels, 256, (4, 5), dtype, 2, layout))\n"
        "tests.check(tests.HOPPER[1])\n"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
