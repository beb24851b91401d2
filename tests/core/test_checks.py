"""The checks that all operators share."""

from __future__ import annotations

import pytest
import torch

import vitkernels
from vitkernels.core import backends, checks


def test_autocast_asks_nothing_that_an_older_dynamo_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.amp.is_autocast_available ended every compilation with fullgraph=True under torch 2.11."""

    def untraceable(device: str) -> bool:
        raise AssertionError("asked in a call")

    single, double, nowhere = torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(torch._C, "_is_autocast_available", untraceable)
        assert [t.dtype for t in checks.autocast(single, double)] == [torch.bfloat16, torch.float64]
        # No autocast on this device, which torch itself answers with an error.
        assert checks.autocast(nowhere)[0] is nowhere
    assert all(a is b for a, b in zip(checks.autocast(single, double), (single, double), strict=True))


def test_the_newest_scope_is_the_innermost_that_is_open() -> None:
    """What a Dynamo that cannot read thread-locals compiles by; leaving a scope must not end its outer namesake."""
    with vitkernels.backend("reference"), vitkernels.backend("cpu"):
        with vitkernels.backend("reference"):
            assert backends._scopes_open == "reference cpu reference"
        assert backends._scopes_open == "reference cpu"
    assert backends._scopes_open == ""
