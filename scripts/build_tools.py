"""What a build without network has to find installed; fails where setuptools is too old for pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    required = re.findall(r'"(\w+)>=(\d+)[.\d]*"', (ROOT / "pyproject.toml").read_text().split("\n\n")[0])
    least = int(dict(required)["setuptools"])
    for name in ("setuptools", "pybind11", "cmake", "ninja"):
        print(
            f"{name} {version(name) or 'not installed for this python'}",
            end="\n" if name == "ninja" else ", ",
        )
    found = version("setuptools")
    if found is None or int(found.split(".")[0]) < least:
        print(
            f"setuptools {least} or newer is needed to build, found {found}: "
            f"{sys.executable} -m pip install 'setuptools>={least}'"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
