"""Files to be written, refused before anything is measured for them."""

from __future__ import annotations

import os
from pathlib import Path


def check(name: str, path: Path | None) -> None:
    """
    Raises:
        ValueError: the path is a folder, or cannot be written to. Missing folders will be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: expected a file; got the folder {str(path)!r}")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (existing != path and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{name}: expected a file that can be written; got {str(path)!r}, and {str(existing)!r} cannot be"
        )


def check_plot(name: str, path: Path | None) -> None:
    """As `check`, and of a format that matplotlib writes; without a suffix that is its own choice."""
    check(name, path)
    suffix = "" if path is None else path.suffix.removeprefix(".").lower()
    if not suffix:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    if suffix not in FigureCanvasBase.filetypes:
        known = ", ".join(f".{known}" for known in FigureCanvasBase.filetypes)
        raise ValueError(f"{name}: expected a file of {known}; got {str(path)!r}")
