"""Every sample of every operator, and how tests call them."""

from __future__ import annotations

import pytest
import torch
from samples import SAMPLES, Sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
# Each operator's first sample, and all of them: what costs a compiler's run differs by the operator, hardly by options.
FIRST = {sample.op: sample.name for sample in reversed(SAMPLES)}
each_first_sample = pytest.mark.parametrize(
    "sample",
    [s if s.name in FIRST.values() else pytest.param(s, marks=pytest.mark.thorough) for s in SAMPLES],
    ids=lambda s: s.name,
)
each_device = pytest.mark.parametrize("device", DEVICES)
each_kernel = pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
    ],
)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def gradients(sample: Sample, tensors, seeds, **kwargs):
    outputs = outputs_of(sample(tensors, **kwargs))
    return outputs, torch.autograd.grad(outputs, list(tensors.values()), seeds[: len(outputs)])
