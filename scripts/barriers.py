"""Which barriers of the CUDA kernels are needed, as far as their tests on the host twin see.

Every sync_block and sync_warp is left out in turn, as far as memory order goes (threads wait all the same), while its
operator's tests run: where the twin finds no hazard, either the barrier is not needed, or no test needs it.

python scripts/barriers.py [OPERATOR ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import twin  # noqa: E402


def run_tests(files: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not thorough"]
    # In one process: its barriers are all known at its end.
    return subprocess.run(
        [*command, "-k", "not sanitize and not nvcc", *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VITKERNELS_SEEDS": "1", **environment},
        capture_output=True,
        text=True,
    )


def barriers_of(files: list[Path]) -> dict[tuple[str, str], list[int]]:
    """By kind and line: the numbers, one for each instance of a template."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder, "barriers.json")
        done = run_tests(files, VITKERNELS_LIST_BARRIERS=str(listing))
        if done.returncode != 0:
            raise SystemExit(f"the tests fail as they are:\n{done.stdout[-4000:]}")
        barriers = defaultdict(list)
        for number, of_warp, line in json.loads(listing.read_text()):
            barriers["sync_warp" if of_warp else "sync_block", line].append(number)
        return barriers


def is_needed(files: list[Path], numbers: list[int]) -> bool:
    done = run_tests(files, VITKERNELS_IGNORE_BARRIERS=json.dumps(numbers))
    if done.returncode != 0 and "hazard:" not in done.stdout:
        raise SystemExit(f"failed, but not by a hazard:\n{done.stdout[-4000:]}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operators", nargs="*", default=list(twin.OPERATORS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    unknown = sorted({*arguments.operators} - {*twin.OPERATORS})
    if unknown:  # without files of theirs pytest would run all there are
        parser.error(f"expected some of {', '.join(twin.OPERATORS)}; got {', '.join(unknown)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1; got {arguments.jobs}")
    twin.build()
    in_doubt = 0
    for operator in arguments.operators:
        files = sorted((ROOT / "tests" / "kernels").glob(f"test_{operator}_cuda*.py"))
        barriers = barriers_of(files)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            needed = list(pool.map(partial(is_needed, files), barriers.values()))
        print(f"{operator}: {sum(needed)} of {len(barriers)} barriers are needed", flush=True)
        for (kind, line), is_one in zip(barriers, needed, strict=True):
            if not is_one:
                in_doubt += 1
                print(f"  no hazard without the {kind} at {line}", flush=True)
    return 1 if in_doubt else 0


if __name__ == "__main__":
    raise SystemExit(main())
