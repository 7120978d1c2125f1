"""Floating-point instructions against exact fractions that are rounded here, lane by lane."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest

from tests.emulator.snippets import by_lane

COUNT = 256
# name -> digits of the significand, smallest exponent of a normal number, largest exponent
FORMATS = {
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
}
BITS = {"f32": 32, "f64": 64, "f16": 16, "bf16": 16}
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}


def number(raw, kind):
    """A pattern as a Python float, which holds every one of these formats."""
    if kind == "bf16":
        raw, kind = raw << 16, "f32"
    code, size = {"f32": ("<f", 4), "f64": ("<d", 8), "f16": ("<e", 2)}[kind]
    return struct.unpack(code, raw.to_bytes(size, "little"))[0]


def _power(exponent):
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def rounded(exact, kind, mode="rn", zero=0.0, *, ftz=False):
    """The pattern of a fraction in a format; a zero has the sign of `zero`."""
    digits, low, high = FORMATS[kind]
    bits = BITS[kind]
    if exact == 0:
        return (math.copysign(1, zero) < 0) << bits - 1
    sign, size = exact < 0, abs(exact)
    exponent = max(low, size.numerator.bit_length() - size.denominator.bit_length() - 1)
    if size >= _power(exponent + 1):
        exponent += 1
    units = size * _power(digits - 1 - exponent)
    whole = units.numerator // units.denominator
    rest = units - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": rest > 0 and sign,
        "rp": rest > 0 and not sign,
    }[mode]
    whole += up
    if whole == 1 << digits:
        whole, exponent = whole >> 1, exponent + 1
    fraction = digits - 1
    normal = whole >> fraction
    if exponent > high:
        infinite = mode == "rn" or (mode == "rp" and not sign) or (mode == "rm" and sign)
        code = (high - low + 2 << fraction) - (0 if infinite else 1)
    else:
        code = (exponent - low + normal << fraction) + (whole & (1 << fraction) - 1)
    if ftz and code < 1 << fraction:
        code = 0
    return sign << bits - 1 | code


_EDGES_32 = (
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
    0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x4B800000,
)  # fmt: skip


def patterns(generator, kind):
    """Operands: limits, numbers near 1, any pattern."""
    bits = BITS[kind]
    shift = {
        "f64": lambda v: struct.unpack("<Q", struct.pack("<d", number(v, "f32")))[0],
        "f16": lambda v: v >> 16,
        "bf16": lambda v: v >> 16,
        "f32": lambda v: v,
    }[kind]
    one = rounded(Fraction(1), kind)
    spread = 1 << FORMATS[kind][0] + 2
    choose = (
        lambda: shift(generator.choice(_EDGES_32)),
        lambda: generator.getrandbits(bits),
        lambda: (one + generator.randrange(-spread, spread)) % (1 << bits),
        lambda: generator.getrandbits(1) << bits - 1 | one + generator.randrange(spread),
    )
    return [generator.choice(choose)() for _ in range(COUNT)]


def check(code, model, kinds, result, **options):
    """Compare lanes with the model, which takes patterns and gives one, or None for any NaN."""
    generator = random.Random(code)
    operands = [patterns(generator, kind) for kind in kinds]
    arrays = [np.array(v, DTYPES[BITS[k]]) for v, k in zip(operands, kinds, strict=True)]
    dtype = bool if result == "pred" else DTYPES[BITS.get(result) or int(result[1:])]
    (got,) = by_lane(code, arrays, [dtype], **options)
    for values, found in zip(zip(*operands, strict=True), got.tolist(), strict=True):
        wanted = model(*values)
        shown = f"{code} of {[hex(v) for v in values]}: {found:#x} for {wanted:#x}"
        assert int(found) == wanted, shown


def _flushed(value, ftz):
    small = ftz and value == value and abs(value) < 2.0**-126
    return math.copysign(0.0, value) if small else value


def linear(kind, mode, ftz=False, sat=False):
    """A model of exact arithmetic: of a function of floats and fractions."""

    def apply(function, *raw):
        values = [_flushed(number(v, kind), ftz) for v in raw]
        # Infinities, NaN and signs of zeros are those of float64.
        try:
            special = function(*values)
        except OverflowError:
            special = math.inf
        if any(not math.isfinite(v) for v in values):
            code = _special(special, kind)
        else:
            exact = function(*map(Fraction, values))
            zero = special
            if mode == "rm" and exact == 0 and not _same_sign_zero(function, values):
                zero = -0.0
            code = rounded(exact, kind, mode, zero, ftz=ftz)
        return _saturated(code, kind) if sat else code

    return apply


def _same_sign_zero(function, values):
    """Whether an exact zero comes from zeros of one sign or a product, not from cancelling."""
    return math.copysign(1, function(*values)) < 0 or function is _PRODUCT


def _special(value, kind):
    if value != value:
        return NAN[kind]
    if math.isinf(value):
        digits, low, high = FORMATS[kind]
        return (value < 0) << BITS[kind] - 1 | high - low + 2 << digits - 1
    return rounded(Fraction(value), kind, zero=value)


def _saturated(code, kind):
    value = number(code, kind)
    return 0 if not value > 0 else rounded(Fraction(min(value, 1.0)), kind)


_SUM = lambda a, b: a + b  # noqa: E731
_DIFFERENCE = lambda a, b: a - b  # noqa: E731
_PRODUCT = lambda a, b: a * b  # noqa: E731
_OPERATIONS = {"add": _SUM, "sub": _DIFFERENCE, "mul": _PRODUCT}
MODES = ("rn", "rz", "rm", "rp")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", _OPERATIONS)
def test_f32_arithmetic(name, mode):
    function = _OPERATIONS[name]
    for suffix in ("", ".ftz", ".sat", ".ftz.sat"):
        model = linear("f32", mode, "ftz" in suffix, "sat" in suffix)
        code = f"{name}.{mode}{suffix}.f32 d0, x0, x1;"
        check(code, lambda *v, m=model: m(function, *v), ["f32"] * 2, "f32")
    if mode == "rn":
        model = linear("f32", mode)
        check(f"{name}.f32 d0, x0, x1;", lambda *v: model(function, *v), ["f32"] * 2, "f32")


def _fused(kind, mode, ftz=False):
    """a * b + c; the signs of zeros by hand, for float64 rounds the product."""

    def model(*raw):
        a, b, c = (_flushed(number(v, kind), ftz) for v in raw)
        if not all(map(math.isfinite, (a, b, c))):
            # A product of finite numbers is finite.
            product = 1.0 if math.isfinite(a) and math.isfinite(b) else a * b
            return _special(product + c, kind)
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        negative = (math.copysign(1, a) * math.copysign(1, b) < 0, math.copysign(1, c) < 0)
        zero = -0.0 if all(negative) or (mode == "rm" and any(negative)) else 0.0
        return rounded(exact, kind, mode, zero, ftz=ftz)

    return model


@pytest.mark.parametrize("mode", MODES)
def test_f32_fma(mode):
    for suffix in ("", ".ftz"):
        model = _fused("f32", mode, bool(suffix))
        check(f"fma.{mode}{suffix}.f32 d0, x0, x1, x2;", model, ["f32"] * 3, "f32")
    check(f"mad.{mode}.f32 d0, x0, x1, x2;", _fused("f32", mode), ["f32"] * 3, "f32")


def _divided(mode, ftz=False):
    def model(*raw):
        a, b = (_flushed(number(v, "f32"), ftz) for v in raw)
        sign = math.copysign(1, a) * math.copysign(1, b)
        if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
            return NAN["f32"]
        if math.isinf(a) or b == 0:
            return _special(sign * math.inf, "f32")
        if math.isinf(b) or a == 0:
            return _special(sign * 0.0, "f32")
        return rounded(Fraction(a) / Fraction(b), "f32", mode, ftz=ftz)

    return model


@pytest.mark.parametrize("mode", MODES)
def test_f32_division_and_roots(mode):
    for suffix in ("", ".ftz"):
        model = _divided(mode, bool(suffix))
        check(f"div.{mode}{suffix}.f32 d0, x0, x1;", model, ["f32"] * 2, "f32")
        one = lambda a, m=model: m(0x3F800000, a)  # noqa: E731
        check(f"rcp.{mode}{suffix}.f32 d0, x0;", one, ["f32"], "f32")

    def root(raw):
        a = number(raw, "f32")
        if a != a or a < 0:
            return NAN["f32"]
        if a == 0 or math.isinf(a):
            return raw
        # Two bits more than a float, and whether there is more: as good as the exact root.
        scaled = Fraction(a) * 4**200
        whole = math.isqrt(scaled.numerator // scaled.denominator)
        exact = Fraction(whole) + (Fraction(1, 2) if whole * whole != scaled else 0)
        return rounded(exact / 2**200, "f32", mode)

    check(f"sqrt.{mode}.f32 d0, x0;", root, ["f32"], "f32")


def _least(name, nan, ftz):
    def model(*raw):
        values = [_flushed(number(v, "f32"), ftz) for v in raw]
        there = [v for v in values if v == v]
        if not there or (nan and len(there) < len(values)):
            return NAN["f32"]
        key = lambda v: (v, math.copysign(1, v))  # noqa: E731
        return _special((min if name == "min" else max)(there, key=key), "f32")

    return model


@pytest.mark.parametrize("name", ["min", "max"])
def test_f32_minimum_and_maximum(name):
    for suffix in ("", ".NaN", ".ftz", ".ftz.NaN"):
        model = _least(name, "NaN" in suffix, "ftz" in suffix)
        check(f"{name}{suffix}.f32 d0, x0, x1;", model, ["f32"] * 2, "f32")
        check(f"{name}{suffix}.f32 d0, x0, x1, x2;", model, ["f32"] * 3, "f32")


def test_signs_and_classes():
    top = 1 << 31
    check("neg.f32 d0, x0;", lambda a: a ^ top, ["f32"], "f32")
    check("abs.f32 d0, x0;", lambda a: a & ~top, ["f32"], "f32")
    flush = lambda a: a if a & 0x7F800000 else a & top  # noqa: E731
    check("neg.ftz.f32 d0, x0;", lambda a: flush(a) ^ top, ["f32"], "f32")
    check("copysign.f32 d0, x0, x1;", lambda a, b: b & ~top | a & top, ["f32"] * 2, "f32")
    classes = {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda v: v == v,
        "notanumber": math.isnan,
        "normal": lambda v: math.isfinite(v) and abs(v) >= 2.0**-126,
        "subnormal": lambda v: 0 < abs(v) < 2.0**-126,
    }
    for name, function in classes.items():
        test = lambda a, f=function: f(number(a, "f32"))  # noqa: E731
        check(f"testp.{name}.f32 d0, x0;", test, ["f32"], "pred")
    for bits, kind in ((16, "f16"), (16, "bf16"), (32, "f16x2")):
        signs = 0x8000 if bits == 16 else 0x80008000
        width = "f16" if bits == 16 else "f32"
        check(f"neg.{kind} d0, x0;", lambda a, s=signs: a ^ s, [width], width)
        check(f"abs.{kind} d0, x0;", lambda a, s=signs: a & ~s, [width], width)


_ORDERED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparisons_with_nan(kind):
    for name, relation in _ORDERED.items():
        for suffix, unordered in (("", False), ("u", True)):

            def holds(a, b, r=relation, u=unordered):
                x, y = number(a, kind), number(b, kind)
                return u if x != x or y != y else r(x, y)

            check(f"setp.{name}{suffix}.{kind} d0, x0, x1;", holds, [kind] * 2, "pred")
    nan = lambda a, b: number(a, kind) != number(a, kind) or number(b, kind) != number(b, kind)  # noqa: E731
    check(f"setp.nan.{kind} d0, x0, x1;", nan, [kind] * 2, "pred")
    check(f"setp.num.{kind} d0, x0, x1;", lambda a, b: not nan(a, b), [kind] * 2, "pred")


def test_flushed_comparisons_and_selection():
    def less(a, b):
        return _flushed(number(a, "f32"), True) < _flushed(number(b, "f32"), True)

    check("setp.lt.ftz.f32 d0, x0, x1;", less, ["f32"] * 2, "pred")
    chosen = lambda a, b, c: a if number(c, "f32") >= 0 else b  # noqa: E731
    check("slct.f32.f32 d0, x0, x1, x2;", chosen, ["f32"] * 3, "f32")
    full = lambda a, b: 0xFFFFFFFF * (number(a, "f32") == number(b, "f32"))  # noqa: E731
    check("set.eq.u32.f32 d0, x0, x1;", full, ["f32"] * 2, "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision(kind):
    model = linear(kind, "rn")
    for name, function in _OPERATIONS.items():
        one = lambda *v, f=function: model(f, *v)  # noqa: E731
        check(f"{name}.rn.{kind} d0, x0, x1;", one, [kind] * 2, kind)

        def two(a, b, f=one):
            return f(a & 0xFFFF, b & 0xFFFF) | f(a >> 16, b >> 16) << 16

        check(f"{name}.rn.{kind}x2 d0, x0, x1;", two, ["f32"] * 2, "f32")
    check(f"fma.rn.{kind} d0, x0, x1, x2;", _fused(kind, "rn"), [kind] * 3, kind)

    def relu(*raw):
        code = _fused(kind, "rn")(*raw)
        return 0 if code >> 15 else code

    check(f"fma.rn.relu.{kind} d0, x0, x1, x2;", relu, [kind] * 3, kind)


def test_pairs_of_f32():
    for name, function in _OPERATIONS.items():
        for suffix in ("rn", "rz", "rn.ftz"):
            model = linear("f32", suffix[:2], "ftz" in suffix)

            def pair(a, b, f=function, m=model):
                low = m(f, a & 0xFFFFFFFF, b & 0xFFFFFFFF)
                return low | m(f, a >> 32, b >> 32) << 32

            check(f"{name}.{suffix}.f32x2 d0, x0, x1;", pair, ["f64"] * 2, "f64")


def test_f64():
    for name, function in _OPERATIONS.items():

        def same(a, b, f=function):
            value = f(number(a, "f64"), number(b, "f64"))
            return struct.unpack("<Q", struct.pack("<d", value))[0]

        # A NaN's pattern is not specified for f64: its operands here are finite.
        generator = np.random.default_rng(1)
        a, b = (generator.standard_normal(256) for _ in range(2))
        (got,) = by_lane(
            f"{name}.rn.f64 d0, x0, x1;", [a.view(np.uint64), b.view(np.uint64)], [np.uint64]
        )
        pairs = zip(a.view(np.uint64).tolist(), b.view(np.uint64).tolist(), strict=True)
        assert got.tolist() == [same(x, y) for x, y in pairs]
    (got,) = by_lane("div.rn.f64 d0, x0, x1;", [a.view(np.uint64), b.view(np.uint64)], [np.uint64])
    assert (got.view(np.float64) == a / b).all()


@pytest.mark.parametrize(
    ("code", "function", "low", "high"),
    [
        ("ex2.approx.ftz.f32", lambda v: 2.0**v, -30, 30),
        ("lg2.approx.f32", math.log2, 0.01, 1e6),
        ("rsqrt.approx.f32", lambda v: v**-0.5, 1e-6, 1e6),
        ("sqrt.approx.f32", math.sqrt, 1e-6, 1e6),
        ("rcp.approx.ftz.f32", lambda v: 1 / v, 1e-6, 1e6),
        ("sin.approx.f32", math.sin, -3, 3),
        ("cos.approx.f32", math.cos, -3, 3),
        ("tanh.approx.f32", math.tanh, -3, 3),
        ("div.approx.f32", None, 1e-3, 1e3),
        ("div.full.f32", None, 1e-3, 1e3),
    ],
)
def test_approximations_are_within_an_ulp_or_two(code, function, low, high):
    """Hardware only approaches these; the emulator gives the nearest number."""
    generator = np.random.default_rng(2)
    x = generator.uniform(low, high, 256).astype(np.float32)
    y = generator.uniform(low, high, 256).astype(np.float32)
    if function is None:
        (got,) = by_lane(f"{code} d0, x0, x1;", [v.view(np.uint32) for v in (x, y)], [np.uint32])
        wanted = x.astype(np.float64) / y
    else:
        (got,) = by_lane(f"{code} d0, x0;", [x.view(np.uint32)], [np.uint32])
        wanted = np.array([function(float(v)) for v in x])
    assert (
        np.abs(got.view(np.float32) - wanted) <= 2 * np.spacing(np.abs(wanted.astype("f4")))
    ).all()
