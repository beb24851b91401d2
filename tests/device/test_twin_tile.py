"""Matrix tiles, dtypes and special functions of the device layer, in the twin (csrc/twin/probe_tile.cu)."""

import numpy as np
import pytest
import torch
import twin

pytestmark = pytest.mark.skipif(bool(twin.missing_tools()), reason=str(twin.missing_tools()))

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


def bits(tensor):
    return tensor.view(torch.int16).to(torch.int32) & 0xFFFF


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("source", [0, 1, 2], ids=["by_hand", "ldmatrix", "ldmatrix_trans"])
def test_mma_is_a_matrix_product(module, name, source):
    generator = torch.Generator().manual_seed(source)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(DTYPES[name]), b.to(DTYPES[name])
    d = torch.full((16, 8), torch.nan)
    getattr(module, f"multiply_{name}")(a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), source)
    torch.testing.assert_close(d.double(), c.double() + a.double() @ b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", [32, 64, 128, 256])
@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize("by_features", [0, 1])
@pytest.mark.parametrize("from_registers", [0, 1])
def test_wgmma_is_a_matrix_product(module, name, n, row_bytes, by_features, from_registers):
    if n == 32 and row_bytes == 128:
        pytest.skip("half an atom of columns, which no kernel has")
    generator = torch.Generator().manual_seed(n)
    depth = row_bytes // 2
    a, b = (torch.randn(shape, generator=generator).to(DTYPES[name]) for shape in ((64, depth), (depth, n)))
    d = torch.full((64, n), torch.nan)
    run = getattr(module, f"multiply_group_{name}")
    run(a.data_ptr(), b.data_ptr(), d.data_ptr(), n, row_bytes, by_features, from_registers)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        (1, "hazard.* reads .*, with no wait for the product"),
        (2, "hazard.* reads .*, with no fence_async_proxy by that thread"),
        (3, "without a wgmma_fence"),
        (4, "used before it has been waited for"),
        (5, "hazard.* reads .*, with no wait for the product"),
    ],
)
def test_products_are_held_to_their_fences_and_waits(module, flaw, message):
    module.flawed_product(0)
    with pytest.raises(RuntimeError, match=message):
        module.flawed_product(flaw)


def test_a_copied_tile_is_not_there_before_a_wait(module):
    matrix = np.ones((16, 64), np.uint16)
    assert (copy_matrix_tile(module, matrix, 64, 0, 0) == 1).all()
    assert (copy_matrix_tile(module, matrix, 64, 0, 0, use=-2) != 1).all()


def copy_matrix_tile(module, matrix, columns, row, column, bytes_expected=16 * 128, use=0):
    out = np.empty((16, 64), np.uint16)
    rows, stride = matrix.shape
    module.copy_matrix_tile(
        *(matrix.ctypes.data, out.ctypes.data, rows, columns, stride, 16, column, row, bytes_expected, use)
    )
    return out


@pytest.mark.parametrize(("row", "column"), [(0, 0), (8, 64), (20, 128)])
def test_copied_tile_has_zeros_beyond_the_matrix(module, row, column):
    rows, columns = 30, 136
    matrix = np.random.default_rng(row).integers(1, 1 << 16, (rows, columns + 8)).astype(np.uint16)
    out = copy_matrix_tile(module, matrix, columns, row, column)
    want = np.zeros_like(out)
    inside = matrix[row : row + 16, column : min(column + 64, columns)]
    want[: inside.shape[0], : inside.shape[1]] = inside
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("bytes_expected", "use", "message"),
    [
        (15 * 128, 0, "of other bytes"),
        (17 * 128, 0, "of other bytes"),
        (16 * 128, 1, "of a later use"),
        (16 * 128, -1, "next use has begun"),
    ],
)
def test_waits_for_copies_are_held_to_what_was_begun(module, bytes_expected, use, message):
    matrix = np.zeros((16, 64), np.uint16)
    with pytest.raises(RuntimeError, match=message):
        copy_matrix_tile(module, matrix, 64, 0, 0, bytes_expected, use)


@pytest.mark.parametrize("tiles", [2, 4])
@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_layout(module, tiles, transposed):
    x = np.random.default_rng(tiles).integers(0, 1 << 16, (tiles, 8, 8)).astype(np.uint16)
    out = np.zeros((32, tiles), np.uint32)
    module.load_matrices(x.ctypes.data, out.ctypes.data, tiles, transposed, 0)
    seen = x.transpose(0, 2, 1) if transposed else x
    lane = np.arange(32)
    lo, hi = seen[:, lane // 4, 2 * (lane % 4)], seen[:, lane // 4, 2 * (lane % 4) + 1]
    np.testing.assert_array_equal(out, (lo.astype(np.uint32) | hi.astype(np.uint32) << 16).T)


def test_ldmatrix_wants_aligned_rows(module):
    x, out = np.zeros(256, np.uint16), np.zeros(128, np.uint32)
    with pytest.raises(RuntimeError, match="row address of an ldmatrix needs an address aligned to 16"):
        module.load_matrices(x.ctypes.data, out.ctypes.data, 4, 0, 1)


@pytest.mark.parametrize("name", DTYPES)
def test_widening_is_exact_for_every_pattern(module, name):
    narrow = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(DTYPES[name])
    out = torch.empty(1 << 16)
    getattr(module, f"widen_{name}")(narrow.data_ptr(), out.data_ptr(), out.numel())
    expected = narrow.float()
    finite = ~expected.isnan()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_torchs_for_every_neighbourhood(module, name):
    """Every representable value, every midpoint between two of them, and the floats beside both."""
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(DTYPES[name]).float()
    every = every[every.isfinite()].sort().values.unique()
    midpoints = ((every[1:].double() + every[:-1].double()) / 2).float()
    limit = torch.finfo(DTYPES[name]).max
    edge = torch.tensor([limit * (1 + 2.0**-i) for i in range(6, 13)] + [torch.inf, 1e-45, 3e38, -0.0])
    x = torch.cat([every, midpoints, edge, -edge])
    infinity = torch.tensor(torch.inf)
    x = torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)])
    out = torch.zeros(x.numel(), dtype=torch.int16)
    getattr(module, f"round_{name}")(x.data_ptr(), out.data_ptr(), x.numel())
    assert torch.equal(bits(out), bits(x.to(DTYPES[name])))


@pytest.mark.parametrize("name", DTYPES)
def test_nan_rounds_to_the_devices_nan(module, name):
    x = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    out = torch.zeros(3, dtype=torch.int16)
    getattr(module, f"round_{name}")(x.data_ptr(), out.data_ptr(), 3)
    assert (out == 0x7FFF).all()


@pytest.mark.parametrize("name", DTYPES)
def test_pack2_puts_lo_in_the_low_half(module, name):
    lo, hi = torch.randn(1000), torch.randn(1000)
    out = torch.zeros(1000, dtype=torch.int32)
    getattr(module, f"pack_{name}")(lo.data_ptr(), hi.data_ptr(), out.data_ptr(), 1000)
    assert torch.equal(out.view(DTYPES[name]).view(1000, 2), torch.stack([lo, hi], 1).to(DTYPES[name]))


def test_special_functions(module):
    x = torch.cat([torch.linspace(-150, 120, 5001), torch.tensor([-torch.inf, torch.nan, 0.0, 1e-40])])
    out = torch.empty(6, x.numel())
    module.special_functions(x.data_ptr(), out.data_ptr(), x.numel())
    tiny = torch.finfo(torch.float32).tiny
    exp2 = x.double().exp2()
    expected = [torch.where(exp2 < tiny, 0, exp2), x.double().log2(), x.double().exp(), x.double().log()]
    expected += [1 / x.double(), x.double().clamp(max=2)]
    # A subnormal argument counts as zero.
    expected[1][-1] = -torch.inf
    expected[4][-1] = torch.inf
    for row, truth in zip(out, expected, strict=True):
        torch.testing.assert_close(row, truth.float(), rtol=1e-6, atol=1e-45, equal_nan=True)
