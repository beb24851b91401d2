"""The CUDA kernels of block_sparse_linear, run on the host by the twin, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import twin
from block_sparse_calls import NAMES, Call, check, launch, pattern, plain
from guarded import Guarded, Layout
from tolerance import GRADIENT, assert_close_to_truth

from vitkernels import BlockSparseTensor
from vitkernels.kernels.block_sparse_linear import native

pytestmark = pytest.mark.skipif(twin.missing_tools() is not None, reason=str(twin.missing_tools()))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    pytest.param(F64, id="fp64"),
    pytest.param(F32, id="fp32"),
    pytest.param(F16, id="fp16"),
    pytest.param(BF16, id="bf16"),
]
WEIGHTS = [  # shape, block: whole blocks of LPViT's sizes, partial ones, and blocks smaller than a tile
    ((64, 80), (16, 16)),
    ((96, 128), (32, 32)),
    ((128, 192), (64, 64)),
    ((160, 192), (32, 64)),
    ((192, 96), (64, 32)),
    ((70, 50), (32, 16)),
    ((33, 17), (16, 32)),
    ((40, 104), (24, 40)),
    ((5, 7), (2, 3)),
]


@pytest.fixture
def kernels():
    return {"module": twin.load(), "cuda": True}


def call(tokens, shape, block, dtype=F32, *args, mask=None, **options) -> Call:
    """Rows of very different population, an empty row and an empty column where there are more than two. Values beyond
    the matrix are NaN: no kernel may use them."""
    if mask is None:
        rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        mask = torch.rand(rows, columns) < torch.linspace(0.2, 0.8, rows)[:, None]
        mask[-1, -1] = mask[0, 0] = True
        mask[-2] &= rows < 3
        mask[:, 0] &= columns < 3
    made = Call(tokens, pattern(shape, block, mask=mask), dtype, *args, **options)
    made.values[made.beyond()] = float("nan")
    return made


def inputs(c: Call) -> tuple:
    return c.x, c.values, c.bias, *c.params


def run(c: Call, kernels) -> None:
    check(launch(native, c, **kernels), c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), WEIGHTS)
def test_forward_and_gradients(shape, block, dtype, kernels):
    run(call(37, shape, block, dtype), kernels)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_blocks_of_128(dtype, kernels):
    run(call(7, (256, 384), (128, 128), dtype), kernels)


@pytest.mark.parametrize("tokens", [1, 7, 197])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_number_of_tokens(tokens, dtype, kernels):
    run(call(tokens, (96, 64), (32, 32), dtype), kernels)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_tokens(dtype, kernels):
    got = launch(native, call(0, (96, 64), (32, 32), dtype, "gelu"), **kernels)
    assert got["y"].numel() == got["x"].numel() == 0
    assert (got["values"] == 0).all()
    assert (got["bias"] == 0).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_large_tiles_give_what_small_ones_do(transposed, kernels):
    """Large problems take larger tiles of tokens and outputs; the order of the sums is the same."""
    shape, block = ((48, 256), (16, 32)) if transposed else ((256, 48), (32, 16))
    c = call(264 * 128 - 5, shape, block, F16, activation="relu", transposed=transposed)
    y, parts = torch.full_like(c.grad, float("nan")), torch.full_like(c.grad, float("nan"))
    native.forward(y, None, *inputs(c), **kernels)
    for x, part in zip(c.x.split(9000), parts.split(9000), strict=True):
        native.forward(part, None, x, *inputs(c)[1:], **kernels)
    assert torch.equal(y, parts)
    c.x, c.grad = c.x[:40], c.grad[:40]
    check({**launch(native, c, **kernels), "y": y[:40]}, c)


# Half precision with sides of 32, 64 and 128 goes to Hopper's warpgroups, which the twin has.


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((96, 512), (32, 32)),  # more steps than there are stages
        ((320, 352), (32, 32)),  # several groups of outputs
        ((352, 320), (64, 64)),
        ((256, 384), (128, 128)),
        ((256, 192), (128, 32)),
        ((192, 256), (32, 128)),
        ((72, 200), (64, 64)),  # partial blocks that 16 bytes divide
        ((136, 88), (128, 32)),
    ],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_warpgroups(shape, block, dtype, kernels):
    run(call(131, shape, block, dtype, "gelu"), kernels)


@pytest.mark.parametrize(
    ("shape", "block", "tokens", "dtype", "transposed"),
    [
        (
            (96, 136),
            (32, 32),
            512,
            F16,
            False,
        ),  # 128 rows of dW a block of threads; columns end within a piece
        ((96, 136), (32, 32), 512, BF16, True),
        ((328, 72), (64, 32), 579, BF16, False),  # the last stage in part; 8 rows for a warpgroup
        ((200, 128), (32, 128), 600, F16, True),  # 256 rows
        ((40, 392), (128, 64), 1100, BF16, False),  # in two shares of the tokens
        ((456, 64), (128, 32), 1029, F16, False),
    ],
)
def test_weight_gradient_by_warpgroups(shape, block, tokens, dtype, transposed, kernels):
    """Of enough tokens and blocks; what else the backward makes is not asked for."""
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    mask = torch.rand(rows, columns) < 0.6
    if rows > 3:
        mask[-2] = False
    mask[0, 0] = mask[-1, -1] = True
    c = call(tokens, shape, block, dtype, transposed=transposed, bias=False, mask=mask)
    gradient = torch.full_like(c.values, float("nan"))
    module = kernels["module"]
    module.count_traffic(True)
    try:
        y = torch.zeros_like(c.grad)
        native.backward(None, gradient, None, None, c.grad, None, y, y[:, :0], *inputs(c), **kernels)
        assert "hopper_weight_kernel" in {row[0] for row in module.traffic()}
    finally:
        module.count_traffic(False)
    baseline, truth = (plain(c, of)["values"] for of in (dtype, F64))
    assert_close_to_truth("values", gradient, baseline, truth, factor=GRADIENT, reduced=tokens, dtype=dtype)
    assert (gradient[c.beyond()] == 0).all()


def test_weight_gradient_by_warpgroups_is_zero_beyond_the_matrix_beside_infinities(kernels):
    """The copy engine brings zeros there, which an infinity in the same product makes NaN."""
    shape, block, tokens = (200, 192), (32, 128), 512  # columns end with a piece, within a block
    c = call(tokens, shape, block, F16, bias=False)
    c.grad[7] = float("inf")
    gradient = torch.full_like(c.values, float("nan"))
    y = torch.zeros_like(c.grad)
    native.backward(None, gradient, None, None, c.grad, None, y, y[:, :0], *inputs(c), **kernels)
    beyond = c.beyond()
    assert not gradient[~beyond].isfinite().any()
    assert (gradient[beyond] == 0).all()


@pytest.mark.parametrize(
    ("outputs", "tokens"), [(512, 50), (192, 100), (192, 300)], ids=["wide", "narrow", "many"]
)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("block", [32, 64])
def test_warpgroups_of_large_tiles_give_what_those_of_small_ones_do(
    block, transposed, outputs, tokens, kernels
):
    """By blocks of threads with one tile, and with several one after another."""
    shape = (64, outputs) if transposed else (outputs, 64)
    mask = torch.rand(-(-shape[0] // block), -(-shape[1] // block)) < 0.7
    mask.view(-1)[-3:] = torch.tensor([False, True, True])
    c = call(
        192 * tokens - 5, shape, (block, block), F16, activation="relu", transposed=transposed, mask=mask
    )
    y = torch.full_like(c.grad, float("nan"))
    native.forward(y, None, *inputs(c), **kernels)
    some = torch.cat([torch.arange(50), torch.randint(len(y), (30,)), torch.arange(len(y) - 40, len(y))])
    part = torch.full_like(c.grad[some], float("nan"))
    native.forward(part, None, c.x[some], *inputs(c)[1:], **kernels)
    assert torch.equal(y[some], part)
    assert not y.isnan().any()
    c.x, c.grad = c.x[some], c.grad[some]
    check({**launch(native, c, **kernels), "y": y[some]}, c)


def test_warpgroups_with_more_columns_than_a_list_takes_at_once(kernels):
    run(call(3, (64, 32 * 290), (32, 32), BF16, mask=torch.rand(2, 290) < 0.3), kernels)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gelu_far_out(dtype, kernels):
    """Half precision has a GELU of its own."""
    c = call(8, (96, 64), (32, 32), dtype, "gelu", mask=torch.zeros(3, 2))
    c.bias[:8] = torch.tensor([1000.0, -1000, 6, -6, -7, float("inf"), float("nan"), 0])
    y = launch(native, c, **kernels)["y"][0, :8].float()
    want = torch.nn.functional.gelu(c.bias[:8].float())
    torch.testing.assert_close(y, want, rtol=2 * torch.finfo(dtype).eps, atol=6e-8, equal_nan=True)


@pytest.mark.parametrize("block", [32, 64])
def test_every_schedule_of_warpgroups_gives_the_same(block, kernels):
    c = call(150, (320, 480), (block, block), F16, activation="gelu")
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch(native, c, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_the_transpose(activation, transposed, dtype, kernels):
    c = call(40, (96, 80), (32, 16), dtype, activation=activation, transposed=transposed)
    run(c, kernels)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_transposed_partial_blocks(dtype, kernels):
    run(call(19, (70, 50), (32, 16), dtype, transposed=True, bias=False), kernels)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_no_blocks(activation, dtype, kernels):
    c = call(9, (64, 96), (32, 32), dtype, activation, mask=torch.zeros(2, 3))
    got = launch(native, c, **kernels)
    want = torch.nn.functional.gelu(c.bias) if activation == "gelu" else c.bias
    torch.testing.assert_close(got["y"], want.expand(9, 64))
    assert (got["x"] == 0).all()
    assert got["values"].numel() == 0


@pytest.mark.parametrize("dtype", [F32, F16])
def test_all_blocks(dtype, kernels):
    run(call(33, (96, 64), (32, 32), dtype, mask=torch.ones(3, 2)), kernels)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_the_gradient_beyond_the_matrix_is_0_whatever_x_holds(dtype, kernels):
    c = call(9, (70, 50), (32, 16), dtype)
    c.x[3] = float("inf")
    got = launch(native, c, **kernels)["values"]
    assert c.beyond().any()
    assert (got[c.beyond()] == 0).all()


def test_the_worked_example(kernels):
    p, a, c = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(3), indexing="ij")
    values = (p + 1).double() + 0.1 * a + 0.01 * c
    weight = BlockSparseTensor(values, torch.tensor([0, 2, 2, 4]), torch.tensor([0, 2, 0, 1]), (5, 7))
    example = Call(2, weight, F64)
    example.x = torch.stack([torch.arange(1.0, 8.0), (-1.0) ** torch.arange(7)]).double()
    example.grad = torch.tensor([[1, 2, 3, 4, 5], [-1, 0, 1, 0, -1]]).double()
    example.bias.fill_(0.5)
    got = launch(native, example, **kernels)
    want = {
        "y": [[20.58, 21.88, 0.5, 0.5, 78.75], [3.51, 3.71, 0.5, 0.5, -0.5]],
        "x": [[18.2, 18.28, 18.36, 20, 20.05, 20.1, 6.2], [-4, -4.02, -4.04, -4, -4.01, -4.02, -2]],
        "bias": [0, 2, 4, 4, 4],
        "values": [
            [[0, 3, 2], [2, 4, 6]],
            [[6, 0, 0], [14, 0, 0]],
            [[4, 11, 14], [0, 0, 0]],
            [[21, 24, 31], [0, 0, 0]],
        ],
    }
    for name, numbers in want.items():
        torch.testing.assert_close(got[name], torch.tensor(numbers, dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_every_schedule_gives_the_same(dtype, kernels):
    """A missing barrier would show as a difference between orders of threads."""
    c = call(70, (112, 96), (16, 32), dtype, activation="gelu")
    want = None
    for seed in twin.SEEDS:
        kernels["module"].set_seed(seed)
        got = launch(native, c, **kernels)
        want = want or got
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} with seed {seed}"


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("before", "padding"), [(64, 8), (65, 8), (64, 1)])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((96, 72), (32, 24)), ((136, 72), (64, 32)), ((134, 70), (64, 32)), ((72, 72), (6, 6))],
    ids=["whole", "partial_blocks", "odd_rows", "odd_blocks"],
)
def test_nothing_is_read_or_written_outside(shape, block, dtype, before, padding, transposed, kernels):
    """With rows that asynchronous copies can take, and with rows, or all but the first, that they cannot; with rows
    and blocks that do not end where a copy of 16 bytes does, too."""
    guarded, c = Guarded(), call(37, shape, block, dtype, "gelu", transposed)
    want = launch(native, c, **kernels)
    dense = Layout(before=before)
    wide_x, wide_y = (
        Layout((0, 1), padding=padding + -tensor.shape[1] % 8, before=before) for tensor in (c.x, c.grad)
    )
    shapes = {name: tuple(getattr(c, name).shape) for name in NAMES}
    for name, layout in {"x": wide_x, "grad": wide_y, "values": dense, "bias": dense}.items():
        tensor = getattr(c, name)
        setattr(c, name, guarded(tuple(tensor.shape), dtype, layout).copy_(tensor))
    for layout in (wide_y, dense):
        y, kept = (guarded(tuple(c.grad.shape), dtype, layout) for _ in range(2))
        grads = {name: guarded(shape, dtype, dense) for name, shape in shapes.items()}
        native.forward(y, kept, *inputs(c), **kernels)
        native.backward(*grads.values(), None, c.grad, None, y, kept, *inputs(c), **kernels)
        guarded.check()
        for name, tensor in want.items():
            assert torch.equal({"y": y, **grads}[name], tensor), name


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "values")])
def test_each_gradient_alone(wanted, activation, kernels):
    c = call(40, (48, 32), (16, 16), F32, activation)
    want, got = launch(native, c, **kernels), launch(native, c, wanted, **kernels)
    assert set(got) == {"y", *wanted}
    for name in got:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.thorough  # the sanitized build alone takes minutes
def test_sanitizers_find_nothing():
    code = (
        "import torch\n"
        "from block_sparse_calls import Call, launch, pattern\n"
        "from vitkernels.kernels.block_sparse_linear import native\n"
        "for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):\n"
        "    for shape, block in (((96, 128), (32, 32)), ((70, 50), (32, 16)), ((5, 7), (2, 3))):\n"
        "        for transposed in (False, True):\n"
        "            c = Call(67, pattern(shape, block), dtype, 'gelu', transposed)\n"
        "            launch(native, c, module=twin, cuda=True)\n"
    )
    done = twin.run_sanitized(code, operators=("block_sparse_linear",))
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_wrong_kernel_fails_the_rule(kernels):
    c = call(40, (96, 64), (32, 32))
    got = launch(native, c, **kernels)
    for name in got:
        with pytest.raises(AssertionError):
            check({**got, name: got[name] * (1 + 1e-5)}, c)
    with pytest.raises(AssertionError):
        check({**got, "values": got["values"].roll(1, 0)}, c)
