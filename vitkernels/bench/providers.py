"""Who is timed: eager PyTorch, torch.compile, the case's peers, and every backend of ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

import vitkernels
from vitkernels.bench.case import Case, Function, Inputs, Provider, Unavailable

OURS = "vitkernels-"


def ours(case: Case, backend: str) -> Provider:
    operator = case.function

    def prepare(inputs: Inputs, training: bool) -> Function:
        try:
            operator(**inputs.tensors, **inputs.options, backend=vitkernels.PROBE)
        except vitkernels.Probed as probed:
            reasons = probed.reasons[backend]
        if reasons:
            raise Unavailable("; ".join(reasons))

        return functools.partial(operator, **inputs.options, backend=backend)

    return Provider(OURS + backend, prepare, ours=True)


def eager(case: Case) -> Provider:
    return Provider("eager", lambda inputs, training: functools.partial(case.eager, **inputs.options))


def compiled(case: Case) -> Provider:
    def prepare(inputs: Inputs, training: bool) -> Function:
        return torch.compile(functools.partial(case.eager, **inputs.options), dynamic=False, fullgraph=True)

    return Provider("torch.compile", prepare)


def all_providers(case: Case, device: torch.device) -> list[Provider]:
    backends = ("cuda", "triton") if device.type == "cuda" else ("cpu", "triton")
    return [
        eager(case),
        compiled(case),
        *case.peers(device),
        *(ours(case, name) for name in (*backends, "reference")),
    ]


def select(case: Case, device: torch.device, names: Sequence[str] | None) -> list[Provider]:
    """The named providers, eager always first; by default all but our reference and the interpreter."""
    found = {provider.name: provider for provider in all_providers(case, device)}
    if names is None:
        left_out = {OURS + "reference"} | ({OURS + "triton"} if device.type == "cpu" else set())
        return [provider for name, provider in found.items() if name not in left_out]
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"providers: expected some of {', '.join(found)}; got {', '.join(unknown)}")
    return [found[name] for name in dict.fromkeys(("eager", *names))]
