"""The house rule for correctness (vitkernels/bench/gate.py) as an assertion that prints both errors."""

from __future__ import annotations

import torch

from vitkernels.bench import gate

FORWARD, GRADIENT = gate.FORWARD_FACTOR, gate.BACKWARD_FACTOR


def assert_close_to_truth(
    name: str,
    got: torch.Tensor,
    baseline: torch.Tensor,
    truth: torch.Tensor,
    *,
    factor: float,
    reduced: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Asserts `gate.check`, whose arguments these are, and that there was something to check."""
    assert got.shape == truth.shape == baseline.shape, f"{name}: {got.shape} against {truth.shape}"
    assert truth.numel() == 0 or truth.any(), f"{name}: the truth is zero everywhere, so nothing is tested"
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} elements are not finite"
    got, baseline, truth = (t.detach().cpu() for t in (got, baseline, truth))
    verdict = gate.check(name, got, baseline, truth, factor=factor, reduced=reduced, dtype=dtype)
    print(verdict)
    assert verdict.ok, f"{verdict}: exceeds what is allowed"


def assert_cancelled(name: str, got: torch.Tensor) -> None:
    """Asserts that terms whose sum is zero, as those of a softmax of one key, leave no more than their roundings."""
    nothing = torch.zeros_like(got, dtype=torch.float64)
    verdict = gate.check(name, got, nothing, nothing, factor=GRADIENT)
    assert verdict.ok, f"{verdict}: exceeds what is allowed"
