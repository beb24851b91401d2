"""The optional packages of the bench and the demo, with one clear error when they are missing."""

from __future__ import annotations

import importlib


class MissingExtra(RuntimeError):
    """A package of the ``bench`` extra is not there."""


def require(*modules: str) -> None:
    """
    Raises:
        MissingExtra: names what cannot be imported, why, and the fix.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtra(
                f"{module.partition('.')[0]} is needed here and cannot be imported ({error}). "
                "Install it with: pip install 'vitkernels[bench]'"
            ) from error
