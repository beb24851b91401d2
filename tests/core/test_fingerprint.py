"""The fingerprint by which folds notice that a weight changed."""

from __future__ import annotations

import pytest
import torch

from vitkernels.core import native

pytestmark = pytest.mark.skipif(bool(native.why_missing()), reason="the compiled extension is missing")


def fingerprint(*tensors: torch.Tensor | None) -> bytes | None:
    module = native.load()
    return module.fingerprint(native.arguments(module, *tensors))


@pytest.mark.parametrize("count", [1, 3, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_element_counts(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count).to(dtype)
    seen = {fingerprint(tensor)}
    for i in range(count):
        changed = tensor.clone()
        changed[i] = -changed[i]
        seen.add(fingerprint(changed))
    assert len(seen) == count + 1
    assert fingerprint(tensor.clone()) in seen


@pytest.mark.parametrize("count", [64, 4096, 9 * 64 * 32])
def test_edits_of_all_elements_at_once_do_not_cancel(count: int) -> None:
    tensor = torch.randn(count)
    edits = [tensor, -tensor, tensor * 2, tensor / 2, tensor * 1.5, tensor + 1, 0 * tensor, 0 * tensor + 1]
    edits += [tensor.flip(0), tensor.roll(1), tensor.roll(32), tensor.view(2, -1).flip(0).flatten()]
    edits += [tensor.view(-1, 32)[:, torch.randperm(32)].flatten(), tensor.view(-1, 32).flip(0).flatten()]
    distinct = {edit.contiguous().numpy().tobytes() for edit in edits}  # of 64 elements, three are one
    assert len({fingerprint(edit.contiguous()) for edit in edits}) == len(distinct) > 11


def test_what_else_counts() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    tensors = [(a, b), (b, a), (a, None), (None, a), (a,), (a.view(4, 6),), (a.view(torch.float64),)]
    tensors += [(a.view(torch.float16),), (a.view(torch.bfloat16),), (), (None,), (a[:0],), (a[:, :0],)]
    assert len({fingerprint(*each) for each in tensors}) == len(tensors)
    assert fingerprint(torch.nn.Parameter(a)) == fingerprint(a)


def test_layouts() -> None:
    a = torch.randn(4, 3, 2, 2)
    last = a.contiguous(memory_format=torch.channels_last)
    assert None not in (fingerprint(a), fingerprint(last))
    before = fingerprint(last)
    last[1, 2, 1, 0] += 1
    assert fingerprint(last) != before
    assert fingerprint(a[:, 1:]) is None, "with gaps: what lies between is not the tensor's"
    assert fingerprint(a[:1, :1, :1, :1].expand(2, 3, 4, 5)) is None
    if native.lends:
        assert fingerprint(a.to("meta")) is None
        assert fingerprint(a.int()) is None
