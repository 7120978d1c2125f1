"""Shared-memory swizzles: bits 4.. of an address are XORed with its bits 7..

CUTLASS `Swizzle<B, 4, 3>` (include/cute/swizzle.hpp) with B = 1, 2, 3 for 32-, 64- and 128-byte
swizzle, applied to the absolute shared-memory byte address by TMA, tcgen05.mma and tcgen05.cp
alike. Only 16-byte atoms are modelled; other atoms are refused where they are decoded.
"""

from __future__ import annotations

import numpy as np

from tests.emulator.errors import UnsupportedError

# Swizzle name -> B, the number of address bits that move.
BITS = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
# Swizzle name -> bytes of one row of the swizzle atom (the span of the inner box dimension).
SPAN = {"none": 16, "32B": 32, "64B": 64, "128B": 128}


def apply(address: np.ndarray | int, swizzle: str) -> np.ndarray | int:
    """Physical byte address of the linear byte address (int or integer array of any shape).

    Its own inverse: the source bits (7..) are not among the bits it changes (4..6).
    """
    try:
        bits = BITS[swizzle]
    except KeyError:
        raise UnsupportedError(f"swizzle {swizzle!r}: only {', '.join(BITS)} exist here") from None
    if bits == 0:
        return address
    return address ^ (((address >> 7) & ((1 << bits) - 1)) << 4)
