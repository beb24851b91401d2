"""The house rule for correctness: a kernel may err as plain PyTorch errs, not more.

Truth is the reference in float64. A result passes when its error is at most `factor` times the error of the
reference run in the dtype under test on the same input, plus 4 ulp of that dtype times RMS(truth), times the
square root of the number of reduced terms; for the largest error and for the RMS error.
"""

from __future__ import annotations

import math

import torch

FORWARD, GRADIENT = 2.0, 3.0


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
    """Prints both errors and asserts the rule.

    Args:
        baseline: the reference in the dtype under test.
        truth: the reference in float64.
        factor: FORWARD or GRADIENT.
        reduced: number of terms summed into one element beyond the operator's own products, as the windows
            and pairs that share one bias entry.
        dtype: the dtype under test. Default: got's.
    """
    assert got.shape == truth.shape == baseline.shape, f"{name}: {got.shape} against {truth.shape}"
    assert truth.numel() == 0 or truth.abs().max() > 0, (
        f"{name}: the truth is zero everywhere, so nothing is tested"
    )
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} elements are not finite"
    if truth.numel() == 0:
        return
    dtype = dtype or got.dtype
    got, baseline, truth = (t.detach().to("cpu", torch.float64) for t in (got, baseline, truth))
    slack = 4 * torch.finfo(dtype).eps * rms(truth) * math.sqrt(reduced)
    for measure, of in (("max", lambda t: t.abs().max().item()), ("rms", rms)):
        error, allowed = of(got - truth), factor * of(baseline - truth) + slack
        print(
            f"{name} {measure}: error {error:.3e}, PyTorch {of(baseline - truth):.3e}, allowed {allowed:.3e}"
        )
        assert error <= allowed, f"{name}: {measure} error {error:.3e} exceeds {allowed:.3e}"


def rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
