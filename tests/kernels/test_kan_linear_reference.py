"""The contract itself: golden values, derivatives, and the values at the ends of the real axis."""

from __future__ import annotations

import pytest
import torch

from vitkernels import nn, ops


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    k = torch.arange(24, dtype=torch.float64)
    j = torch.arange(1, 3, dtype=torch.float64)
    return {
        "x": torch.tensor([[1, 2, 4], [-1, 0, 0.5]], dtype=torch.float64),
        "weight": ((j[:, None] * k) % 7 - 3) / 10,
        "ln_weight": torch.tensor([1, 0.5, 2], dtype=torch.float64),
        "ln_bias": torch.tensor([0, 0.1, -0.2], dtype=torch.float64),
        "grid": torch.linspace(-2, 2, 8, dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", ["reference", None])
def test_golden_values(golden, backend):
    leaves = {name: tensor.requires_grad_() for name, tensor in golden.items()}
    y = ops.kan_linear(**leaves, backend=backend)
    want = [[-0.015083, -0.048847], [-0.120934, -0.026758]]
    torch.testing.assert_close(y, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)

    y.backward(torch.tensor([[1, -1], [0.5, 2]], dtype=torch.float64))
    want_grads = {
        "x": [[0.010473, -0.015712, 0.005240], [0.210584, -0.631742, 0.421158]],
        "ln_weight": [-0.892316, 0.232906, 0.797799],
        "ln_bias": [0.597992, 0.419438, 0.690016],
    }
    for name, want in want_grads.items():
        torch.testing.assert_close(
            leaves[name].grad, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0
        )
    grad = leaves["weight"].grad
    want = [0.048648, 0.828137, 0.777781, 0.037524, 0.001194, 0.000037, 0.000001, 0.000000]
    torch.testing.assert_close(grad[0, :8], torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)
    assert grad.sum().item() == pytest.approx(8.916416, abs=1e-6)


def test_the_official_chain_of_modules_gives_the_same():
    torch.manual_seed(0)
    layer = nn.FasterKANLayer(5, 7)
    x = torch.randn(11, 5)
    basis = layer.rbf(layer.layernorm(x)).view(11, -1)
    torch.testing.assert_close(layer(x), layer.spline_linear(basis))


def test_gradcheck_of_the_reference(golden):
    leaves = [tensor.requires_grad_() for tensor in golden.values()]
    assert torch.autograd.gradcheck(lambda *t: ops.kan_linear(*t, backend="reference"), leaves)
