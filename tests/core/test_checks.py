"""The checks that all operators share."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import vitkernels
from vitkernels.core import backends, checks
from vitkernels.core.operator import REGISTRY


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


def test_numbers_beyond_every_float_and_nested_tensors() -> None:
    with pytest.raises(ValueError, match="argument `scale`: expected a finite number; got 1000"):
        checks.check_scale(10**400, 1.0)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match="; got 'a nested tensor'"):
        checks.check_tensor("x", nested, (None, None), "[rows, columns]")


@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 3, 1)], ids=str)
def test_a_shape_that_does_not_fit_is_refused_beside_the_one_that_would(shape: tuple[int, ...]) -> None:
    checks.check_tensor("x", torch.ones(2, 3), (None, 3), "[rows, columns]")
    with pytest.raises(
        ValueError, match=r"argument `x`: expected shape \[rows, columns\] = \[\*, 3\]; got float32 \["
    ):
        checks.check_tensor("x", torch.ones(shape), (None, 3), "[rows, columns]")


def test_the_error_of_a_forced_backend_tells_what_every_other_lacks() -> None:
    reasons = {"cuda": ["no device", "too wide"], "triton": ["no Triton"], "cpu": [], "reference": []}
    assert str(backends.refuse("merge", "cuda", "x float32 [2] on cpu", reasons)).splitlines() == [
        "merge: backend 'cuda' was asked for but cannot run this call:",
        "  - no device",
        "  - too wide",
        "Inputs: x float32 [2] on cpu.",
        "Backends that would fit: 'cpu', 'reference'.",
        "Others do not fit either: triton: no Triton.",
    ]
    del reasons["triton"]
    assert "Others" not in str(backends.refuse("merge", "cuda", "", reasons))


def test_a_backend_of_another_type_is_an_unknown_name() -> None:
    """An array compares with every name element by element, and has no truth."""
    for name in (torch.zeros(2), torch.zeros(2).numpy(), 3):
        with pytest.raises(ValueError, match="argument `backend`: expected one of 'auto', 'cuda'"):
            backends.requested(name)  # type: ignore[arg-type]


def test_cuda_tensors_take_the_first_kernel_that_fits_and_the_reference_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = REGISTRY["window_attention"]
    fitting: set[str] = set()
    monkeypatch.setattr(operator, "_why_not", lambda name, _: [] if name in fitting else [f"no {name} here"])
    monkeypatch.setattr(backends, "_warned", set())
    inputs = (SimpleNamespace(device=torch.device("cuda")),)
    with pytest.warns(
        UserWarning, match="window_attention runs its plain-PyTorch reference.* no triton here"
    ):
        assert operator.choose(inputs, None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operator.choose(inputs, None) == "reference"
        monkeypatch.setattr(backends, "_warned", set())
        assert operator.choose((SimpleNamespace(device=torch.device("cpu")),), None) == "reference"
        fitting |= {"triton", "cpu"}
        assert operator.choose(inputs, None) == "triton"
        fitting.add("cuda")
        assert operator.choose(inputs, None) == "cuda"
