"""Tensor maps: the bytes NVIDIA's host code wrote, round trips, and boxes against numpy slices."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from tests.emulator import swizzle, tensor_map
from tests.emulator.errors import EmulatorError, UnsupportedError

# A of NVIDIA's 128x64 NVFP4 GEMM with M, N, K = 256, 256, 512, as its host code writes it.
OP0_A = struct.pack(
    "<8Q",
    0x00007F0000010000,
    0x00000010000465A2,
    0x0000000000001000,
    0,
    0x000000FF000001FF,
    0,
    0xFF00000000000000,
    0x7F,
) + bytes(range(64))


def _map(**changes):
    fields = {
        "address": 0x7F0000010000,
        "kind": "u8",
        "bits": 8,
        "dims": (64, 5, 3),
        "strides": (80, 480),
        "box": (32, 4, 2),
        "element_strides": (1, 1, 1),
        "swizzle": "none",
    }
    return tensor_map.TensorMap(**(fields | changes))


def test_decodes_a_map_of_an_nvidia_kernel():
    decoded = tensor_map.decode(OP0_A)
    assert decoded == tensor_map.TensorMap(
        address=0x7F0000010000,
        kind="u4_align8",
        bits=4,
        dims=(512, 256, 1),
        strides=(256, 65536),
        box=(256, 128, 1),
        element_strides=(1, 1, 1),
        swizzle="128B",
        l2_promotion=2,
    )
    assert decoded.box_bytes == 16384
    assert tensor_map.encode(decoded)[:64] == OP0_A[:64]
    assert tensor_map.decode(OP0_A[:64] + bytes(64)) is decoded


def test_the_scale_factor_map():
    """SFA moves as u16: 256 elements are one atom of 128 rows x 4 blocks."""
    atoms = _map(
        kind="u16",
        bits=16,
        dims=(256, 8, 2, 1),
        strides=(512, 4096, 8192),
        box=(256, 4, 1, 1),
        element_strides=(1, 1, 1, 1),
        l2_promotion=2,
    )
    decoded = tensor_map.decode(tensor_map.encode(atoms))
    assert decoded == atoms
    assert decoded.box_bytes == 2048
    plan = decoded.load_plan((0, 4, 1, 0))
    assert plan.valid.all()
    np.testing.assert_array_equal(plan.offset, 4 * 512 + 4096 + np.arange(2048))


@pytest.mark.parametrize("kind", tensor_map.CODES)
def test_round_trips(kind):
    bits = dict(tensor_map.TYPES.values())[kind]
    rng = np.random.default_rng(bits)
    for rank, mode in itertools.product(range(1, 6), tensor_map.SWIZZLES):
        inner = 32 * 8 // bits
        original = _map(
            address=int(rng.integers(0, 1 << 44)) << 4,
            kind=kind,
            bits=bits,
            dims=tuple(int(2 * d) for d in rng.integers(1, 1 << 31, rank)),
            strides=tuple(int(s) << 4 for s in rng.integers(0, 1 << 36, rank - 1)),
            box=(inner, *(int(b) for b in rng.integers(1, 257, rank - 1))),
            element_strides=(1,) * rank,
            swizzle=mode,
            l2_promotion=int(rng.integers(0, 4)),
        )
        assert tensor_map.decode(tensor_map.encode(original)) == original


def _flip(word, bit):
    words = list(struct.unpack("<8Q", OP0_A[:64]))
    words[word] ^= 1 << bit
    return struct.pack("<8Q", *words) + bytes(64)


@pytest.mark.parametrize(
    ("word", "bit", "name"),
    [
        (1, 0, "version"),
        (1, 11, "interleave"),
        (1, 15, "oob fill"),
        (1, 16, "tf32"),
        (1, 19, "swizzle atom"),
        (1, 22, "word 1 bits"),
        (1, 9, "type = 15"),
        (3, 48, "word 3 bits"),
        (6, 32, "element strides"),
        (6, 47, "word 6 bits"),
        (7, 32, "word 7 bits"),
    ],
)
def test_refuses_unobserved_fields_by_name(word, bit, name):
    with pytest.raises(UnsupportedError, match=name):
        tensor_map.decode(_flip(word, bit))


def test_ignores_the_large_tensor_bit():
    assert tensor_map.decode(_flip(1, 21)) == tensor_map.decode(OP0_A)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"address": 0x1008}, "address"),
        ({"strides": (72, 480)}, "stride 1"),
        ({"strides": (80, 1 << 40)}, "stride 2"),
        ({"box": (24, 4, 2)}, "box 0: 24 bytes"),
        ({"box": (64, 4, 2), "swizzle": "32B"}, "box 0: 64 bytes exceed"),
        ({"box": (32, 257, 2)}, "box 1"),
        ({"dims": (64, 0, 3)}, "dim 1"),
        ({"box": (32, 4)}, "rank"),
        ({"kind": "u4_align8", "bits": 4, "dims": (63, 5, 3)}, "dim 0"),
        ({"kind": "u4_align8", "bits": 4, "box": (33, 4, 2)}, "box 0"),
        ({"element_strides": (1, 2, 1)}, "element strides"),
        ({"swizzle": "256B"}, "swizzle"),
    ],
)
def test_checks_name_the_field(changes, name):
    with pytest.raises(EmulatorError, match=name):
        _map(**changes)


@pytest.mark.parametrize("coords", [(0, 0, 0), (48, 3, 2), (-16, -1, -1), (40, 4, 0), (100, 0, 0)])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_boxes_equal_slices_of_a_padded_tensor(coords, bits):
    """A tensor with gaps between rows, gathered byte by byte and by slicing a padded copy."""
    rng = np.random.default_rng(9)
    per_byte = 8 / bits
    dims, box = (int(64 * per_byte), 5, 3), (int(32 * per_byte), 4, 2)
    coords = (int(coords[0] * per_byte), *coords[1:])
    kind = {4: "u4_align8", 8: "u8", 16: "bf16", 32: "f32"}[bits]
    m = _map(kind=kind, bits=bits, dims=dims, box=box)
    memory = rng.integers(1, 256, 480 * 3, dtype=np.uint8)
    tensor = np.lib.stride_tricks.as_strided(memory, (3, 5, 64), (480, 80, 1))
    padded = np.zeros((3 + 8, 5 + 16, 64 + 256), dtype=np.uint8)
    padded[4:7, 8:13, 128:192] = tensor
    x = int(coords[0] / per_byte)
    expected = padded[
        4 + coords[2] : 6 + coords[2], 8 + coords[1] : 12 + coords[1], 128 + x : 160 + x
    ]
    plan = m.load_plan(coords)
    got = np.where(plan.valid, memory[np.where(plan.valid, plan.offset, 0)], 0)
    assert m.box_bytes == got.size == 256
    np.testing.assert_array_equal(got.reshape(2, 4, 32), expected)
    # The same plan stores: only valid bytes are written, and they are the tensor's own.
    out = np.zeros_like(memory)
    out[plan.offset[plan.valid]] = got[plan.valid]
    assert np.count_nonzero(out) == plan.valid.sum()


def test_coordinates_are_checked():
    with pytest.raises(EmulatorError, match="coordinates: 2 given"):
        _map().load_plan((0, 0))
    with pytest.raises(UnsupportedError, match="coordinate 0"):
        tensor_map.decode(OP0_A).load_plan((3, 0, 0))


def test_shared_addresses_are_swizzled_on_the_absolute_address():
    m = tensor_map.decode(OP0_A)
    linear = 0x8400 + np.arange(16384)
    np.testing.assert_array_equal(m.shared_addresses(0x8400), swizzle.apply(linear, "128B"))
    assert m.shared_addresses(0x8400)[128] == 0x8480 + 0x10
    np.testing.assert_array_equal(_map().shared_addresses(0x80), 0x80 + np.arange(256))
