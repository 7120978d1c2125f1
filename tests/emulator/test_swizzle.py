"""Swizzles against CUTLASS `Swizzle<B, 4, 3>` (include/cute/swizzle.hpp), bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import swizzle
from tests.emulator.errors import UnsupportedError


def _cutlass(address, bits, base=4, shift=3):
    """Swizzle::apply: the `bits` bits at base + shift, moved down by shift, XORed in."""
    moved = ((1 << bits) - 1) << (base + max(0, shift))
    return address ^ ((address & moved) >> shift)


@pytest.mark.parametrize(("mode", "bits"), [("none", 0), ("32B", 1), ("64B", 2), ("128B", 3)])
def test_equals_cutlass_and_permutes_16_byte_chunks(mode, bits):
    address = np.arange(4096)
    expected = np.array([_cutlass(int(a), bits) for a in address])
    actual = swizzle.apply(address, mode)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.sort(actual), address)
    np.testing.assert_array_equal(swizzle.apply(actual, mode), address)
    np.testing.assert_array_equal(actual % 16, address % 16)
    # The pattern repeats after 8 rows of the swizzle's span.
    period = 8 * swizzle.SPAN[mode] if bits else 16
    np.testing.assert_array_equal(swizzle.apply(address + 8 * period, mode), actual + 8 * period)


def test_64_byte_swizzle_as_an_nvidia_epilogue_writes_it():
    """op0's epilogue computes `addr ^ ((addr >> 3) & 48)` for its 64B-swizzled store tile."""
    address = np.arange(0, 8192, 4)
    np.testing.assert_array_equal(swizzle.apply(address, "64B"), address ^ ((address >> 3) & 48))


def test_uses_the_absolute_address():
    assert swizzle.apply(0x480, "128B") == 0x490
    assert swizzle.apply(0x400, "128B") == 0x400


def test_refuses_other_atoms():
    with pytest.raises(UnsupportedError, match="128B_32B"):
        swizzle.apply(0, "128B_32B")
