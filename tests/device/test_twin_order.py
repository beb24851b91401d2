"""The host twin's schedule: barriers, warp collectives, launches (csrc/twin/probe_order.cu)."""

import numpy as np
import pytest
import twin

pytestmark = pytest.mark.skipif(bool(twin.missing_tools()), reason=str(twin.missing_tools()))

SEEDS = twin.SEEDS
NAMES = {np.float32: "f32", np.float64: "f64", np.int32: "i32", np.uint32: "u32"}


def address(array, offset=0):
    assert array.flags.c_contiguous
    return array.ctypes.data + offset * array.itemsize


def exchanged(x, step):
    for _ in range(2):
        x = 2 * x + np.roll(x, -step, axis=1)
    return x


def exchange(module, seed, missing, *, in_block):
    blocks, threads = 3, 96 if in_block else 32
    x = np.random.default_rng(seed).standard_normal((blocks, threads)).astype(np.float32)
    out = np.full_like(x, np.nan)
    module.set_seed(seed)
    if in_block:
        module.exchange_in_block(address(x), address(out), blocks, threads, missing)
    else:
        module.exchange_in_warp(address(x), address(out), blocks, missing)
    return np.array_equal(out, exchanged(x, 33 if in_block else 1))


@pytest.mark.parametrize("in_block", [True, False], ids=["sync_block", "sync_warp"])
def test_right_with_every_seed_when_synchronised(module, in_block):
    assert all(exchange(module, seed, 0, in_block=in_block) for seed in range(max(32, len(SEEDS))))


@pytest.mark.parametrize("missing", [1, 2], ids=["before_reads", "after_reads"])
@pytest.mark.parametrize("in_block", [True, False], ids=["sync_block", "sync_warp"])
def test_missing_barrier_shows(unwatched, in_block, missing):
    right = [exchange(unwatched, seed, missing, in_block=in_block) for seed in SEEDS]
    print(f"{right.count(False)} of {len(right)} seeds show the missing barrier")
    assert not all(right)


def test_one_seed_is_one_schedule(unwatched):
    """A failing seed can be run again: the wrong numbers of a racy kernel repeat bit for bit."""
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    runs = {}
    for seed in [*SEEDS, *SEEDS]:
        out = np.empty_like(x)
        unwatched.set_seed(seed)
        unwatched.exchange_in_block(address(x), address(out), 3, 96, 2)
        runs.setdefault(seed, set()).add(out.tobytes())
    assert all(len(results) == 1 for results in runs.values())
    assert len(set.union(*runs.values())) > 1


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(("start", "mask", "delta"), [(5, 1, 1), (31, 16, 7), (0, 21, 31)])
def test_collectives(module, dtype, start, mask, delta):
    lowest = 0 if np.dtype(dtype).kind == "u" else -1000
    x = np.random.default_rng(3).uniform(lowest, 1000, 64).astype(dtype)
    out = np.zeros((9, 64), dtype)
    getattr(module, f"collectives_{NAMES[dtype]}")(address(x), address(out), start, mask, delta)

    warps, lane = x.reshape(2, 32), np.arange(max(32, len(SEEDS)))
    across = lane ^ mask
    in_group = np.where(across <= (lane | 7), across, lane)
    below = np.where(lane + delta < 32, lane + delta, lane)
    moved = [warps[:, (lane + start) % 32], warps[:, across], warps[:, in_group], warps[:, below]]
    for row, expected in zip(out[:4], moved, strict=True):
        np.testing.assert_array_equal(row, expected.ravel())
    sums = {
        4: np.repeat(warps.sum(1), 32),
        5: np.repeat(x.reshape(8, 8).sum(1), 8),
        7: np.repeat(x.sum(), 64),
    }
    for row, expected in sums.items():
        np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-2 if dtype is np.float32 else 1e-9)
        groups = out[row].reshape({4: 2, 5: 8, 7: 1}[row], -1)
        assert (groups == groups[:, :1]).all(), "the lanes of a group disagree"
    np.testing.assert_array_equal(out[6], np.repeat(x.reshape(4, 16).max(1), 16))
    np.testing.assert_array_equal(out[8], np.repeat(x.max(), 64))


def test_atomic_add_counts(module):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    count = np.zeros(1, np.int32)
    module.count_positive(address(x), address(count), x.size)
    assert count[0] == (x > 0).sum()


def test_positions_cover_the_grid_once(module):
    x, y, z, threads = 5, 3, 2, 40
    for seed in SEEDS:
        module.set_seed(seed)
        out = np.full((z, y, x, threads, 6), -1, np.int32)
        module.positions(address(out), x, y, z, threads)
        block_z, block_y, block_x, _ = np.indices((z, y, x, threads))
        for axis, expected in enumerate((block_x, block_y, block_z)):
            np.testing.assert_array_equal(out[..., axis], expected)
        assert (out[..., 3] == np.arange(threads) % 32).all()
        assert (out[..., 4] == np.arange(threads) // 32).all()
        assert (out[..., 5] == x).all()


@pytest.mark.parametrize(
    ("how", "threads", "expected"),
    [
        (0, 64, r"diverged warp \d.*lanes 0-15 at shfl; lanes 16-31 at sync_block"),
        (1, 64, r"diverged warp \d.*lanes 0-15 at shfl; lanes 16-31 exited"),
        (2, 64, r"diverged warp \d.*lanes 0-15 at shfl; lanes 16-31 at shfl_down"),
        (1, 24, r"diverged warp 0.*lanes 0-15 at shfl; lanes 16-23 exited; lanes 24-31 absent"),
    ],
)
def test_divergence_is_an_error_and_no_hang(module, how, threads, expected):
    out = np.zeros(threads, np.int32)
    for seed in SEEDS:
        module.set_seed(seed)
        with pytest.raises(RuntimeError, match=expected):
            module.diverge(address(out), threads, how)
    test_atomic_add_counts(module)  # the scheduler is whole again


def test_exited_threads_do_not_hold_up_a_barrier(module):
    out = np.full(64, -1, np.int32)
    module.diverge(address(out), 64, 3)
    expected = np.arange(64)
    expected[16:32] = -1  # the lanes that left
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1, 1025, 0), id="threads"),
        pytest.param((0, 1, 1, 32, 0), id="empty_grid"),
        pytest.param((2**31, 1, 1, 32, 0), id="grid_x"),
        pytest.param((1, 65536, 1, 32, 0), id="grid_y"),
        pytest.param((1, 1, 1, 32, 300_000), id="shared_memory"),
    ],
)
def test_launch_refused(module, shape):
    with pytest.raises(RuntimeError, match=r"kernel launch refused: grid .* threads"):
        module.launch_shape(*shape)


def test_large_blocks_and_shared_memory(module):
    module.launch_shape(3, 2, 1, 1024, 227 * 1024)


def test_a_dependent_launch_sees_what_the_one_before_wrote(module):
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    between, out = np.full_like(x, np.nan), np.full_like(x, np.nan)
    for seed in SEEDS:
        module.set_seed(seed)
        module.dependent_launch(address(x), address(between), address(out), 96)
        assert np.array_equal(out, 2 * x[::-1])
