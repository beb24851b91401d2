import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws the batch norms' weights and statistics and the attention biases at random.

    As initialised, the last norm of every residual branch of EfficientViT is zero, and with it the branch,
    whatever the attention computes.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(0.5 + values.abs().clamp(max=1.0))
        elif name.endswith(("attention_biases", "running_mean", "bn.bias")):
            tensor.copy_(0.3 * values)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
