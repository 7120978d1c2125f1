"""Fragments against CUTLASS layouts, and whole instructions against float64 products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulator import cute_layout, formats, fragments
from tests.emulator.errors import EmulatorError, Fault, UnsupportedError

# (thread, value) -> offset in a column-major M x K, N x K or M x N matrix, from
# include/cute/atom/mma_traits_sm80.hpp, mma_traits_sm89.hpp and mma_traits_sm120.hpp.
LAYOUTS = {
    # SM80_16x8x8_F16F16F16F16_TN
    ("m16n8k8", "A", 16): (((4, 8), (2, 2)), ((32, 1), (16, 8))),
    ("m16n8k8", "B", 16): (((4, 8), 2), ((16, 1), 8)),
    # SM80_16x8x16_F16F16F16F16_TN
    ("m16n8k16", "A", 16): (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    ("m16n8k16", "B", 16): (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    # SM80_16x8x8_F32TF32TF32F32_TN
    ("m16n8k8", "A", 32): (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ("m16n8k8", "B", 32): (((4, 8), 2), ((8, 1), 32)),
    # SM80_16x8x32_S32S8S8S32_TN, SM89_16x8x32_F32E4M3E4M3F32_TN, SM120_16x8x32_TN
    ("m16n8k32", "A", 8): (((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
    ("m16n8k32", "B", 8): (((4, 8), (4, 2)), ((32, 1), (8, 128))),
    # SM120::BLOCKSCALED::SM120_16x8x64_TN_VS
    ("m16n8k64", "A", 4): (((4, 8), (8, 2, 2)), ((128, 1), (16, 8, 512))),
    ("m16n8k64", "B", 4): (((4, 8), (8, 2)), ((64, 1), (8, 256))),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_operands_equal_cutlass(case):
    shape, operand, bits = case
    expected = cute_layout.table(*LAYOUTS[case])
    place = fragments.fragment(shape, operand, bits)
    extent = {"A": 16, "B": 8}[operand]
    offset = np.moveaxis(place.major + extent * place.minor, 1, 0).reshape(32, -1)
    np.testing.assert_array_equal(offset, expected)
    np.testing.assert_array_equal(np.sort(offset, axis=None), np.arange(offset.size))


@pytest.mark.parametrize("bits", [16, 32])
def test_accumulators_equal_cutlass(bits):
    """SM80_16x8_Row."""
    expected = cute_layout.table(((4, 8), (2, 2)), ((32, 1), (16, 8)))
    place = fragments.fragment("m16n8k16", "C", bits)
    offset = np.moveaxis(place.major + 16 * place.minor, 1, 0).reshape(32, -1)
    np.testing.assert_array_equal(offset, expected)


def test_scale_lanes_equal_cutlass():
    """SFALayout and SFBLayout of SM120_16x8x64_TN_VS: the row that each lane's scales belong to.

    Every lane of CUTLASS' layout holds the scales; which lanes are read depends on thread-id.
    """
    row_of_lane = cute_layout.offset((2, 2, 8), (8, 0, 1), np.arange(32))
    column_of_lane = cute_layout.offset((4, 8), (0, 1), np.arange(32))
    for thread_id in range(2):
        lanes = fragments.scale_lanes("A", thread_id)
        np.testing.assert_array_equal(row_of_lane[lanes], np.arange(16))
        assert (lanes % 4 // 2 == thread_id).all()
    for thread_id in range(4):
        lanes = fragments.scale_lanes("B", thread_id)
        np.testing.assert_array_equal(column_of_lane[lanes], np.arange(8))
        assert (lanes % 4 == thread_id).all()
    for operand, thread_id in (("A", 2), ("B", 4)):
        with pytest.raises(Fault, match="thread-id"):
            fragments.scale_lanes(operand, thread_id)


def _scatter(matrix, shape, operand, bits):
    """Registers (n, 32) holding the raw elements of `matrix`, packed one by one."""
    shape_tv, stride_tv = LAYOUTS[shape, operand, bits]
    offsets = cute_layout.table(shape_tv, stride_tv)
    per = 32 // bits
    registers = np.zeros((offsets.shape[1] // per, 32), dtype=np.uint32)
    flat = matrix.T.reshape(-1)
    for lane in range(32):
        for value in range(offsets.shape[1]):
            raw = np.uint32(flat[offsets[lane, value]])
            registers[value // per, lane] |= raw << np.uint32(bits * (value % per))
    return registers


def _matrix(registers):
    """M x N of an accumulator (4, 32), by SM80_16x8_Row."""
    offsets = cute_layout.table(((4, 8), (2, 2)), ((32, 1), (16, 8)))
    flat = np.empty(128, dtype=registers.dtype)
    flat[offsets] = registers.T
    return flat.reshape(8, 16).T


@pytest.mark.parametrize(
    ("shape", "kind", "bits"),
    [
        ("m16n8k8", "f16", 16),
        ("m16n8k16", "f16", 16),
        ("m16n8k16", "bf16", 16),
        ("m16n8k32", "e4m3", 8),
        ("m16n8k32", "e5m2", 8),
        ("m16n8k8", "tf32", 32),
    ],
)
def test_mma_equals_a_matrix_product(shape, kind, bits):
    rng = np.random.default_rng(10)
    k = int(shape.split("k")[1])
    a, b = (
        rng.standard_normal((16, k)).astype(np.float32),
        rng.standard_normal((8, k)).astype(np.float32),
    )
    dtype = {
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "tf32": torch.float32,
    }[kind]
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits]
    raw, value = [], []
    for x in (a, b):
        narrow = torch.from_numpy(x).to(dtype)
        raw.append(narrow.view(integer).numpy().view(f"u{bits // 8}").astype(np.uint32))
        value.append(narrow.double().numpy())
    if kind == "tf32":
        value = [
            (r & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64) for r in raw
        ]
    c = rng.standard_normal((4, 32)).astype(np.float32)
    d = fragments.mma(
        shape, _scatter(raw[0], shape, "A", bits), _scatter(raw[1], shape, "B", bits), c, kind, kind
    )
    expected = value[0] @ value[1].T + _matrix(c)
    np.testing.assert_array_equal(_matrix(d), expected.astype(np.float32))
    assert d.dtype == np.float32
    if (shape, kind) == ("m16n8k16", "bf16"):
        registers = [_scatter(raw[0], shape, "A", 16), _scatter(raw[1], shape, "B", 16)]
        np.testing.assert_array_equal(fragments.mma_f16(*registers, c, "bf16"), d)


def test_integer_mma():
    rng = np.random.default_rng(11)
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(0, 256, (8, 32))
    c = rng.integers(-(2**31), 2**31, (4, 32)).astype(np.int32)
    registers = [_scatter(x & 0xFF, "m16n8k32", operand, 8) for x, operand in ((a, "A"), (b, "B"))]
    d = fragments.mma("m16n8k32", *registers, c, "s8", "u8")
    expected = (a @ b.T + _matrix(c).astype(np.int64)).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(_matrix(d), expected)


def _scale_registers(factors, lanes, byte):
    """Scale operand with noise in every byte and lane that must not be read."""
    registers = np.random.default_rng(12).integers(0, 1 << 32, 32, dtype=np.uint32)
    for row, lane in enumerate(lanes):
        for block, code in enumerate(factors[row]):
            shift = np.uint32(8 * (byte + block))
            registers[lane] &= ~(np.uint32(0xFF) << shift)
            registers[lane] |= np.uint32(code) << shift
    return registers


@pytest.mark.parametrize(
    ("kind", "vector", "scale", "selectors"),
    [
        ("mxf4nvf4", 4, "ue4m3", (0, 0, 0, 0)),
        ("mxf4nvf4", 4, "ue4m3", (0, 1, 0, 3)),
        ("mxf4nvf4", 4, "ue8m0", (0, 0, 0, 2)),
        ("mxf4nvf4", 2, "ue8m0", (2, 1, 0, 1)),
        ("mxf4", 2, "ue8m0", (0, 0, 2, 0)),
    ],
)
def test_block_scaled_mma_equals_a_matrix_product(kind, vector, scale, selectors):
    rng = np.random.default_rng(13)
    a_byte, a_thread, b_byte, b_thread = selectors
    a, b = rng.integers(0, 16, (16, 64)), rng.integers(0, 16, (8, 64))
    span = (0, 0x7F) if scale == "ue4m3" else (120, 134)
    sfa, sfb = rng.integers(*span, (16, vector)), rng.integers(*span, (8, vector))
    value = []
    for codes, factors in ((a, sfa), (b, sfb)):
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        element = table[codes & 7] * np.where(codes & 8, -1, 1)
        torch_scale = torch.float8_e4m3fn if scale == "ue4m3" else torch.float8_e8m0fnu
        decoded = torch.from_numpy(factors.astype(np.uint8)).view(torch_scale).double().numpy()
        value.append(element * np.repeat(decoded, 64 // vector, axis=1))
    c = rng.standard_normal((4, 32)).astype(np.float32)
    # Lanes by the PTX rule, spelled out.
    a_lanes = [4 * (row % 8) + 2 * a_thread + row // 8 for row in range(16)]
    b_lanes = [4 * column + b_thread for column in range(8)]
    d = fragments.mma_block_scale(
        _scatter(a, "m16n8k64", "A", 4),
        _scatter(b, "m16n8k64", "B", 4),
        c,
        _scale_registers(sfa, a_lanes, a_byte),
        _scale_registers(sfb, b_lanes, b_byte),
        fragments.BlockScale(
            kind,
            vector,
            scale=scale,
            a_byte=a_byte,
            a_thread=a_thread,
            b_byte=b_byte,
            b_thread=b_thread,
        ),
    )
    expected = value[0] @ value[1].T + _matrix(c)
    np.testing.assert_array_equal(_matrix(d), expected.astype(np.float32))


def test_mxf8f6f4_reads_narrow_elements_where_cutlass_puts_them():
    """e2m1 sits in bits 2 to 5 of its byte (fp4_shift_A), e3m2 in bits 0 to 5."""
    rng = np.random.default_rng(14)
    a, b = rng.integers(0, 16, (16, 32)), rng.integers(0, 64, (8, 32))
    sfa, sfb = rng.integers(120, 134, (16, 1)), rng.integers(120, 134, (8, 1))
    c = np.zeros((4, 32), dtype=np.float32)
    d = fragments.mma_block_scale(
        _scatter(a << 2, "m16n8k32", "A", 8),
        _scatter(b, "m16n8k32", "B", 8),
        c,
        _scale_registers(sfa, [4 * (row % 8) + row // 8 for row in range(16)], 3),
        _scale_registers(sfb, [4 * column + 2 for column in range(8)], 1),
        fragments.BlockScale(
            "mxf8f6f4", 1, a="e2m1", b="e3m2", scale="ue8m0", a_byte=3, b_byte=1, b_thread=2
        ),
    )
    left = formats.e2m1_to_f32(a).astype(np.float64) * 2.0 ** (sfa - 127)
    right = formats.to_f32(b, "e3m2").astype(np.float64) * 2.0 ** (sfb - 127)
    np.testing.assert_array_equal(_matrix(d), (left @ right.T).astype(np.float32))


def test_nan_scales_poison_only_their_row():
    c = np.ones((4, 32), dtype=np.float32)
    ones = np.full((4, 32), 0x22222222, dtype=np.uint32)
    sfa = np.full(32, 0x38383838, dtype=np.uint32)
    sfa[4 * 3 + 1] = 0x38387F38
    d = _matrix(
        fragments.mma_block_scale(ones, ones[:2], c, sfa, np.full(32, 0x38383838, np.uint32))
    )
    assert (d.view(np.uint32)[11] == 0x7FFFFFFF).all()
    assert (np.delete(d, 11, axis=0) == 65).all()


def test_refusals():
    zero = np.zeros((4, 32), dtype=np.uint32)
    c = zero.view(np.float32)
    with pytest.raises(UnsupportedError, match="m8n8k4"):
        fragments.fragment("m8n8k4", "A", 16)
    with pytest.raises(UnsupportedError, match="operand A of 8 bits"):
        fragments.fragment("m16n8k64", "A", 8)
    with pytest.raises(Fault, match="byte-id 1 with scale_vec::4X"):
        fragments.mma_block_scale(
            zero, zero[:2], c, zero[0], zero[0], fragments.BlockScale(a_byte=1)
        )
    with pytest.raises(EmulatorError, match="ue4m3 with scale_vec::2X"):
        fragments.mma_block_scale(
            zero, zero[:2], c, zero[0], zero[0], fragments.BlockScale(vector=2)
        )
    with pytest.raises(UnsupportedError, match="e4m3 and f16"):
        fragments.mma("m16n8k32", zero, zero[:2], c, "e4m3", "f16")
    with pytest.raises(UnsupportedError, match="x3"):
        fragments.matrix_move(3)


# include/cute/atom/copy_traits_sm75.hpp: SrcLayout and DstLayout of SM75_U32x{1,2,4}_LDSM_N and
# SM75_U16x{2,4,8}_LDSM_T, to bits of the matrices; stmatrix swaps the two (copy_traits_sm90.hpp).
MOVES = {
    (1, False): ((((8, 4), 128), ((128, 0), 1)), ((32, 32), (32, 1))),
    (2, False): ((((16, 2), 128), ((128, 0), 1)), ((32, (32, 2)), (32, (1, 1024)))),
    (4, False): (((32, 128), (128, 1)), ((32, (32, 4)), (32, (1, 1024)))),
    (1, True): ((((8, 4), 128), ((128, 0), 1)), (((4, 8), (16, 2)), ((256, 16), (1, 128)))),
    (2, True): (
        (((16, 2), 128), ((128, 0), 1)),
        (((4, 8), (16, 2, 2)), ((256, 16), (1, 128, 1024))),
    ),
    (4, True): (((32, 128), (128, 1)), (((4, 8), (16, 2, 4)), ((256, 16), (1, 128, 1024)))),
}


@pytest.mark.parametrize("case", MOVES)
def test_matrix_moves_equal_cutlass(case):
    count, trans = case
    source, destination = (cute_layout.table(*layout) for layout in MOVES[case])
    lanes, byte = fragments.matrix_move(count, trans=trans)
    # Bit of each half register by way of the row its address lane supplies.
    by_row = source[lanes, 8 * byte]
    by_register = destination.reshape(32, count, 2, 16)[..., 0]
    np.testing.assert_array_equal(np.moveaxis(by_row, 1, 0), by_register)
    assert np.unique(8 * lanes + byte // 2).size == 64 * count
