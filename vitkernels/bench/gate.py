"""The house rule for correctness, for the tests as for the benchmark: a kernel may err as plain PyTorch errs.

Truth is the reference in float64. A result passes when its error is at most ``factor`` times the error
that plain PyTorch makes in the same dtype on the same input, plus 4 ulp x RMS(truth) (x sqrt(terms)
where many terms are summed), in the largest and in the root-mean-square error.

Results in float64 are the one exception: their truth errs as much as they do and plain PyTorch, being the
same program, does not err at all, so FLOAT64_ULPS takes the place of both terms. That is still six orders of
magnitude less than a single step in float32 would err. Where few elements stand far above the rest, as in the
gradient of the keys that a softmax picks, 256 ulp of their RMS can be less than the distance between two doubles; the
largest error may then be FLOAT64_PEAK_ULPS of the largest element: a softmax's weight errs by about as many ulp as
its logit is large, in the truth and in the result.

Where the truth is zero everywhere because terms cancel, as in the gradient of the queries of a single key, plain
PyTorch may cancel them to the last bit, and 4 ulp of nothing are nothing. What is left of inputs of order one is
then held to CANCELLED_ULPS of the dtype that the terms are summed in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
ULPS, FLOAT64_ULPS, FLOAT64_PEAK_ULPS = 4, 256, 16
CANCELLED_ULPS = 16


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
    """Holds one tensor to the rule.

    Args:
        baseline: plain PyTorch in the dtype under test.
        truth: the reference in float64.
        factor: FORWARD_FACTOR or BACKWARD_FACTOR.
        reduced: terms summed into one element beyond the operator's own products, as the windows and pairs
            that share an entry of a bias table.
        dtype: the dtype under test, by default that of ``got``. A float32 by-product of float16 tensors, such
            as their lse, inherits the roundings of float16.
    """
    if got.shape != truth.shape:
        raise ValueError(f"{name}: expected shape {tuple(truth.shape)}; got {tuple(got.shape)}")
    error, base = (got.double() - truth).abs(), (baseline.double() - truth).abs()
    dtype = dtype or got.dtype
    ulps = FLOAT64_ULPS if dtype is torch.float64 else ULPS
    slack = ulps * torch.finfo(dtype).eps * _rms(truth) * math.sqrt(reduced)
    if not truth.any():
        summed_in = torch.promote_types(dtype, torch.float32)
        slack = CANCELLED_ULPS * torch.finfo(summed_in).eps * math.sqrt(reduced)
    if not truth.numel():
        return Check(name, 0.0, slack, 0.0, slack)
    largest_slack = slack
    if dtype is torch.float64:
        largest_slack = max(slack, FLOAT64_PEAK_ULPS * torch.finfo(dtype).eps * truth.abs().max().item())
    return Check(
        name,
        error.max().item(),
        factor * base.max().item() + largest_slack,
        _rms(error),
        factor * _rms(base) + slack,
    )


def check_results(
    got: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    reduced: Mapping[str, int],
    dtype: torch.dtype,
    outputs: Collection[str] = ("out",),
) -> list[Check]:
    """The names in ``outputs`` are held to the forward factor, every other one (a gradient) to the backward."""
    return [
        check(
            name if name in outputs else f"grad {name}",
            got[name],
            baseline[name],
            truth[name],
            factor=FORWARD_FACTOR if name in outputs else BACKWARD_FACTOR,
            reduced=reduced.get(name, 1),
            dtype=dtype,
        )
        for name in truth
    ]


def pool(draws: Sequence[Sequence[Check]]) -> list[Check]:
    """The same tensors over several draws of the input: the largest error of any against the largest allowed.

    Where a few elements carry most of the error, as in a softmax with a rare large logit, the largest error of one
    draw is a lottery, for plain PyTorch as for the kernel.
    """
    return [
        Check(
            same[0].name,
            *(
                max((getattr(verdict, field) for verdict in same), key=lambda x: math.inf if x != x else x)
                for field in ("max_error", "max_allowed", "rms_error", "rms_allowed")
            ),
        )
        for same in zip(*draws, strict=True)
    ]


def rank(verdict: Check) -> float:
    """Its share, NaN being the worst of all."""
    return math.inf if math.isnan(verdict.share) else verdict.share


def worst(checks: list[Check]) -> Check:
    return max(checks, key=rank)
