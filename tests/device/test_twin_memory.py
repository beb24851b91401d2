"""What the host twin makes visible about memory (csrc/twin/probe_memory.cu)."""

import numpy as np
import pytest
import twin

pytestmark = pytest.mark.skipif(bool(twin.missing_tools()), reason=str(twin.missing_tools()))

SEEDS = twin.SEEDS
ROW = 512


def aligned(shape, dtype, offset_bytes=0):
    """A zeroed array starting `offset_bytes` after a 16-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 16 + offset_bytes
    return raw[start : start + size].view(dtype).reshape(shape)


def run_pipeline(module, seed, *, steps=5, valid=5, flaw=0, size=16):
    x = aligned((steps, ROW), np.float32)
    x[:] = np.random.default_rng(seed).standard_normal(x.shape)
    out = np.zeros_like(x)
    module.set_seed(seed)
    module.pipeline(x.ctypes.data, out.ctypes.data, steps, valid, flaw, size)
    return x, out


@pytest.mark.parametrize("size", [16, 8])
def test_pipeline_of_asynchronous_copies(module, size):
    for seed in range(max(32, len(SEEDS))):
        x, out = run_pipeline(module, seed, size=size)
        np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("size", [16, 8])
def test_invalid_copies_are_zeros_and_never_read(module, size):
    for seed in SEEDS:
        x = aligned((2, ROW), np.float32) + 1
        out = np.full((5, ROW), np.nan, np.float32)
        module.set_seed(seed)
        module.pipeline(x.ctypes.data, out.ctypes.data, 5, 2, 0, size)  # three of the five rows do not exist
        np.testing.assert_array_equal(out[:2], x)
        np.testing.assert_array_equal(out[2:], 0)


@pytest.mark.parametrize("size", [16, 8])
@pytest.mark.parametrize("flaw", [1, 2], ids=["no_wait", "one_group_too_few"])
def test_read_before_the_wait_is_nan(unwatched, flaw, size):
    for seed in SEEDS:
        _, out = run_pipeline(unwatched, seed, flaw=flaw, size=size)
        assert np.isnan(out).any()


def test_refill_of_a_stage_still_read_shows(unwatched):
    right = [np.array_equal(*run_pipeline(unwatched, seed, flaw=3)) for seed in SEEDS]
    assert not all(right)


def test_misaligned_copy_is_an_error(module):
    x, out = aligned((1, ROW), np.float32, offset_bytes=4), np.zeros((1, ROW), np.float32)
    with pytest.raises(RuntimeError, match=r"source of cp_async16 needs .* 16 bytes; it is 4 past"):
        module.pipeline(x.ctypes.data, out.ctypes.data, 1, 1, 0, 16)


def test_unwritten_shared_memory_is_nan_in_every_block(module):
    out = np.zeros(2 * 32, np.float32)
    module.read_shared_unwritten(out.ctypes.data)
    assert np.isnan(out).all()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_vectors_of_16_bit_values(module, width):
    x, out = aligned(1000 * width, np.uint16), aligned(1000 * width, np.uint16)
    x[:] = np.random.default_rng(0).integers(0, 1 << 16, x.shape)
    module.copy_vectors_16(x.ctypes.data, out.ctypes.data, width, 1000)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("width", [1, 2])
def test_vectors_of_doubles(module, width):
    x, out = aligned(100 * width, np.float64), aligned(100 * width, np.float64)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    module.copy_vectors_64(x.ctypes.data, out.ctypes.data, width, 100)
    np.testing.assert_array_equal(out, x)


def test_misaligned_vector_is_an_error(module):
    x, out = aligned(80, np.uint16, offset_bytes=4), aligned(80, np.uint16)
    module.copy_vectors_16(x.ctypes.data, out.ctypes.data, 2, 10)
    with pytest.raises(RuntimeError, match=r"vector load needs .* 16 bytes; it is 4 past one \(thread"):
        module.copy_vectors_16(x.ctypes.data, out.ctypes.data, 8, 10)


@pytest.mark.parametrize("offset", [-1, 100, 1000])
def test_red_zones_catch_writes_outside_shared_memory(module, offset):
    module.write_shared(100, 99)
    with pytest.raises(RuntimeError, match="a write outside shared memory"):
        module.write_shared(100, offset)


@pytest.fixture(scope="module")
def sanitized():
    """Runs code against a twin with the probes alone, under AddressSanitizer and UBSan."""
    return lambda code: twin.run_sanitized("import ctypes\n" + code, operators=())


def test_sanitizers_pass_clean_kernels(sanitized):
    done = sanitized(
        "n = 5 * 512\n"
        "x, out = (ctypes.c_float * (n + 4))(), (ctypes.c_float * n)()\n"
        "at = -(-ctypes.addressof(x) // 16) * 16\n"
        "for seed in range(8):\n"
        "    twin.set_seed(seed)\n"
        "    twin.pipeline(at, ctypes.addressof(out), 5, 5, 0, 16)\n"
        "    twin.exchange_in_block(at, ctypes.addressof(out), 4, 96, 0)\n"
        "    try: twin.diverge(ctypes.addressof(out), 64, 0)\n"
        "    except RuntimeError as error: assert 'diverged' in str(error)\n"
        "twin.write_shared(100, 99); twin.write_local(ctypes.addressof(out), 3)\n"
        "print('clean')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"


@pytest.mark.parametrize(
    "code",
    [
        "twin.write_shared(100, 100)",
        "twin.write_shared(100, -1)",
        "import numpy; x = numpy.zeros(8192, 'float32'); twin.write_global(x.ctypes.data, 8192)",
    ],
    ids=["past_shared", "before_shared", "past_global"],
)
def test_address_sanitizer_catches_writes_out_of_bounds(sanitized, code):
    done = sanitized(code)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "probe_memory.cu" in done.stderr  # names the kernel's own line


def test_undefined_behaviour_sanitizer_catches_local_overrun(sanitized):
    done = sanitized("out = (ctypes.c_int * 4)(); twin.write_local(ctypes.addressof(out), 4)")
    assert done.returncode != 0
    assert "runtime error: index 4 out of bounds" in done.stderr
