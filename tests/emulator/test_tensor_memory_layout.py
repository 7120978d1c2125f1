"""Tensor-memory places against CUTLASS layouts, transcribed and evaluated here.

MMA operands: include/cute/atom/mma_traits_sm100_frag.hpp. Copies:
include/cute/atom/copy_traits_sm100.hpp, whose layouts give bits; a lane is 2^21 bits (DP_b).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import cute_layout, formats, tensor_memory_layout
from tests.emulator.errors import EmulatorError, UnsupportedError

DP = 1 << 21


def _frg(atom_shape, atom_stride, m, n):
    """(lane, column) of `tmem_frg`: its virtual address has lanes 1 apart and columns 128."""
    virtual = cute_layout.table(atom_shape, atom_stride)
    assert virtual.shape == (m, n)
    return virtual % 128, virtual // 128


@pytest.mark.parametrize("n", [16, 64, 256])
def test_accumulators_of_one_cta(n):
    full = tensor_memory_layout.accumulator(1, 128, n)
    lane, column = _frg((128, n), (1, 128), 128, n)
    np.testing.assert_array_equal(full.lane, lane)
    np.testing.assert_array_equal(full.column, column)
    half = tensor_memory_layout.accumulator(1, 64, n)
    lane, column = _frg(((16, 4), n), ((1, 32), 128), 64, n)
    np.testing.assert_array_equal(half.lane, lane)
    np.testing.assert_array_equal(half.column, column)
    assert not full.cta.any()


@pytest.mark.parametrize("n", [16, 64, 256])
def test_accumulators_of_a_pair(n):
    whole = tensor_memory_layout.accumulator(2, 256, n)
    lane, column = _frg((128, n), (1, 128), 128, n)
    split = tensor_memory_layout.accumulator(2, 128, n)
    lane_2x2, column_2x2 = _frg((64, (n // 2, 2)), (1, (128, 64)), 64, n)
    for cta in range(2):
        rows = slice(128 * cta, 128 * cta + 128)
        np.testing.assert_array_equal(whole.lane[rows], lane)
        np.testing.assert_array_equal(whole.column[rows], column)
        assert (whole.cta[rows] == cta).all()
        rows = slice(64 * cta, 64 * cta + 64)
        np.testing.assert_array_equal(split.lane[rows], lane_2x2)
        np.testing.assert_array_equal(split.column[rows], column_2x2)
        assert (split.cta[rows] == cta).all()
    with pytest.raises(UnsupportedError, match="M = 32"):
        tensor_memory_layout.accumulator(1, 32, n)


@pytest.mark.parametrize("group_m", [(1, 128), (1, 64), (2, 256), (2, 128)])
def test_accumulators_put_every_element_somewhere_else(group_m):
    place = tensor_memory_layout.accumulator(*group_m, 64)
    flat = (place.cta * 128 + place.lane) * 512 + place.column
    assert np.unique(flat).size == flat.size


@pytest.mark.parametrize(("vector", "rows"), [(4, 128), (4, 192), (4, 256), (2, 128), (1, 128)])
def test_scale_factors_4x1(vector, rows):
    """tmem_sf_frg: (((32, MN/32), 4), (VS, NSF)) : (((1, 512), 32), (0, 128)), in bytes."""
    shape = (((32, rows // 32), 4), vector)
    virtual = cute_layout.table(shape, (((1, 512), 32), 128))
    place = tensor_memory_layout.scale_factors(rows, vector)
    expected = virtual.reshape(4, rows, vector)
    actual = place.lane + 128 * (4 * place.column + place.byte)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("n", [64, 128, 256])
def test_scale_factors_2x2(n):
    """tmem_sf_frg of SFB, 2x2: (((32, N/64), 2, 2), NSF) : (((1, 512), 64, 32), 128)."""
    virtual = cute_layout.table((((32, n // 64), 2, 2), 4), (((1, 512), 64, 32), 128))
    place = tensor_memory_layout.scale_factors(n, 4, split=True)
    actual = place.lane + 128 * (4 * place.column + place.byte)
    np.testing.assert_array_equal(actual, virtual.reshape(2, n, 4))


def test_scale_factor_ids():
    assert np.unique(tensor_memory_layout.scale_factors(32, 2, 2).byte).tolist() == [2, 3]
    assert np.unique(tensor_memory_layout.scale_factors(32, 1, 3).byte).tolist() == [3]
    assert tensor_memory_layout.scale_factors(8, 4).column.max() == 0
    for vector, number in ((4, 1), (2, 1), (1, 4), (3, 0)):
        with pytest.raises(EmulatorError, match="scale factor id"):
            tensor_memory_layout.scale_factors(32, vector, number)


# ValID and SrcLayout of Copy_Traits<SM100_UTCCP_...>: bits of the source -> bits of the address.
COPIES = {
    "128x256b": ((128, 256), (DP, 1), (128, 256), (1, 128)),
    "128x128b": ((128, 128), (DP, 1), (128, 128), (1, 128)),
    "4x256b": ((128, 256), (DP, 1), (4, 256), (32, 128)),
    "32x128b.warpx4": ((32, 128, 4), (DP, 1, 32 * DP), (32, 128), (1, 32)),
    "64x128b.warpx2::02_13": ((64, 128, 2), (DP, 1, 64 * DP), (64, 128), (1, 64)),
    "64x128b.warpx2::01_23": (
        (32, 128, 2, 2),
        (DP, 1, 64 * DP, 32 * DP),
        ((32, 2), 128),
        ((1, 4096), 32),
    ),
}


@pytest.mark.parametrize("shape", COPIES)
def test_copies_to_tensor_memory(shape):
    val_shape, val_stride, source_shape, source_stride = COPIES[shape]
    plan = tensor_memory_layout.copy_plan(shape)
    logical = cute_layout.table(source_shape, source_stride)
    assert logical.shape == (plan.rows, 8 * plan.row_bytes)
    covered = cute_layout.size(source_shape)
    if shape == "4x256b":
        covered = cute_layout.size(val_shape)
    for copy in range(plan.lanes.shape[0]):
        # The broadcast mode is the last of ValID: it moves whole source images.
        address = cute_layout.offset(val_shape, val_stride, logical + copy * covered)
        bits = np.arange(8 * plan.row_bytes)
        np.testing.assert_array_equal(address, plan.lanes[copy][:, None] * DP + bits)
    assert plan.lanes.shape[0] * covered == cute_layout.size(val_shape)


def test_warpx4_and_the_scale_atom_agree():
    """A 512-byte scale atom copied with 32x128b.warpx4 is where the MMA reads it.

    SfKMajorAtom (include/cutlass/detail/sm100_blockscaled_layout.hpp) puts (row, block) of 128 x
    4 scales at byte ((32, 4), 4) : ((16, 4), 1).
    """
    memory = np.zeros((128, 4, 4), dtype=np.int64)
    plan = tensor_memory_layout.copy_plan("32x128b.warpx4")
    source = np.arange(512).reshape(plan.rows, 4, 4)
    for lanes in plan.lanes:
        memory[lanes] = source
    place = tensor_memory_layout.scale_factors(128, 4)
    atom = cute_layout.table(((32, 4), 4), ((16, 4), 1))
    for copy in range(4):
        read = memory[place.lane[copy], place.column[copy], place.byte[copy]]
        np.testing.assert_array_equal(read, atom)
    with pytest.raises(UnsupportedError, match="64x128b"):
        tensor_memory_layout.copy_plan("64x128b")


# Copy_Traits<SM100_TMEM_LOAD_...>: ValID, and DstLayout (threads, bits of a thread) -> bit.
LOADS = {
    ("32x32b", 1, 0): ((32, 32), (1, DP), (32, 32), (32, 1)),
    ("32x32b", 2, 0): ((64, 32), (1, DP), (32, 64), (64, 1)),
    ("32x32b", 32, 0): ((1024, 32), (1, DP), (32, 1024), (1024, 1)),
    ("16x64b", 1, 0): ((64, 16), (1, DP), ((2, 2, 8), 32), ((512, 32, 64), 1)),
    ("16x64b", 2, 0): ((128, 16), (1, DP), ((2, 2, 8), (32, 2)), ((1024, 32, 128), (1, 64))),
    ("16x128b", 1, 0): ((128, 16), (1, DP), ((4, 8), (32, 2)), ((32, 128), (1, 1024))),
    ("16x128b", 2, 0): ((256, 16), (1, DP), ((4, 8), (32, 2, 2)), ((32, 256), (1, 2048, 128))),
    ("16x256b", 1, 0): ((256, 16), (1, DP), ((4, 8), (64, 2)), ((64, 256), (1, 2048))),
    ("16x256b", 2, 0): ((512, 16), (1, DP), ((4, 8), (64, 2, 2)), ((64, 512), (1, 4096, 256))),
    ("16x32bx2", 1, 1): ((64, 16), (1, DP), ((16, 2), 32), ((64, 32), 1)),
    ("16x32bx2", 2, 2): ((128, 16), (1, DP), ((16, 2), 64), ((128, 64), 1)),
}
# The same with pack::16b, whose ValID takes the low halves of twice the columns.
PACKED = {
    ("32x32b", 1, 0): (((16, 2), 32), ((1, 32), DP), (32, 32), (32, 1)),
    ("16x64b", 1, 0): (((16, 4), 16), ((1, 32), DP), ((2, 2, 8), 32), ((512, 32, 64), 1)),
    ("16x128b", 1, 0): (((16, 8), 16), ((1, 32), DP), ((4, 8), (32, 2)), ((32, 128), (1, 1024))),
    ("16x256b", 1, 0): (((16, 16), 16), ((1, 32), DP), ((4, 8), (64, 2)), ((64, 256), (1, 2048))),
    ("16x32bx2", 1, 2): (((16, 4), 16), ((1, 32), DP), ((16, 2), 32), ((64, 32), 1)),
}


@pytest.mark.parametrize("case", LOADS)
def test_loads_and_stores(case):
    shape, repeat, split = case
    val_shape, val_stride, dst_shape, dst_stride = LOADS[case]
    logical = cute_layout.table(dst_shape, dst_stride)
    address = cute_layout.offset(val_shape, val_stride, logical)
    place = tensor_memory_layout.registers(shape, repeat, split=split)
    registers = place.lane.shape[0]
    assert logical.shape == (32, 32 * registers)
    expected = (place.lane * DP + 32 * place.column).T[:, :, None] + np.arange(32)
    np.testing.assert_array_equal(address.reshape(32, registers, 32), expected)


@pytest.mark.parametrize("case", PACKED)
def test_packed_loads_and_stores(case):
    shape, repeat, split = case
    val_shape, val_stride, dst_shape, dst_stride = PACKED[case]
    address = cute_layout.offset(val_shape, val_stride, cute_layout.table(dst_shape, dst_stride))
    place = tensor_memory_layout.registers(shape, repeat, pack=True, split=split)
    registers = place.lane.shape[0]
    expected = np.moveaxis(place.lane * DP + 32 * place.column, 1, 0)[..., None] + np.arange(16)
    np.testing.assert_array_equal(address.reshape(32, registers, 2, 16), expected)


@pytest.mark.parametrize("shape", tensor_memory_layout.SHAPES)
def test_loads_of_every_length_take_every_word_once(shape):
    per, largest = tensor_memory_layout.SHAPES[shape]
    repeat = 1
    while repeat <= largest:
        place = tensor_memory_layout.registers(
            shape, repeat, split=repeat if shape == "16x32bx2" else 0
        )
        lanes = 32 if shape == "32x32b" else 16
        words = np.unique(place.lane * 512 + place.column)
        assert words.size == place.lane.size == per * repeat * 32
        assert place.lane.max() == lanes - 1
        assert place.column.max() == per * repeat * 32 // lanes - 1
        repeat *= 2
    for wrong in (0, 3, 2 * largest):
        with pytest.raises(EmulatorError, match="powers of two"):
            tensor_memory_layout.registers(shape, wrong)


def test_load_refusals():
    with pytest.raises(UnsupportedError, match="8x8b"):
        tensor_memory_layout.registers("8x8b", 1)
    with pytest.raises(EmulatorError, match="half-split"):
        tensor_memory_layout.registers("32x32b", 1, split=4)


def test_block_scaled_product_is_exact():
    rng = np.random.default_rng(8)
    a, b = (formats.e2m1_to_f32(rng.integers(0, 16, (8, 64))) for _ in range(2))
    sfa, sfb = (
        formats.e4m3_to_f32(rng.integers(0, 0x7F, (8, 4))).astype(np.float64) for _ in range(2)
    )
    actual = tensor_memory_layout.block_scaled_product(a, sfa, b, sfb)
    for m in range(8):
        for n in range(8):
            # In units of 2^-20, where everything is an integer.
            units = sum(
                int(a[m, k] * sfa[m, k // 16] * 1024) * int(b[n, k] * sfb[n, k // 16] * 1024)
                for k in range(64)
            )
            assert int(actual[m, n] * 2**20) == units
