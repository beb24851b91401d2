from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from randomise import relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from vitkernels import BlockSparseTensor
from vitkernels.nn import BlockSparseLinear

# 70 x 50 in blocks of 32 x 16: the last block row and column are partial, row 1 and column 2 are empty.
MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]])


def dense_layer(**options) -> nn.Linear:
    return nn.Linear(50, 70, **options)


def elements(mask: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    spread = mask.repeat_interleave(32, 0).repeat_interleave(16, 1)
    return spread[: layer.out_features, : layer.in_features].to(layer.weight)


def sparse_layer(dense: nn.Linear, mask: torch.Tensor = MASK) -> BlockSparseLinear:
    return BlockSparseLinear.from_linear(dense, (32, 16), mask)


def padding_of(layer: BlockSparseLinear) -> torch.Tensor:
    """Elements of values that lie beyond the matrix."""
    ones = BlockSparseTensor.from_dense(torch.ones(layer.out_features, layer.in_features), layer.block_shape)
    place = layer.weight.row_indices.long() * ones.grid[1] + layer.col_indices
    return ones.values[place] == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_equals_the_masked_dense_layer(bias: bool, activation: str | None) -> None:
    dense = dense_layer(bias=bias).double()
    layer, x = sparse_layer(dense), torch.randn(2, 7, 50, dtype=torch.float64, requires_grad=True)
    masked = dense.weight * elements(MASK, dense)
    expected = F.linear(x, masked, dense.bias)
    expected = {None: expected, "gelu": F.gelu(expected), "relu": F.relu(expected)}[activation]
    got = layer(x, activation)
    assert relative_error(got, expected) < 1e-12
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), [x, dense.weight])
    found = torch.autograd.grad((got * direction).sum(), [x, layer.values])
    assert relative_error(found[0], wanted[0]) < 1e-12
    assert relative_error(layer.weight.with_values(found[1]).to_dense(), wanted[1]) < 1e-12


def test_state_and_names() -> None:
    dense = dense_layer()
    layer = sparse_layer(dense)
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    assert layer.crow_indices.tolist() == [0, 2, 2, 5]
    assert layer.col_indices.tolist() == [0, 3, 0, 1, 3]
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert layer.bias is dense.bias
    assert "block_shape=(32, 16), density=0.417" in repr(layer)
    assert torch.equal(layer.to_linear().weight, dense.weight * elements(MASK, dense))
    assert torch.equal(layer.weight.to_dense(), layer.to_linear().weight)
    frozen = dense_layer().requires_grad_(False).eval().bfloat16()
    layer = sparse_layer(frozen)
    assert not layer.values.requires_grad
    assert not layer.training
    assert layer.values.dtype is torch.bfloat16


def test_patterns_of_the_constructors() -> None:
    dense = dense_layer()
    assert torch.equal(sparse_layer(dense, elements(MASK, dense)).index, sparse_layer(dense).index)
    half = BlockSparseLinear.from_linear(dense, (32, 16), density=0.5)
    kept = half.weight.to_dense() != 0
    means = [
        (rows.abs().mean().item(), bool(kept[32 * i, 16 * j]))
        for i, band in enumerate(dense.weight.split(32))
        for j, rows in enumerate(band.split(16, 1))
    ]
    assert [keep for _, keep in sorted(means)] == [False] * 6 + [True] * 6
    drawn = BlockSparseLinear(50, 70, (32, 16), density=0.25)
    assert len(drawn.values) == 3
    assert drawn.density == 0.25
    assert not drawn.values[padding_of(drawn)].any()
    assert drawn.values[~padding_of(drawn)].all()
    empty = BlockSparseLinear(50, 70, 32, density=0)
    assert torch.equal(empty(torch.randn(3, 50)), empty.bias.expand(3, 70))
    assert 0 < empty.bias.abs().max() <= 50**-0.5
    assert BlockSparseLinear(50, 70, 32, bias=False).bias is None
    with torch.device("meta"):
        assert BlockSparseLinear(50, 70, 32).values.is_meta


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizers_keep_the_padding_at_zero(kind: str) -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(9, 50)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    }[kind](layer.parameters())
    before, pattern = layer.values.detach().clone(), layer.index.clone()
    outside = padding_of(layer)
    assert outside.any()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        assert not layer.values.grad[outside].any()
        optimizer.step()
    assert not layer.values[outside].any()
    assert not torch.equal(layer.values, before)
    assert torch.equal(layer.index, pattern)


def test_copies_pickles_and_moves() -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(4, 50)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(copied(x), expected)
        assert copied.values is not layer.values
    double = copy.deepcopy(layer).double()
    assert double.index.dtype is torch.int32
    assert relative_error(double(x.double()), expected) < 1e-6


def test_the_pattern_survives_the_meta_device_and_to_empty() -> None:
    """The index was once left as to_empty() made it: any numbers, by which the kernels read memory."""
    with torch.device("meta"):
        built = BlockSparseLinear(50, 70, (32, 16), mask=MASK)
    moved = BlockSparseLinear(50, 70, (32, 16), mask=MASK).to("meta")
    assert built.index.is_meta
    assert moved.index.is_meta
    for layer in (built, copy.deepcopy(moved), BlockSparseLinear(50, 70, (32, 16), mask=MASK)):
        for buffer in layer.to_empty(device="cpu").buffers():
            assert buffer.min() >= 0
            assert buffer.max() <= 5
        layer.reset_parameters()
        assert not layer.values[padding_of(layer)].any()
        dense = layer.to_linear()
        assert torch.equal(dense.weight != 0, elements(MASK, dense) != 0)
        x = torch.randn(4, 50)
        assert relative_error(layer(x), dense(x)) < 1e-6
        assert layer.crow_indices.tolist() == [0, 2, 2, 5]
        assert layer.state_dict().keys() == {"values", "bias", "crow_indices", "col_indices"}


def test_values_may_be_pruned() -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(4, 50)
    index = layer.index.clone()
    prune.random_unstructured(layer, "values", 0.5)
    kept = (layer.values != 0).float().mean()
    assert kept < 0.5
    layer(x).sum().backward()
    assert not layer.values_orig.grad[layer.values_mask == 0].any()
    assert layer.to("meta").index.is_meta  # though `values` stay until the next call
    assert torch.equal(layer.to_empty(device="cpu").index, index)


def test_loading_adopts_another_pattern() -> None:
    source = sparse_layer(dense_layer())
    for density in (0.25, 5 / 12, 1.0):
        layer = BlockSparseLinear(50, 70, (32, 16), density=density)
        values = layer.values
        layer(torch.randn(1, 50)).sum().backward()
        assert layer.load_state_dict(source.state_dict()).missing_keys == []
        assert layer.values is values
        x = torch.randn(5, 50, requires_grad=True)
        out = layer(x)
        assert torch.equal(out, source(x))
        # through the transposed index, which is of the new pattern too
        gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, source)]
        assert torch.equal(*gradients)
    other = BlockSparseLinear(50, 70, 16)
    other.load_state_dict(source.state_dict(), assign=True)
    assert other.block_shape == (32, 16)
    assert torch.equal(other(x), source(x))


def test_states_that_do_not_fit() -> None:
    layer = sparse_layer(dense_layer())
    state = layer.state_dict()
    with pytest.raises(
        RuntimeError, match=r"(?s)weight: expected the state_dict of a BlockSparseLinear; got a dense"
    ):
        layer.load_state_dict(dense_layer().state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)no matrix \(70, 50\).*`col_indices`"):
        layer.load_state_dict({**state, "col_indices": state["col_indices"].flip(0)})
    with pytest.raises(RuntimeError, match=r"(?s)no matrix \(70, 50\).*`crow_indices`"):
        layer.load_state_dict(BlockSparseLinear(50, 96, (16, 16)).state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)no matrix \(70, 50\).*meta tensor; no data"):
        layer.load_state_dict({key: value.to("meta") for key, value in state.items()})
    with pytest.raises(RuntimeError, match=r"Missing key.*col_indices"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "col_indices"})
    assert torch.equal(layer.state_dict()["values"], state["values"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockSparseLinear(8, 8, 4, density=1.5), r"`density`: expected a number from 0 to 1"),
        (lambda: BlockSparseLinear(8, 8, (4, 4, 4)), r"`block_shape`: expected 2 ints"),
        (lambda: BlockSparseLinear(0, 8, 4), r"`in_features`"),
        (lambda: BlockSparseLinear(8, 8, 4, mask=torch.ones(3, 2)), r"`mask`: expected shape .* = \[2, 2\]"),
        (lambda: BlockSparseLinear(8, 8, 4, mask=[[1, 0], [0, 1]]), r"`mask`: expected a tensor .*got \[\["),
        (lambda: BlockSparseLinear.from_linear(dense_layer(), 32, [[1]]), r"`mask`: expected a tensor .*got"),
        (lambda: BlockSparseLinear.from_linear(nn.Identity(), 4), r"`linear`: expected a torch.nn.Linear"),
        (
            lambda: BlockSparseLinear.from_linear(dense_layer(), 32, torch.ones(3, 2), density=0.5),
            r"`density`",
        ),
        (
            lambda: BlockSparseLinear(8, 8, 4).adopt_pattern(BlockSparseLinear(8, 12, 4).weight),
            r"`pattern`: expected a matrix \(8, 8\)",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(6, 50)
    dense = layer.to_linear()
    with torch.autocast("cpu", dtype):
        got, baseline = layer(x, "gelu"), F.gelu(dense(x))
    assert got.dtype is baseline.dtype is dtype
    exact = F.gelu(dense.double()(x.double()))
    assert relative_error(got, exact) < 2 * relative_error(baseline, exact)


def test_compiles_as_one_graph_for_any_number_of_tokens() -> None:
    layer = sparse_layer(dense_layer())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 13):
        x = torch.randn(tokens, 50)
        assert relative_error(compiled(x), layer(x)) < 1e-6
    assert len(graphs) == 1
    trained = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained(x).square().sum().backward()
    found, layer.values.grad = layer.values.grad, None
    layer(x).square().sum().backward()
    assert relative_error(found, layer.values.grad) < 1e-6


def test_exports() -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(6, 50)
    program = torch.export.export(layer, (x,))
    assert relative_error(program.module()(x), layer(x)) < 1e-6
    assert "vitkernels" not in str(program.graph)


def test_distributed_data_parallel(tmp_path) -> None:
    layer, x = sparse_layer(dense_layer()), torch.randn(6, 50)
    layer(x).square().sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert relative_error(layer.values.grad, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:DTensor random operators may not")
def test_fully_sharded_from_the_meta_device(tmp_path) -> None:
    """Zeros beyond the edge were once written where there is none, by masks that a DTensor does not take."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            layer = BlockSparseLinear(64, 96, (32, 16))
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        x = torch.randn(6, 64)
        y = layer(x)
        y.square().sum().backward()
        values, bias = (p.full_tensor().detach() for p in (layer.values, layer.bias))
        dense = BlockSparseTensor.wrap(values, layer.index, (96, 64)).to_dense()
        assert relative_error(y, F.linear(x, dense, bias)) < 1e-6
        assert layer.values.grad.full_tensor().any()
    finally:
        torch.distributed.destroy_process_group()


def test_an_unknown_backend_is_refused() -> None:
    for call in (
        lambda: BlockSparseLinear(50, 70, 32, backend="x"),
        lambda: BlockSparseLinear.from_linear(dense_layer(), 32, backend="x"),
    ):
        with pytest.raises(ValueError, match=r"argument `backend`: expected one of .*got 'x'"):
            call()
