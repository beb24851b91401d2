from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import prune

from vitkernels import nn


def test_state_dict_has_the_official_keys_and_shapes():
    network = nn.FasterKAN([64, 128, 64])
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert shapes == {
        "layers.0.layernorm.weight": (64,),
        "layers.0.layernorm.bias": (64,),
        "layers.0.rbf.grid": (8,),
        "layers.0.spline_linear.weight": (128, 512),
        "layers.1.layernorm.weight": (128,),
        "layers.1.layernorm.bias": (128,),
        "layers.1.rbf.grid": (8,),
        "layers.1.spline_linear.weight": (64, 1024),
    }
    layer = network.layers[0]
    assert sum(p.numel() for p in layer.parameters()) == 2 * 64 + 8 + 8 * 64 * 128
    assert not layer.rbf.grid.requires_grad
    torch.testing.assert_close(layer.rbf.grid, torch.linspace(-2, 2, 8))
    assert [p for name, p in network.named_parameters() if p.requires_grad and "grid" in name] == []


def test_a_loaded_grid_is_honoured():
    layer, x = nn.FasterKANLayer(6, 3), torch.randn(4, 6)
    before = layer(x)
    state = copy.deepcopy(layer.state_dict())
    state["rbf.grid"] += 0.5
    layer.load_state_dict(state)
    after = layer(x)
    assert not torch.allclose(before, after)
    basis = layer.rbf(layer.layernorm(x)).flatten(-2)
    torch.testing.assert_close(after, layer.spline_linear(basis))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)])
def test_any_leading_dimensions(shape):
    network = nn.FasterKAN([6, 12, 5])
    assert network(torch.randn(shape)).shape == (*shape[:-1], 5)


def test_the_network_trains():
    torch.manual_seed(0)
    network = nn.FasterKAN([4, 16, 2])
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(128, 4)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    losses = []
    for _ in range(60):
        loss = (network(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


class Adapted(torch.nn.Module):
    """A frozen layer and what an adapter adds to it; asked for its weight, it tells the frozen one's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.added = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.added(x)


def test_layers_that_are_more_than_their_weights_are_called():
    layer, x, seen = nn.FasterKANLayer(6, 3), torch.randn(4, 6), []
    plain = layer(x)
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in layer.children()]
    torch.testing.assert_close(layer(x), plain)
    assert seen == list(layer.children())
    for handle in handles:
        handle.remove()
    prune.l1_unstructured(layer.spline_linear, "weight", 30)
    optimizer = torch.optim.SGD([layer.spline_linear.weight_orig], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    basis = layer.rbf(layer.layernorm(x)).flatten(-2)
    torch.testing.assert_close(
        layer(x), basis @ (layer.spline_linear.weight_orig * layer.spline_linear.weight_mask).T
    )
    prune.remove(layer.spline_linear, "weight")
    layer.spline_linear = Adapted(layer.spline_linear)
    torch.testing.assert_close(layer(x), layer.spline_linear(basis))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.FasterKANLayer(6, 3, num_grids=0), "argument `num_grids`: expected 1 positive ints"),
        (
            lambda: nn.FasterKANLayer(6, 3, denominator=-0.33),
            "argument `denominator`: expected a number above 0",
        ),
        (lambda: nn.FasterKAN([]), "argument `layers_hidden`: expected channels"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
