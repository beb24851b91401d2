"""What every network does alike: exports for any batch, gradients of single images, empty batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from randomise import relative_error
from torch.func import functional_call, grad, vmap

from vitkernels import models

SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "deit_small_bsr": (32, {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}),
    "dinat_mini": (
        65,
        {
            "img_size": 32,
            "kernel_size": 3,
            "embed_dim": 32,
            "num_heads": (1, 2, 4, 8),
            "depths": (2, 1, 1, 1),
        },
    ),
    "efficientvit_m0": (64, {}),
    "ltm_swin_tiny": (56, {"img_size": 56, "embed_dim": 16, "num_heads": (2, 4), "depths": (2, 1)}),
    "ltm_vit_small": (32, {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "medvit_tiny": (97, {"depths": (1, 1, 3, 1)}),
    "ppma_t": (40, {"embed_dims": (16, 16, 32, 32), "num_heads": (2,) * 4, "depths": (1,) * 4}),
    "s2aformer_mini": (64, {"embed_dims": (8, 16, 24, 40), "num_heads": (1, 2, 3, 5), "depths": (1,) * 4}),
}


def network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    size, options = SMALL[name]
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=5, **options)
    return model.eval(), torch.randn(3, 3, size, size)


# Each takes ten seconds or more; these three did not export once.
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("deit_small_bsr", "ltm_vit_small", "medvit_tiny")
        else pytest.param(name, marks=pytest.mark.thorough)
        for name in SMALL
    ],
)
def test_exports_for_any_batch(name: str) -> None:
    model, x = network(name)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        assert relative_error(program(x), model(x)) < 1e-4
        assert model(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_single_images(name: str) -> None:
    model, x = network(name)
    parameters = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    single = vmap(grad(loss), (None, 0))(parameters, x[:2])
    model(x[:2]).square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    got, expected = (
        torch.cat([t.flatten() for t in ts])
        for ts in ([single[key].sum(0) for key in grads], list(grads.values()))
    )
    assert relative_error(got, expected) < 1e-4
