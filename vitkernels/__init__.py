"""Handwritten CUDA, Triton and CPU kernels for efficient vision transformers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vitkernels import models, nn, ops
from vitkernels.core.backends import PROBE, BackendError, Probed, backend
from vitkernels.core.merge_plan import MergePlan
from vitkernels.kernels.block_sparse_linear.tensor import BlockSparseTensor
from vitkernels.patching import apply, merged_source, revert
from vitkernels.sparsity import densify, sparsify

try:
    __version__ = version("vitkernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "BlockSparseTensor",
    "MergePlan",
    "apply",
    "backend",
    "densify",
    "merged_source",
    "models",
    "nn",
    "ops",
    "revert",
    "sparsify",
    "supported_backends",
]


def supported_backends(op: str, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """Which backends can run a call, and why the others cannot. Nothing is launched.

    Args:
        op: name of an operator in `vitkernels.ops`.
        *args, **kwargs: what that operator would be called with.

    Returns:
        backend name -> list of reasons why it cannot run the call; an empty list means that it can.

    Raises:
        ValueError: unknown operator, or whatever the operator itself raises for bad arguments.
    """
    if op not in ops.__all__:
        raise ValueError(f"argument `op`: expected one of {', '.join(ops.__all__)}; got {op!r}.")
    try:
        getattr(ops, op)(*args, **{**kwargs, "backend": PROBE})
    except Probed as probed:
        return probed.reasons
    raise RuntimeError(f"vitkernels: operator {op} chose no backend; please report this.")
