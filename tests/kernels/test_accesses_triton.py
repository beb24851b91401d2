"""Every Triton kernel keeps to its tensors and to its program's own results, forward and backward, on the samples."""

from __future__ import annotations

import os

import pytest
import torch
from operator_calls import each_sample, gradients, outputs_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from accesses import watched

from vitkernels import ops
from vitkernels.core.operator import REGISTRY
from vitkernels.kernels.bipartite_match import triton as matching


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_sample
def test_no_program_leaves_its_tensors_or_uses_what_another_writes(sample, dtype) -> None:
    if "triton" not in REGISTRY[sample.op].backends or "triton" in sample.without:
        pytest.skip(f"triton cannot run {sample.name}")
    tensors = sample.tensors(dtype, requires_grad=True)
    with watched():
        outputs = outputs_of(sample(tensors, backend="triton"))
        seeds = [torch.randn_like(output) for output in outputs]
        gradients(sample, tensors, seeds, backend="triton")


@pytest.mark.parametrize("alone", [1024, 16], ids=lambda alone: f"alone_up_to_{alone}")
def test_nor_does_matching(alone, monkeypatch) -> None:
    monkeypatch.setattr(matching, "ALONE", alone)  # beyond, several programs arrange an image
    with watched():
        ops.bipartite_match(torch.randn(2, 131, 8), 33, class_token=True, backend="triton")
