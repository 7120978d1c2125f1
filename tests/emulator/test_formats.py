"""Conversions against torch, tables and exact rational arithmetic, over whole formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.emulator import formats
from tests.emulator.errors import UnsupportedError

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ALL_16 = np.arange(1 << 16, dtype=np.uint32)
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _f32(bits):
    return np.asarray(bits, dtype=np.uint32).view(np.float32)


def _inputs(values):
    """All bf16 values, and the midpoints of `values` with their f32 neighbours, of both signs."""
    finite = np.sort(np.unique(values[np.isfinite(values)])).astype(np.float64)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(middles, np.float32(s)) for s in (-np.inf, np.inf)])
    return np.concatenate([_f32(ALL_16 << 16), middles, near, -middles, -near])


@pytest.mark.parametrize("kind", TORCH)
def test_fp8_encoding_equals_torch_with_saturation(kind):
    values = formats.to_f32(np.arange(256), kind)
    x = _inputs(values)
    limit = float(np.nanmax(values[np.isfinite(values)]))
    expected = torch.from_numpy(x).clamp(-limit, limit).to(TORCH[kind]).view(torch.uint8).numpy()
    expected = np.where(np.isnan(x), 0x7F, expected)
    np.testing.assert_array_equal(formats.from_f32(x, kind), expected)


@pytest.mark.parametrize("kind", TORCH)
def test_fp8_decoding_equals_torch(kind):
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(TORCH[kind]).float().numpy()
    actual = formats.to_f32(codes, kind)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual)[:0x7D], np.signbit(expected)[:0x7D])
    assert np.signbit(actual[0x80])


def test_e2m1_encoding_is_the_nearest_with_ties_to_even_codes():
    x = _inputs(np.array(E2M1 + [-v for v in E2M1[1:]]))
    magnitude = np.where(np.isnan(x), 0, np.minimum(np.abs(x), 100)).astype(np.float64)
    distance = np.abs(magnitude[:, None] - np.array(E2M1)[None, :])
    tied = distance == distance.min(axis=1, keepdims=True)
    even = tied & (np.arange(8) % 2 == 0)
    expected = np.where(even.any(axis=1), even.argmax(axis=1), tied.argmax(axis=1))
    expected = np.where(np.isnan(x), 7, expected | np.signbit(x) * 8)
    np.testing.assert_array_equal(formats.f32_to_e2m1(x), expected)


def test_e2m1_special_values():
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, np.inf, -np.inf, np.nan, -0.0, -1e-40])
    expected = [0, 2, 2, 4, 4, 6, 6, 7, 7, 15, 7, 8, 8]
    assert formats.f32_to_e2m1(x.astype(np.float32)).tolist() == expected
    assert formats.e2m1_to_f32(np.arange(16)).tolist() == E2M1 + [-v for v in E2M1]
    assert formats.from_f32(np.float32([-3, 3]), "e2m1", relu=True).tolist() == [0, 5]


@pytest.mark.parametrize(("kind", "largest"), [("e2m3", 7.5), ("e3m2", 28.0)])
def test_fp6_round_trips_and_saturates(kind, largest):
    codes = np.arange(64, dtype=np.uint8)
    values = formats.to_f32(codes, kind)
    np.testing.assert_array_equal(formats.from_f32(values, kind), codes)
    assert values.max() == largest
    assert formats.from_f32(np.float32([1e9, -1e9, np.nan]), kind).tolist() == [31, 63, 31]


@pytest.mark.parametrize(
    ("encode", "dtype"),
    [(formats.f32_to_bf16, torch.bfloat16), (formats.f32_to_f16, torch.float16)],
)
def test_16_bit_encoding_equals_torch(encode, dtype):
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = np.unique(np.concatenate([_f32(ALL_16 << 16 | v) for v in low]).view(np.uint32))
    every_f16 = ALL_16.astype(np.uint16).view(np.float16).astype(np.float32)
    x = np.concatenate([_f32(x), _inputs(every_f16)])
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    expected = np.where(np.isnan(x), 0x7FFF, expected)
    np.testing.assert_array_equal(encode(x), expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_decoding_equals_torch(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    raw = ALL_16.astype(np.uint16)
    expected = torch.from_numpy(raw.view(np.int16)).view(dtype).float().numpy()
    actual = formats.to_f32(raw, kind)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(actual.view(np.uint32)[finite], expected.view(np.uint32)[finite])
    assert np.isnan(actual[~finite]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_16_bit_directed_rounding_brackets(kind, mode):
    encode = {"f16": formats.f32_to_f16, "bf16": formats.f32_to_bf16}[kind]
    values = formats.to_f32(ALL_16.astype(np.uint16), kind)
    ordered = np.unique(values[~np.isnan(values)])
    rng = np.random.default_rng(1)
    x = _f32(rng.integers(0, 1 << 32, 50_000, dtype=np.uint32))
    x = np.concatenate([x[~np.isnan(x)], ordered, _inputs(ordered[::37])])
    x = x[~np.isnan(x)]
    down = ordered[np.searchsorted(ordered, x, side="right") - 1]
    up = ordered[np.searchsorted(ordered, x, side="left")]
    expected = {"rm": down, "rp": up, "rz": np.where(x < 0, up, down)}[mode]
    actual = formats.to_f32(encode(x, mode), kind)
    np.testing.assert_array_equal(actual, expected)
    inexact = actual == 0
    np.testing.assert_array_equal(np.signbit(actual)[inexact], np.signbit(x)[inexact])


def test_16_bit_modifiers():
    x = np.float32([70000, np.inf, -np.inf, np.nan, -2, -0.0])
    assert formats.f32_to_f16(x).tolist() == [0x7C00, 0x7C00, 0xFC00, 0x7FFF, 0xC000, 0x8000]
    saturated = formats.f32_to_f16(x, satfinite=True)
    assert saturated.tolist() == [0x7BFF, 0x7BFF, 0xFBFF, 0x7FFF, 0xC000, 0x8000]
    relu = formats.f32_to_bf16(x, relu=True)
    assert relu.tolist() == [0x4789, 0x7F80, 0, 0x7FFF, 0, 0]
    largest = _f32([0x7F7FFFFF])
    assert formats.f32_to_bf16(largest).tolist() == [0x7F80]
    assert formats.f32_to_bf16(largest, satfinite=True).tolist() == [0x7F7F]
    assert formats.f32_to_bf16(largest, "rz").tolist() == [0x7F7F]


def test_tf32_rounding():
    x = _f32([0x3F801000, 0x3F803000, 0x3F800FFF, 0x7F800000, 0x7FC00000])
    rna = formats.f32_to_tf32(x).view(np.uint32).tolist()
    rn = formats.f32_to_tf32(x, "rn").view(np.uint32).tolist()
    assert rna == [0x3F802000, 0x3F804000, 0x3F800000, 0x7F800000, 0x7FFFFFFF]
    assert rn == [0x3F800000, 0x3F804000, 0x3F800000, 0x7F800000, 0x7FFFFFFF]


def test_ue8m0():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(formats.ue8m0_to_f32(codes), expected)
    powers = [2.0**e for e in range(-127, 128)]
    x = np.concatenate([_f32(np.arange(0, 0x7F80) << 16), _f32(np.arange(0, 0x7F80) << 16 | 1)])
    at_least = np.minimum(np.searchsorted(powers, x.astype(np.float64), side="left"), 254)
    at_most = np.maximum(np.searchsorted(powers, x.astype(np.float64), side="right") - 1, 0)
    np.testing.assert_array_equal(formats.f32_to_ue8m0(x), at_least)
    np.testing.assert_array_equal(formats.f32_to_ue8m0(-x, "rz"), at_most)
    special = np.float32([np.inf, np.nan])
    assert formats.f32_to_ue8m0(special).tolist() == [0xFE, 0xFF]
    assert formats.f32_to_ue8m0(special, satfinite=False).tolist() == [0xFF, 0xFF]


def test_ue4m3_ignores_the_sign_and_flags_it():
    codes = np.arange(256, dtype=np.uint8)
    values = formats.ue4m3_to_f32(codes)
    np.testing.assert_array_equal(values[:128], formats.e4m3_to_f32(codes[:128]))
    np.testing.assert_array_equal(values[:128], values[128:])
    assert np.flatnonzero(formats.ue4m3_suspect(codes)).tolist() == list(range(0x7F, 256))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_float_to_int_saturates_and_rounds(bits, signed):
    edges = [2.0**p + d for p in (0, 7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, -0.5, 0, 0.5, 1)]
    x = np.float32([*edges, 0.5, 1.5, 2.5, 0.49999997, 1e30, np.inf, 0.0])
    x = np.unique(np.concatenate([x, -x]))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, function in rounding.items():
        exact = [
            function(float(v)) if np.isfinite(v) else (10**30 if v > 0 else -(10**30)) for v in x
        ]
        expected = [min(max(v, low), high) % 2**bits for v in exact]
        assert formats.float_to_int(x, mode, bits, signed=signed).tolist() == expected, mode
    nan = 2**63 if bits == 64 else 0
    assert formats.float_to_int(np.float32([np.nan]), "rzi", bits, signed=signed)[0] == nan
    double = formats.float_to_int(np.float64([np.nan]), "rzi", bits, signed=signed)[0]
    assert double == 2 ** (bits - 1)


def test_float_to_int_flushes():
    tiny = _f32([1])
    assert formats.float_to_int(tiny, "rpi", 32, signed=True).tolist() == [1]
    assert formats.float_to_int(tiny, "rpi", 32, signed=True, ftz=True).tolist() == [0]
    with pytest.raises(UnsupportedError, match="rounding mode rx"):
        formats.float_to_int(tiny, "rx", 32, signed=True)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
def test_int_to_f32(dtype):
    info = np.iinfo(dtype)
    near = [v + d for v in (1 << 24, 1 << 25, 1 << 31, 1 << 62, 1 << 63) for d in range(-3, 4)]
    near += [(1 << 62) + (1 << 38) + d for d in (-1, 0, 1)] + [info.min, info.max, 0, -5]
    x = np.array([v for v in near if info.min <= v <= info.max], dtype=dtype)
    y = formats.int_to_f32(x)
    for exact, value in zip(x.tolist(), y.tolist(), strict=True):
        around = [int(np.nextafter(np.float32(value), np.float32(s))) for s in (-2e38, 2e38)]
        best = min([abs(n - exact) for n in around])
        assert abs(int(value) - exact) <= best
    down, up = (formats.int_to_f32(x, mode) for mode in ("rm", "rp"))
    for exact, lo, hi in zip(x.tolist(), down.tolist(), up.tolist(), strict=True):
        assert int(lo) <= exact <= int(hi)
        assert lo == hi == exact or np.nextafter(np.float32(lo), np.float32(2e38)) == hi


def test_stochastic_rounding_uses_the_probed_bits():
    """1.25 is half way from 1 to 1.5: only the most significant of an element's bits moves it."""
    half_way = [np.full(32, 1.25, dtype=np.float32)] * 4
    codes = formats.stochastic_x4(half_way, np.uint32(1) << np.arange(32, dtype=np.uint32), "e2m1")
    moved = [np.flatnonzero(c == 3).tolist() for c in codes]
    assert moved == [[8], [31], [0], [23]]
    codes = formats.stochastic_x4(
        [np.full(32, 1.0625, dtype=np.float32)] * 4,
        np.uint32(1) << np.arange(32, dtype=np.uint32),
        "e4m3",
    )
    assert [np.flatnonzero(c == 0x39).tolist() for c in codes] == [[16], [31], [0], [15]]


def test_stochastic_rounding_is_unbiased_and_keeps_representable_values():
    rng = np.random.default_rng(2)
    rbits = rng.integers(0, 1 << 32, 40_000, dtype=np.uint32)
    for value in (0.1, -0.3, 0.7, 1.1, 2.25, -4.9):
        codes = formats.stochastic_x4([np.full(rbits.shape, value, np.float32)] * 4, rbits, "e2m1")
        for c in codes:
            assert abs(formats.e2m1_to_f32(c).mean() - value) < 0.025, value
    exact = np.float32(E2M1 + [-v for v in E2M1])
    codes = formats.stochastic_x4([exact] * 4, np.full(16, 0xFFFFFFFF, dtype=np.uint32), "e2m1")
    assert [c.tolist() for c in codes] == [list(range(16))] * 4
    large = np.float32([100, -np.inf, np.nan, 5.999])
    codes = formats.stochastic_x4([large] * 4, np.zeros(4, dtype=np.uint32), "e2m1")
    assert [c.tolist() for c in codes] == [[7, 15, 7, 6]] * 4


def test_stochastic_16_bit():
    x = np.float32([1.0, 1.00390625, np.inf, np.nan, 3.4e38])
    low = formats.stochastic_bf16(x, np.uint32(0x7FFF))
    high = formats.stochastic_bf16(x, np.uint32(0x8000))
    assert low.tolist()[:4] == [0x3F80, 0x3F80, 0x7F80, 0x7FFF]
    assert high.tolist()[:4] == [0x3F80, 0x3F81, 0x7F80, 0x7FFF]
    top = np.uint32(0xFFFF)
    assert formats.stochastic_bf16(x, top).tolist()[4] == 0x7F80
    assert formats.stochastic_bf16(x, top, satfinite=True).tolist()[4] == 0x7F7F
    with pytest.raises(UnsupportedError, match="f16x2"):
        formats.stochastic_f16(x, top)


def test_flush_keeps_the_sign():
    x = _f32([1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F800000])
    assert formats.flush(x).view(np.uint32).tolist() == [0, 1 << 31, 0, 0x00800000, 0x7F800000]
