"""The command-line benchmark as pytest-benchmark cases: same cases, same gate, one test a provider.

Times differ in two ways: each provider runs by itself, and with gradients every call pays for a backward pass of its
own, which short calls share on the command line.

pytest benchmarks/bench_window_attention.py --preset efficientvit_m5 --benchmark-group-by=group
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vitkernels.bench.case import Case, Unavailable, load_case, operators
from vitkernels.bench.cli import DTYPES
from vitkernels.bench.providers import select
from vitkernels.bench.runner import MODES, Draws, Settings, make_step


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption("--dtype", default=None, choices=list(DTYPES))
    parser.addoption("--preset", action="append", help="whose shapes; may be repeated")
    parser.addoption("--batch", action="append", type=int, help="images per call; may be repeated")
    parser.addoption("--model", action="append", help="networks; may be repeated")


def pytest_configure(config: pytest.Config) -> None:
    known = {preset for operator in operators() for preset in load_case(operator).presets}
    if unknown := sorted(set(config.getoption("--preset") or ()) - known):
        raise pytest.UsageError(
            f"--preset: expected some of {', '.join(sorted(known))}; got {', '.join(unknown)}"
        )


def settings_of(config: pytest.Config) -> Settings:
    device = torch.device(config.getoption("--device"))
    default = torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(config.getoption("--dtype"), default)
    return Settings(device, dtype, batches=tuple(config.getoption("--batch") or (1, 16)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises a test of `problem` and `provider` over the case its module names in `OPERATOR`."""
    if not {"problem", "provider"} <= set(metafunc.fixturenames):
        return
    settings = settings_of(metafunc.config)
    case = load_case(metafunc.module.OPERATOR)
    presets = metafunc.config.getoption("--preset") or [case.default_preset]
    presets = [preset for preset in presets if preset in case.presets]  # others are of other operators
    problems = [
        pytest.param((case, problem, batch), id=f"{preset}-{problem.label.replace(' ', '')}-b{batch}")
        for preset in presets
        for problem in case.presets[preset]
        for batch in settings.batches
    ]
    metafunc.parametrize("problem", problems)
    metafunc.parametrize("mode", MODES)
    metafunc.parametrize("provider", [p.name for p in select(case, settings.device, None)])


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return settings_of(request.config)


@functools.lru_cache(maxsize=1)
def _draws(operator: str, problem: Any, batch: int, mode: str, settings: Settings) -> Draws:
    torch._dynamo.reset()  # a recompilation limit reached by earlier shapes would fall back to eager
    case = load_case(operator)
    return Draws(case, problem, batch, mode == "fwd+bwd", settings)


@pytest.fixture
def step(
    request: pytest.FixtureRequest,
    problem: tuple[Case, Any, int],
    mode: str,
    provider: str,
    settings: Settings,
) -> Callable[[], object]:
    """The provider's call, after it passed the gate; a wrong provider fails here and is never timed."""
    case, shape, batch = problem
    chosen = {p.name: p for p in select(case, settings.device, None)}[provider]
    if mode not in chosen.modes:
        pytest.skip(f"{provider} has no {mode}")
    draws = _draws(case.operator, shape, batch, mode, settings)
    inputs, training = draws[0][0], mode == "fwd+bwd"
    try:
        function = chosen.prepare(inputs, training)
    except Unavailable as error:
        pytest.skip(str(error))
    worst = draws.judge(chosen, function)
    if not worst.ok:
        pytest.fail(f"WRONG: {worst}")
    once = make_step(function, inputs, training)

    def synchronized() -> object:
        result = once()
        torch.cuda.synchronize(settings.device)
        return result

    return synchronized if settings.device.type == "cuda" else once
