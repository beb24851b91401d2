"""The checks that all operators share."""

from __future__ import annotations

import pytest
import torch

from vitkernels.core import checks


def test_autocast_asks_nothing_that_an_older_dynamo_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.amp.is_autocast_available ended every compilation with fullgraph=True under torch 2.11."""

    def untraceable(device: str) -> bool:
        raise AssertionError("asked in a call")

    monkeypatch.setattr(torch._C, "_is_autocast_available", untraceable)
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert all(a is b for a, b in zip(checks.autocast(single, double), (single, double), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = checks.autocast(single, double)
        assert [t.dtype for t in cast] == [torch.bfloat16, torch.float64]
    nowhere = torch.ones(2, device="meta")
    assert (
        checks.autocast(nowhere)[0] is nowhere
    )  # no autocast on this device, which torch answers with an error
