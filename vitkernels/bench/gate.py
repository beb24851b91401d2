"""The correctness gate: the rule that tests use, applied before anything is timed.

Truth is the reference in float64. A result passes when its error is at most ``factor`` times the error
that plain PyTorch makes in the same dtype on the same input, plus 4 ulp x RMS(truth) (x sqrt(terms)
where many terms are summed), in the largest and in the root-mean-square error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0


@dataclass(frozen=True)
class Check:
    name: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    @property
    def share(self) -> float:
        """Error as a share of what is allowed; above 1 is wrong."""
        if math.isnan(self.max_error) or math.isnan(self.rms_error):
            return math.nan
        pairs = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(error / allowed if allowed else math.inf if error else 0.0 for error, allowed in pairs)

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.max_error:.2e} (allowed {self.max_allowed:.2e}), "
            f"rms {self.rms_error:.2e} (allowed {self.rms_allowed:.2e})"
        )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def check(
    name: str,
    got: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    factor: float,
    reduced: int = 1,
    dtype: torch.dtype | None = None,
) -> Check:
    """``dtype`` is the one under test, by default that of ``got``."""
    if got.shape != truth.shape:
        raise ValueError(f"{name}: expected shape {tuple(truth.shape)}; got {tuple(got.shape)}")
    error, base = (got.double() - truth).abs(), (baseline.double() - truth).abs()
    dtype = dtype or got.dtype
    # A float64 truth is itself no better than float64, so what it errs has to be allowed for.
    ulps = 64 if dtype is torch.float64 else 4
    slack = ulps * torch.finfo(dtype).eps * _rms(truth) * math.sqrt(reduced)
    if not truth.numel():
        return Check(name, 0.0, slack, 0.0, slack)
    return Check(
        name, error.max().item(), factor * base.max().item() + slack, _rms(error), factor * _rms(base) + slack
    )


def check_results(
    got: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    reduced: Mapping[str, int],
) -> list[Check]:
    """``"out"`` is held to the forward factor, every other entry (a gradient) to the backward one."""
    return [
        check(
            name if name == "out" else f"grad {name}",
            got[name],
            baseline[name],
            truth[name],
            factor=FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR,
            reduced=reduced.get(name, 1),
        )
        for name in truth
    ]


def worst(checks: list[Check]) -> Check:
    return max(checks, key=lambda c: math.inf if math.isnan(c.share) else c.share)
