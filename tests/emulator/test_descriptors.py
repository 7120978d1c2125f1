"""Descriptors: constants of NVIDIA's kernels, field by field, and canonical layouts of CUTLASS.

Layouts are those in the comments of include/cute/arch/mma_sm100_desc.hpp, `make_umma_desc`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import cute_layout, descriptors, swizzle
from tests.emulator.errors import EmulatorError, Fault, UnsupportedError


def test_decodes_the_descriptors_of_nvidia_kernels():
    """Of NVIDIA's 128x64 NVFP4 GEMM: operands, and the source of its scale-factor copies."""
    operand = descriptors.decode_shared(0x4000_4040_0001_0000 | 0x840)
    assert operand == descriptors.SharedDescriptor(0x8400, 16, 1024, "128B")
    scales = descriptors.decode_shared(0x0000_4008_0001_0000)
    assert scales == descriptors.SharedDescriptor(0, 16, 128, "none")


@pytest.mark.parametrize("mode", descriptors.ATOM_CHUNKS)
def test_shared_descriptors_round_trip(mode):
    original = descriptors.SharedDescriptor(0x3FFF0, 0x1230, 0x20000, mode)
    assert descriptors.decode_shared(descriptors.encode_shared(original)) == original


@pytest.mark.parametrize(
    ("bits", "error", "match"),
    [
        (1 << 14, Fault, "bits 14-15"),
        (1 << 31, Fault, "bits 30-31"),
        (1 << 46, Fault, "bits 46-48"),
        (1 << 48, Fault, "bits 46-48"),
        (1 << 49, UnsupportedError, "base offset 1"),
        (1 << 52, UnsupportedError, "mode 1"),
        (1 << 60, Fault, "bits 53-60"),
        (1 << 61, Fault, "layout type 3"),
        (3 << 61, UnsupportedError, "layout 1"),
    ],
)
def test_shared_descriptors_refuse(bits, error, match):
    with pytest.raises(error, match=match):
        descriptors.decode_shared(0x4000_4040_0001_0000 ^ bits)


def test_wgmma_descriptors():
    for code, mode in ((0, "none"), (1, "128B"), (2, "64B"), (3, "32B")):
        word = 0x840 | 1 << 16 | 0x40 << 32 | code << 62
        decoded = descriptors.decode_wgmma(word)
        assert decoded == descriptors.SharedDescriptor(0x8400, 16, 1024, mode)
    for bit in (14, 15, 30, 31, 46, 47, 48, *range(52, 62)):
        with pytest.raises(Fault, match="reserved"):
            descriptors.decode_wgmma(1 << bit)
    for bit in (49, 50, 51):
        with pytest.raises(UnsupportedError, match="base offset"):
            descriptors.decode_wgmma(1 << bit)


@pytest.mark.parametrize("rows", [8, 64, 128])
@pytest.mark.parametrize(("mode", "width"), [("none", 1), ("32B", 2), ("64B", 4), ("128B", 8)])
def test_k_major_equals_cutlass(mode, width, rows):
    """((8, m), 2) : ((W, SBO), 1), without swizzle ((8, m), 2) : ((1, SBO), LBO), 16-byte units."""
    start, leading, stride = 0x8440, 0x4000, 0x480
    chunk = leading // 16 if mode == "none" else 1
    units = cute_layout.table(((8, rows // 8), 2), ((width, stride // 16), chunk))
    linear = start + 16 * units[:, :, None] + np.arange(16)
    descriptor = descriptors.SharedDescriptor(start, leading, stride, mode)
    actual = descriptors.operand_bytes(descriptor, rows, 32)
    np.testing.assert_array_equal(actual, swizzle.apply(linear.reshape(rows, 32), mode))
    narrow = descriptors.operand_bytes(descriptor, rows, 16)
    np.testing.assert_array_equal(narrow, actual[:, :16])


@pytest.mark.parametrize("element", [1, 2])
@pytest.mark.parametrize(("mode", "width"), [("none", 1), ("32B", 2), ("64B", 4), ("128B", 8)])
def test_mn_major_equals_cutlass(mode, width, element):
    """((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO)) in elements; none swaps LBO and SBO."""
    rows, depth, per = 128 * 2 // element, 32 // element, 16 // element
    start, leading, stride = 0x8000, 0x1000, 0x2000
    along_mn, along_k = (stride, leading) if mode == "none" else (leading, stride)
    linear = cute_layout.table(
        ((per, width, rows // per // width), (8, depth // 8)),
        ((1, per, along_mn // element), (width * per, along_k // element)),
    )
    linear = start + element * linear[:, :, None] + np.arange(element)
    descriptor = descriptors.SharedDescriptor(start, leading, stride, mode)
    actual = descriptors.operand_bytes(descriptor, rows, 32, element_bytes=element)
    np.testing.assert_array_equal(actual, swizzle.apply(linear.reshape(rows, 32), mode))


def test_operand_bytes_of_a_tile_are_all_different():
    """Four K steps of 32 bytes over 128 rows cover a 16-KB tile of 128-byte swizzle once."""
    seen = [
        descriptors.operand_bytes(
            descriptors.SharedDescriptor(0x8400 + k, 16, 1024, "128B"), 128, 32
        )
        for k in (0, 32, 64, 96)
    ]
    np.testing.assert_array_equal(np.sort(np.stack(seen), axis=None), 0x8400 + np.arange(16384))


def test_scale_copies_read_rows_of_16_bytes():
    descriptor = descriptors.decode_shared(0x0000_4008_0001_0000)
    address = descriptors.operand_bytes(descriptor, 32, 16)
    np.testing.assert_array_equal(address.reshape(-1), np.arange(512))
    with pytest.raises(UnsupportedError, match="48 bytes"):
        descriptors.operand_bytes(descriptor, 32, 48)
    with pytest.raises(UnsupportedError, match="4-byte"):
        descriptors.operand_bytes(descriptor, 32, 32, element_bytes=4)


def _block_scaled(m, n, scale="ue4m3", **bits):
    """make_instr_desc_block_scaled for e2m1, packed as the bit-field in the header lists it."""
    fields = {"b_sf_id": 4, "a_format": 7, "b_format": 10, "a_negate": 13, "b_negate": 14}
    fields |= {"a_major": 15, "b_major": 16, "a_sf_id": 29, "k_size": 31}
    values = {"a_format": 1, "b_format": 1} | bits
    word = sum(value << fields[name] for name, value in values.items())
    return word | (n >> 3) << 17 | (scale == "ue8m0") << 23 | (m >> 4) << 24


@pytest.mark.parametrize(
    ("word", "group", "m", "n"),
    [(0x08100480, 1, 128, 64), (0x10200480, 2, 256, 128), (0x10300480, 2, 256, 192)],
)
def test_decodes_the_instructions_of_nvidia_kernels(word, group, m, n):
    decoded = descriptors.decode_instruction(word, "mxf4nvf4", group, 4)
    assert decoded == descriptors.InstructionDescriptor(
        kind="mxf4nvf4", m=m, n=n, k=64, a="e2m1", b="e2m1", scale="ue4m3"
    )
    assert word == _block_scaled(m, n)
    negated = descriptors.decode_instruction(word | 0x6000, "mxf4nvf4", group, 4)
    assert negated.a_negate
    assert negated.b_negate


@pytest.mark.parametrize(
    ("word", "kind", "group", "vector", "error", "match"),
    [
        (_block_scaled(64, 64), "mxf4nvf4", 1, 4, Fault, "M 64"),
        (_block_scaled(256, 64), "mxf4nvf4", 1, 4, Fault, "M 256"),
        (_block_scaled(128, 8), "mxf4nvf4", 2, 4, Fault, "N 8"),
        (_block_scaled(128, 264), "mxf4nvf4", 1, 4, Fault, "N 264"),
        (_block_scaled(128, 0), "mxf4nvf4", 1, 4, Fault, "N 0"),
        (_block_scaled(128, 64, a_sf_id=1), "mxf4nvf4", 1, 4, Fault, "a_scale_id 1"),
        (_block_scaled(128, 64, "ue8m0", b_sf_id=3), "mxf4", 1, 2, Fault, "b_scale_id 3"),
        (_block_scaled(128, 64), "mxf4", 1, 2, Fault, "scale format ue4m3"),
        (_block_scaled(128, 64), "mxf4nvf4", 1, 2, Fault, "scale format ue4m3"),
        (_block_scaled(128, 64), "mxf4nvf4", 1, 1, Fault, "scale_vec::1X"),
        (_block_scaled(128, 64, b_major=1), "mxf4nvf4", 1, 4, Fault, "MN-major B"),
        (_block_scaled(128, 64, a_format=0), "mxf4nvf4", 1, 4, Fault, "A format 0"),
        (_block_scaled(128, 64, k_size=1), "mxf4nvf4", 1, 4, UnsupportedError, "K = 96"),
        (_block_scaled(128, 64) | 4, "mxf4nvf4", 1, 4, UnsupportedError, "sparsity"),
        (_block_scaled(128, 64) | 8, "mxf4nvf4", 1, 4, Fault, "bit 3"),
        (_block_scaled(128, 64), "i8", 1, None, UnsupportedError, "kind::i8"),
        (_block_scaled(128, 64), "mxf4nvf4", 3, 4, EmulatorError, "cta_group 3"),
    ],
)
def test_block_scaled_instructions_refuse(word, kind, group, vector, error, match):
    with pytest.raises(error, match=match):
        descriptors.decode_instruction(word, kind, group, vector)


def test_scale_ids():
    word = _block_scaled(128, 64, "ue8m0", a_sf_id=2)
    assert descriptors.decode_instruction(word, "mxf4nvf4", 1, 2).a_scale_id == 2
    word = _block_scaled(128, 64, "ue8m0", a_format=0, b_format=4, b_sf_id=3, b_major=0)
    decoded = descriptors.decode_instruction(word, "mxf8f6f4", 1, 1)
    assert (decoded.a, decoded.b, decoded.b_scale_id, decoded.k) == ("e4m3", "e3m2", 3, 32)


def _dense(m, n, a, b, c=1, **bits):
    """make_instr_desc: c_format at 4, a_format at 7, b_format at 10, majors at 15 and 16."""
    fields = {"saturate": 3, "a_major": 15, "b_major": 16, "reserved": 23, "max_shift": 30}
    word = sum(value << fields[name] for name, value in bits.items())
    return word | c << 4 | a << 7 | b << 10 | (n >> 3) << 17 | (m >> 4) << 24


@pytest.mark.parametrize(
    ("word", "kind", "group", "expected"),
    [
        (_dense(128, 256, 1, 1), "f16", 1, ("bf16", "f32", 16, False)),
        (_dense(64, 8, 0, 0, 0, b_major=1), "f16", 1, ("f16", "f16", 16, True)),
        (_dense(256, 16, 2, 2), "tf32", 2, ("tf32", "f32", 8, False)),
        (_dense(128, 64, 5, 0, b_major=1), "f8f6f4", 2, ("e2m1", "f32", 32, True)),
    ],
)
def test_dense_instructions(word, kind, group, expected):
    decoded = descriptors.decode_instruction(word, kind, group)
    assert (decoded.a, decoded.d, decoded.k, decoded.b_mn_major) == expected
    assert decoded.scale is None


@pytest.mark.parametrize(
    ("word", "kind", "error", "match"),
    [
        (_dense(128, 64, 1, 1, 0), "f16", Fault, "f16 accumulation of bf16"),
        (_dense(128, 64, 0, 1), "f16", UnsupportedError, "A f16 with B bf16"),
        (_dense(128, 64, 2, 2), "f16", Fault, "A format 2"),
        (_dense(128, 64, 2, 2, 0), "tf32", Fault, "D format 0"),
        (_dense(128, 64, 1, 1, 2), "f16", Fault, "D format 2"),
        (_dense(128, 8, 0, 0, b_major=1), "f8f6f4", Fault, "N 8"),
        (_dense(128, 64, 5, 0, a_major=1), "f8f6f4", Fault, "MN-major A of e2m1"),
        (_dense(128, 64, 0, 0, saturate=1), "f16", Fault, "saturate"),
        (_dense(128, 64, 0, 0, reserved=1), "f16", Fault, "bit 23"),
        (_dense(128, 64, 0, 0, max_shift=1), "f16", UnsupportedError, "maximum shift"),
    ],
)
def test_dense_instructions_refuse(word, kind, error, match):
    with pytest.raises(error, match=match):
        descriptors.decode_instruction(word, kind, 1)
