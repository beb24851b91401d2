import torch
from torch import nn

from vitkernels.bench.host_model import randomize


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomize(model, torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
