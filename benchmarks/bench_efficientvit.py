from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from vitkernels.bench import gate, models
from vitkernels.bench.host_model import calibrate, clone, create_host_model, plain, randomize
from vitkernels.bench.runner import Settings


@functools.lru_cache(maxsize=1)
def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = create_host_model(name).model
    randomize(model, generator)
    calibrate(model, [torch.randn(16, 3, 224, 224, generator=generator)])
    return model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    metafunc.parametrize("name", option("--model") or ["efficientvit_m0", "efficientvit_m5"])
    metafunc.parametrize("batch", option("--batch") or [1, 16])
    metafunc.parametrize("variant", models.DEFAULT_VARIANTS)


def test_efficientvit(benchmark: Any, settings: Settings, name: str, batch: int, variant: str) -> None:
    model = clone(host(name), settings.dtype).to(settings.device)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    images = images.to(settings.device, settings.dtype)
    torch._dynamo.reset()  # a recompilation limit reached by earlier sizes would fall back to eager
    built = models.VARIANTS[variant](model)
    truth = models.forward(plain(clone(model, torch.float64)), images.double())
    baseline = models.forward(models.VARIANTS["eager"](model), images)
    logits = gate.check("logits", models.forward(built, images), baseline, truth, factor=gate.FORWARD_FACTOR)
    assert logits.ok, f"WRONG: {logits}"

    def step() -> None:
        models.forward(built, images)
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)

    benchmark.group = f"{name} batch {batch}"
    benchmark.extra_info["images"] = batch
    benchmark(step)
