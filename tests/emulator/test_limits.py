"""Numbers at the limits of conversions and comparisons: NaN, .sat and .ftz."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.snippets import by_lane


@pytest.mark.parametrize("target", ["s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_nan_as_an_integer(source, target):
    bits, width = int(target[1:]), int(source[1:])
    nan = np.array([np.nan], f"f{width // 8}").view(f"u{width // 8}")
    register = np.dtype(f"u{max(bits, 16) // 8}")
    (got,) = by_lane(f"cvt.rzi.{target}.{source} d0, x0;", [nan], [register])
    wanted = 1 << bits - 1 if source == "f64" or bits == 64 else 0
    assert int(got[0]) & (1 << bits) - 1 == wanted


@pytest.mark.parametrize("target", ["f16", "f32", "f64"])
def test_integers_clamped_to_0_and_1(target):
    size = int(target[1:]) // 8
    x = np.array([-5, -1, 0, 1, 2, 5], np.int32).view(np.uint32)
    (got,) = by_lane(f"cvt.rn.sat.{target}.s32 d0, x0;", [x], [np.dtype(f"u{size}")])
    assert got.view(f"f{size}").tolist() == [0, 0, 0, 1, 1, 1]


def test_flushed_comparisons_of_f16_and_of_what_selects():
    x = np.array([0x0001, 0x83FF, 0x0400, 0x8400], np.uint16)
    code = "setp.gt.ftz.f16 d0, x0, 0; setp.lt.ftz.f16 d1, x0, 0;"
    above, below = by_lane(code, [x], [bool] * 2)
    assert above.tolist() == [False, False, True, False]
    assert below.tolist() == [False, False, False, True]
    c = np.array([0x80000001, 0x80800000, 1], np.uint32)
    (got,) = by_lane("slct.ftz.b32.f32 d0, 1, 2, x0;", [c], [np.uint32])
    assert got.tolist() == [1, 2, 1]
