"""What calibrating a pruning leaves as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sparsify_calls import Network, batches
from torch import nn

import vitkernels


class Normalised(Network):
    """Draws numbers and moves running statistics in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(12), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(F.dropout(self.norm(x.mT).mT, training=self.training))


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_moves_no_statistics_and_no_random_numbers(fails: bool) -> None:
    model = Normalised().train()
    data = [*batches(), "no images"] if fails else batches()
    before = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
    state = torch.get_rng_state()
    try:
        vitkernels.sparsify(model, 8, density=0.5, calibration=data, measure=True, verbose=False)
    except TypeError:
        assert fails
    assert model.calls == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert len(before) == 3
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.norm.named_buffers())


def test_a_density_out_of_reach_is_found_before_the_calibration() -> None:
    model = Normalised()
    with pytest.raises(ValueError, match=r"`density`: expected at least 0\.0"):
        vitkernels.sparsify(model, 8, density=1e-3, calibration=batches(), verbose=False)
    assert model.calls == 0


def test_layers_may_be_called_by_the_name_of_their_argument() -> None:
    """Counting their rows once took it to come by position."""

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x)

    report = vitkernels.sparsify(ByName(), 8, flops=0.5, calibration=torch.randn(4, 5, 16), verbose=False)
    assert report.layers[0].rows == 5
