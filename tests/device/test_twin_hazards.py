"""What the host twin says of accesses that no barrier orders (csrc/twin/watch.h), whatever the schedule."""

import re

import numpy as np
import pytest
import twin

pytestmark = pytest.mark.skipif(bool(twin.missing_tools()), reason=str(twin.missing_tools()))

SEEDS = twin.SEEDS


def exchange(module, *, in_block, missing=0):
    x = np.zeros((2, 96 if in_block else 32), np.float32)
    out = np.zeros_like(x)
    shape = x.shape if in_block else x.shape[:1]
    run = module.exchange_in_block if in_block else module.exchange_in_warp
    run(x.ctypes.data, out.ctypes.data, *shape, missing)


def pipeline(module, flaw=0):
    x = np.zeros(5 * 512 + 4, np.float32)
    out = np.zeros_like(x)
    module.pipeline(-(-x.ctypes.data // 16) * 16, -(-out.ctypes.data // 16) * 16, 5, 5, flaw, 16)


def load_matrices(module):
    x, out = np.zeros(256, np.uint16), np.zeros(128, np.uint32)
    module.load_matrices(x.ctypes.data, out.ctypes.data, 4, 0, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_ordered_accesses_are_no_hazard(module, seed):
    module.set_seed(seed)
    exchange(module, in_block=True)
    exchange(module, in_block=False)
    pipeline(module)
    load_matrices(module)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("in_block", "missing"),
    [(True, 1), (True, 2), (False, 1), (False, 2), (False, 3)],
    ids=["sync_block_before", "sync_block_after", "sync_warp_before", "sync_warp_after", "shuffle_instead"],
)
def test_missing_barrier_is_a_hazard_in_every_schedule(module, seed, in_block, missing):
    module.set_seed(seed)
    # Which of the two comes first is up to the schedule.
    first_or_last = "reads shared memory, .* wrote|writes shared memory, .* read"
    with pytest.raises(RuntimeError, match=f"hazard: thread .*({first_or_last}) .*no barrier in between"):
        exchange(module, in_block=in_block, missing=missing)
    exchange(module, in_block=in_block)  # the next launch starts anew


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flaw", [1, 2, 3], ids=["no_wait", "one_group_too_few", "refilled_too_early"])
def test_asynchronous_copies_are_ordered_by_their_wait(module, seed, flaw):
    module.set_seed(seed)
    with pytest.raises(RuntimeError, match="cp.async" if flaw < 3 else "hazard"):
        pipeline(module, flaw)


def test_message_names_the_lines_of_both_accesses(module):
    with pytest.raises(RuntimeError) as error:
        exchange(module, in_block=True, missing=1)
    source = (twin.SOURCE / "probe_order.cu").read_text().splitlines()
    lines = {source[int(line) - 1].strip() for line in re.findall(r"probe_order\.cu:(\d+)", str(error.value))}
    assert lines == {"shared[thread] = value;", "value = 2 * value + shared[(thread + 33) % threads];"}


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_write_one_place(module, seed):
    module.set_seed(seed)
    out = np.zeros(3 * 64, np.int32)
    module.write_from_blocks(out.ctypes.data, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"writes global memory .* of another block wrote"):
        module.write_from_blocks(out.ctypes.data, 3, 64, 63)


def test_order_of_launches_is_the_streams(module):
    out = np.zeros(3 * 64, np.int32)
    for _ in range(2):
        module.write_from_blocks(out.ctypes.data, 3, 64, 64)


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (lambda module: exchange(module, in_block=True), 2),
        (lambda module: exchange(module, in_block=False), 2),
        (pipeline, 2),
        (load_matrices, 1),
    ],
    ids=["in_block", "in_warp", "pipeline", "ldmatrix"],
)
def test_each_barrier_can_be_ignored(module, run, count):
    """Which is how scripts/barriers.py finds out whether a kernel needs one."""
    run(module)
    needed = set()
    for number, _, line in module.barriers():
        module.ignore_barriers([number])
        try:
            run(module)
        except RuntimeError:
            needed.add(line)
    assert len(needed) == count, needed
    assert all(re.fullmatch(r"probe_\w+\.cu:\d+", line) for line in needed)
    module.ignore_barriers([])
    run(module)
