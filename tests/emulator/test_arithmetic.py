"""Arithmetic against exact rational numbers, the C library's fmaf and mpmath."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from tests.emulator import arithmetic, formats
from tests.emulator.errors import UnsupportedError

MODES = ("rn", "rz", "rm", "rp")
# Precision, exponent of the smallest subnormal, largest finite value.
F32 = (24, -149, Fraction(2) ** 128 - Fraction(2) ** 104)
F16 = (11, -24, Fraction(65504))
BF16 = (8, -133, Fraction(2) ** 128 - Fraction(2) ** 120)


def _round(value, form, mode):
    """`value` rounded to a format (precision, lowest exponent, largest), as a Python float."""
    precision, lowest, largest = form
    magnitude, negative = abs(value), value < 0
    if magnitude == 0:
        return 0.0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - precision + 1, lowest)
    whole, rest = divmod(magnitude, unit)
    rest /= unit
    away = {"rz": False, "rm": negative, "rp": not negative}
    if mode == "rn":
        whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    else:
        whole += rest > 0 and away[mode]
    result = whole * unit
    if result > largest:
        result = math.inf if mode == "rn" or away[mode] else float(largest)
    return math.copysign(float(result), -1.0 if negative else 1.0)


def _bits(values):
    return np.asarray(values, dtype=np.float32).view(np.uint32).tolist()


def _adversarial(rng, count):
    """f32 triples near ties, cancellation, overflow and subnormals of a * b + c."""
    bits = rng.integers(0, 1 << 32, (3, count), dtype=np.uint32)
    a, b, c = bits.view(np.float32)
    a, b, c = (np.where(np.isfinite(x), x, np.float32(1.5)) for x in (a, b, c))
    quarter = count // 4
    with np.errstate(all="ignore"):
        # c nearly cancels the product.
        c[:quarter] = -(a[:quarter] * b[:quarter]) * (
            1 + rng.integers(-2, 3, quarter) * np.float32(2**-23)
        )
        # Tiny results.
        a[quarter : 2 * quarter] = np.ldexp(rng.standard_normal(quarter), -75)
        b[quarter : 2 * quarter] = np.ldexp(rng.standard_normal(quarter), -72)
        c[quarter : 2 * quarter] = np.ldexp(rng.standard_normal(quarter), -148)
        # Ties: c of few bits, far below or above a product of few bits.
        few = slice(2 * quarter, 3 * quarter)
        a[few], b[few] = rng.integers(1, 1 << 13, (2, quarter))
        c[few] = np.ldexp(rng.integers(-3, 4, quarter), rng.integers(-40, 50, quarter))
    return tuple(np.where(np.isfinite(x), x, np.float32(0.75)) for x in (a, b, c))


@pytest.mark.parametrize("mode", MODES)
def test_fma_equals_exact_rationals(mode):
    a, b, c = _adversarial(np.random.default_rng(3), 3000)
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    nonzero = np.array([v != 0 for v in exact])
    expected = np.array(_bits([_round(v, F32, mode) for v in exact]))
    actual = np.array(_bits(arithmetic.fma_f32(a, b, c, mode)))
    assert nonzero.sum() > 2500
    np.testing.assert_array_equal(actual[nonzero], expected[nonzero])
    assert (np.abs(arithmetic.fma_f32(a, b, c, mode)[~nonzero]) == 0).all()


def test_fma_equals_libm():
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype = ctypes.c_float
    library.fmaf.argtypes = [ctypes.c_float] * 3
    rng = np.random.default_rng(4)
    a, b, c = _adversarial(rng, 20_000)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, 1.0, 3e38, 1e-45, -2.5])
    grid = np.stack(np.meshgrid(special, special, special, indexing="ij")).reshape(3, -1)
    a, b, c = (np.concatenate([x, g]) for x, g in zip((a, b, c), grid, strict=True))
    expected = np.float32(
        [library.fmaf(*v) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    )
    expected = formats.canonical_f32(expected)
    assert _bits(arithmetic.fma_f32(a, b, c)) == _bits(expected)


@pytest.mark.parametrize("mode", MODES)
def test_add_mul_div_sqrt_equal_exact_rationals(mode):
    a, b, _ = _adversarial(np.random.default_rng(5), 1200)
    a, b = (np.where(x == 0, np.float32(1), x) for x in (a, b))
    x, y = ([Fraction(float(v)) for v in w] for w in (a, b))
    total = [p + q for p, q in zip(x, y, strict=True)]
    cases = {
        "add": (arithmetic.add_f32(a, b, mode), total),
        "mul": (arithmetic.mul_f32(a, b, mode), [p * q for p, q in zip(x, y, strict=True)]),
        "div": (arithmetic.div_f32(a, b, mode), [p / q for p, q in zip(x, y, strict=True)]),
        "rcp": (arithmetic.rcp_f32(a, mode), [1 / p for p in x]),
    }
    for name, (actual, exact) in cases.items():
        assert _bits(actual) == _bits([_round(v, F32, mode) for v in exact]), name
    square = np.abs(a)
    root = arithmetic.sqrt_f32(square, mode).astype(np.float64).tolist()
    for value, r in zip(square.tolist(), root, strict=True):
        _check_root(Fraction(value), Fraction(r), mode)
    assert arithmetic.sqrt_f32(np.float32([9, 2.25]), mode).tolist() == [3, 1.5]


def _check_root(value, root, mode):
    """`root` is sqrt(value) rounded: compare squares, which are exact."""
    below, above = (Fraction(float(np.nextafter(np.float32(root), np.float32(s)))) for s in (0, 2))
    if root >= 2:
        above = Fraction(float(np.nextafter(np.float32(root), np.float32(np.inf))))
    if mode == "rn":
        assert ((below + root) / 2) ** 2 <= value <= ((above + root) / 2) ** 2
    elif mode == "rp":
        assert below**2 < value <= root**2
    else:
        assert root**2 <= value < above**2


def test_directed_double_rounding_of_tiny_addends():
    """An addend far below the last place still moves the directed modes, and a tie."""
    one = np.float32([1, 1, 1 + 2**-23, -1])
    tiny = np.float32([1e-40, -1e-40, 1e-40, 1e-40])
    for mode in MODES:
        exact = [Fraction(float(p)) + Fraction(float(q)) for p, q in zip(one, tiny, strict=True)]
        assert _bits(arithmetic.add_f32(one, tiny, mode)) == _bits(
            [_round(v, F32, mode) for v in exact]
        )
    tie = arithmetic.fma_f32(
        np.float32([1 + 2**-12]), np.float32([1 + 2**-12]), np.float32([1e-40])
    )
    assert float(tie[0]) == 1 + 2**-11 + 2**-23


def test_signed_zero_nan_sat_and_ftz():
    x = np.float32([5, 0, -0.0])
    y = np.float32([-5, -0.0, -0.0])
    assert _bits(arithmetic.add_f32(x, y)) == [0, 0, 1 << 31]
    assert _bits(arithmetic.add_f32(x, y, "rm")) == [1 << 31] * 3
    nan = arithmetic.mul_f32(np.float32([np.inf, np.nan]), np.float32([0, 1]))
    assert _bits(nan) == [0x7FFFFFFF] * 2
    sat = arithmetic.fma_f32(
        np.float32([2, -2, np.nan, 0.25]),
        np.float32([1, 1, 1, 1]),
        np.float32([0, 0, 0, 0.25]),
        sat=True,
    )
    assert _bits(sat) == _bits([1, 0, 0, 0.5])
    tiny = np.float32([1e-39, -1e-39])
    assert _bits(arithmetic.add_f32(tiny, np.float32([0, 0]), ftz=True)) == [0, 0]
    assert _bits(arithmetic.mul_f32(tiny, np.float32([1, 1]), ftz=True)) == [0, 1 << 31]
    small = np.float32([2e-38, -2e-38])
    assert _bits(arithmetic.mul_f32(small, np.float32([0.25, 0.25]), ftz=True)) == [0, 1 << 31]


def test_minmax():
    nan = np.float32(np.nan)
    a = np.float32([1, -0.0, 0.0, nan, 2, nan])
    b = np.float32([2, 0.0, -0.0, 3, nan, nan])
    low = arithmetic.minmax_f32("min", a, b)
    high = arithmetic.minmax_f32("max", a, b)
    assert _bits(low) == [*_bits([1, -0.0, -0.0, 3, 2]), 0x7FFFFFFF]
    assert _bits(high) == [*_bits([2, 0.0, 0.0, 3, 2]), 0x7FFFFFFF]
    assert _bits(arithmetic.minmax_f32("max", a, b, nan=True))[3:] == [0x7FFFFFFF] * 3


@pytest.mark.parametrize(("kind", "form"), [("f16", F16), ("bf16", BF16)])
def test_16_bit_arithmetic_equals_exact_rationals(kind, form):
    rng = np.random.default_rng(6)
    raw = rng.integers(0, 1 << 16, (3, 3000), dtype=np.uint16)
    near = formats.f32_to_f16 if kind == "f16" else formats.f32_to_bf16
    with np.errstate(all="ignore"):
        product = formats.to_f32(raw[0, :800], kind) * formats.to_f32(raw[1, :800], kind)
    raw[2, :800] = near(-product) ^ rng.integers(0, 2, 800, dtype=np.uint16)
    value = formats.to_f32(raw, kind)
    # Finite operands only, and operands of few bits: these make ties with tiny addends.
    raw = np.where(np.isfinite(value), raw, np.uint16(0x3C00))
    raw[:2, 2000:] &= np.uint16(0xFFF0)
    exact = [[Fraction(float(v)) for v in row] for row in formats.to_f32(raw, kind)]
    results = {
        "add": [p + q for p, q in zip(*exact[:2], strict=True)],
        "sub": [p - q for p, q in zip(*exact[:2], strict=True)],
        "mul": [p * q for p, q in zip(*exact[:2], strict=True)],
        "fma": [p * q + r for p, q, r in zip(*exact, strict=True)],
    }
    for op, values in results.items():
        operands = tuple(raw) if op == "fma" else tuple(raw[:2])
        actual = formats.to_f32(arithmetic.arithmetic_16(op, kind, operands), kind)
        expected = np.array([_round(v, form, "rn") for v in values])
        np.testing.assert_array_equal(actual, expected, err_msg=op)


def test_packed_halves_are_independent():
    word = np.uint32([0x3C004000, 0x7E003C00])
    total = arithmetic.packed("add", "f16", word, word)
    assert total.tolist() == [0x40004400, 0x7FFF4000]
    largest = arithmetic.packed("max", "f16", word, np.uint32([0x40003C00, 0x3C003C00]))
    assert largest.tolist() == [0x40004000, 0x3C003C00]
    fused = arithmetic.packed(
        "fma", "bf16", *(np.uint32([v]) for v in (0x40403F80, 0x40003F80, 0x3F80BF80))
    )
    assert fused.tolist() == [0x40E00000]
    relu = arithmetic.packed("sub", "f16", word[:1], np.uint32([0x40004200]), relu=True)
    assert relu.tolist() == [0]
    subnormal = np.uint32([0x00010001])
    assert arithmetic.packed("add", "f16", subnormal, subnormal).tolist() == [0x00020002]
    assert arithmetic.packed("add", "f16", subnormal, subnormal, ftz=True).tolist() == [0]
    with pytest.raises(UnsupportedError, match="ftz"):
        arithmetic.packed("add", "bf16", subnormal, subnormal, ftz=True)


@pytest.mark.parametrize("op", ["ex2", "lg2", "rsqrt", "sqrt", "rcp"])
def test_approximations_are_correctly_rounded(op):
    rng = np.random.default_rng(7)
    x = np.ldexp(rng.uniform(1, 2, 300), rng.integers(-120, 120, 300)).astype(np.float32)
    if op == "ex2":
        x = rng.uniform(-148, 127.9, 300).astype(np.float32)
    functions = {
        "ex2": lambda v: mpmath.power(2, v),
        "lg2": lambda v: mpmath.log(v, 2),
        "rsqrt": lambda v: 1 / mpmath.sqrt(v),
        "sqrt": mpmath.sqrt,
        "rcp": lambda v: 1 / v,
    }
    with mpmath.workprec(200):
        exact = [functions[op](mpmath.mpf(float(v))) for v in x]
        fractions = [Fraction(*map(int, mpmath.libmp.to_rational(v._mpf_))) for v in exact]
    assert _bits(arithmetic.approximate(op, x)) == _bits([_round(v, F32, "rn") for v in fractions])


def test_approximation_special_values():
    x = np.float32([0, -0.0, np.inf, -np.inf, np.nan, -1])
    inf, nan = np.inf, np.nan
    expected = {
        "ex2": [1, 1, inf, 0, nan, 0.5],
        "lg2": [-inf, -inf, inf, nan, nan, nan],
        "rsqrt": [inf, -inf, 0, nan, nan, nan],
        "sqrt": [0, -0.0, inf, nan, nan, nan],
        "rcp": [inf, -inf, 0, -0.0, nan, -1],
    }
    for op, values in expected.items():
        want = formats.canonical_f32(np.float32(values))
        assert _bits(arithmetic.approximate(op, x)) == _bits(want), op
    tiny = np.float32([1e-40])
    assert arithmetic.approximate("rcp", tiny, ftz=True).tolist() == [np.inf]
    assert arithmetic.approximate("lg2", tiny, ftz=True).tolist() == [-np.inf]
    assert _bits(arithmetic.approximate("ex2", np.float32([-130]), ftz=True)) == [0]
