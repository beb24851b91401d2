"""The examples of the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import vitkernels

ROOT = Path(vitkernels.__file__).parents[1]
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(Path(vitkernels.__file__).parent.rglob("*.py"))
    if ">>> " in file.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    operators = {operator: getattr(vitkernels.ops, operator) for operator in vitkernels.ops.__all__}
    names = {"torch": torch, "vitkernels": vitkernels, **operators}
    done = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert done.attempted > 0
    assert done.failed == 0
