"""Triton's backward operators asked for every gradient there is, in the interpreter.

An operator called by its registered name, as opcheck and torch.export call it, may be asked for the gradient of a
tensor that the public function treats as a constant.
"""

from __future__ import annotations

import os

import pytest
import torch
from operator_calls import each_sample, outputs_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1 (make test starts one)", allow_module_level=True)
pytest.importorskip("triton")

from vitkernels.core.operator import REGISTRY


@each_sample
def test_every_gradient_is_filled(monkeypatch, sample):
    operator = REGISTRY[sample.op]
    if "triton" not in operator.backends or "triton" in sample.without:
        pytest.skip(f"triton cannot run {sample.name}")
    checked = []
    check = operator.check
    monkeypatch.setattr(operator, "check", lambda *args: (checked.append(check(*args)), checked[-1])[1])
    monkeypatch.setattr(operator, "_plans", {})  # a known call is not checked again
    sample(sample.tensors(), backend="triton")
    inputs = checked[0]
    tensors = inputs[: len(operator.tensors)]
    outputs = outputs_of(operator.forward_op(*inputs, "triton"))
    grads = [torch.randn_like(output) if output.is_floating_point() else output for output in outputs]
    mask = [tensor is not None and tensor.is_floating_point() for tensor in tensors]
    results = operator.backward_op(*grads, *outputs, *inputs, "triton", mask)
    # Allocations are full of NaN before the kernels run (conftest.py).
    unfilled = [
        name
        for name, wanted, result in zip(operator.tensors, mask, results, strict=True)
        if wanted and not torch.isfinite(result).all()
    ]
    assert not unfilled
