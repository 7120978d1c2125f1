"""Number formats of PTX on numpy arrays, bit for bit: decoding, encoding, conversions.

f32 values are float32 arrays, narrower formats raw unsigned bits. Rounding modes are PTX's: rn
(nearest, ties to even), rz, rm, rp. NaN results are canonical: 0x7FFFFFFF, and 0x7FFF for f16 and
bf16 (PTX ISA, floating-point instructions and cvt). Formats of 4 to 8 bits equal NVIDIA's host
code in cuda_fp4.hpp, cuda_fp6.hpp and cuda_fp8.hpp.

Values that float64 cannot hold are rounded to odd in it (Boldo and Melquiond, "Emulation of FMA
and correctly rounded sums", 2008): rounding those to at most 51 bits, in any mode, is the single
rounding of the exact value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.emulator.errors import UnsupportedError

F32_NAN = np.uint32(0x7FFFFFFF)
NAN_16 = np.uint16(0x7FFF)
_SIGN = np.uint32(0x80000000)
quiet = np.errstate(all="ignore")


def canonical_f32(x: np.ndarray) -> np.ndarray:
    """`x` with every NaN replaced by 0x7FFFFFFF."""
    nan = x != x
    if nan.any():
        x = np.array(x, dtype=np.float32)
        x.view(np.uint32)[nan] = F32_NAN
    return x


def flush(x: np.ndarray) -> np.ndarray:
    """`.ftz`: subnormal f32 become zeros of the same sign."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return np.where(bits & np.uint32(0x7F800000), bits, bits & _SIGN).view(np.float32)


# --- narrow formats ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Minifloat:
    """A format of at most 8 bits: the value of every magnitude code, and where rounding turns."""

    sign: int
    largest: int
    nan: int
    values: np.ndarray
    turns: np.ndarray


def _minifloat(exponent: int, mantissa: int, bias: int, largest: int, nan: int) -> Minifloat:
    """Tables of a format; codes above `largest` are infinity (mantissa 0) or NaN."""
    values = np.empty(1 << (exponent + mantissa), dtype=np.float32)
    for code in range(values.size):
        power, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        significand = fraction + (1 << mantissa if power else 0)
        values[code] = np.ldexp(float(significand), max(power, 1) - bias - mantissa)
        if code > largest:
            values[code] = np.nan if fraction else np.inf
    middles = (values[:largest] + values[1 : largest + 1]) / np.float32(2)
    # A tie goes to the even code: it belongs to the upper one only where that is even.
    up = np.nextafter(middles, np.float32(np.inf))
    turns = np.where(np.arange(1, largest + 1) % 2 == 0, middles, up)
    return Minifloat(1 << (exponent + mantissa), largest, nan, values, turns)


MINIFLOATS = {
    "e2m1": _minifloat(2, 1, 1, 0x7, 0x7),
    "e2m3": _minifloat(2, 3, 1, 0x1F, 0x1F),
    "e3m2": _minifloat(3, 2, 3, 0x1F, 0x1F),
    "e4m3": _minifloat(4, 3, 7, 0x7E, 0x7F),
    "e5m2": _minifloat(5, 2, 15, 0x7B, 0x7F),
}


def _from_minifloat(codes: np.ndarray, kind: str) -> np.ndarray:
    form = MINIFLOATS[kind]
    codes = np.asarray(codes).astype(np.intp)
    value = form.values[codes & (form.sign - 1)]
    return canonical_f32(np.where(codes & form.sign, -value, value))


def from_f32(x: np.ndarray, kind: str, *, relu: bool = False) -> np.ndarray:
    """`cvt.rn.satfinite{.relu}.<kind>x2.f32`: uint8 codes of the nearest `kind` value.

    Ties to the even code, larger magnitudes and infinities to the largest, NaN to the format's
    NaN or, without one, to the largest positive value; the sign of zero is kept.
    """
    form = MINIFLOATS[kind]
    x = np.asarray(x, dtype=np.float32)
    codes = np.searchsorted(form.turns, np.abs(x), side="right")
    negative = np.signbit(x)
    codes = np.where(negative, 0 if relu else codes | form.sign, codes)
    return np.where(x != x, form.nan, codes).astype(np.uint8)


def e2m1_to_f32(codes: np.ndarray) -> np.ndarray:
    """Values of 4-bit codes (uint8, high nibble ignored)."""
    return _from_minifloat(codes, "e2m1")


def f32_to_e2m1(x: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite.e2m1x2.f32 of one element: uint8 codes 0 to 15."""
    return from_f32(x, "e2m1")


def e4m3_to_f32(codes: np.ndarray) -> np.ndarray:
    """Values of e4m3 codes (uint8)."""
    return _from_minifloat(codes, "e4m3")


def ue4m3_to_f32(codes: np.ndarray) -> np.ndarray:
    """Values of unsigned e4m3 scale factors: bit 7 is ignored (see `ue4m3_suspect`)."""
    return _from_minifloat(np.asarray(codes) & 0x7F, "e4m3")


def ue4m3_suspect(codes: np.ndarray) -> np.ndarray:
    """True for scale factors that no quantizer writes: the sign bit set, or NaN."""
    return np.asarray(codes) >= 0x7F


def ue8m0_to_f32(codes: np.ndarray) -> np.ndarray:
    """2^(code - 127), NaN for 0xFF (cvt.rn.bf16x2.ue8m0x2)."""
    codes = np.asarray(codes).astype(np.uint32)
    bits = np.where(codes, codes << 23, np.uint32(0x00400000))
    return np.where(codes == 0xFF, F32_NAN, bits).astype(np.uint32).view(np.float32)


def f32_to_ue8m0(x: np.ndarray, mode: str = "rp", *, satfinite: bool = True) -> np.ndarray:
    """cvt.{rz,rp}{.satfinite}.ue8m0x2.f32 of one element; the sign is ignored (cuda_fp8.hpp)."""
    if mode not in ("rz", "rp"):
        raise UnsupportedError(f"cvt.{mode}.ue8m0x2: rz and rp exist")
    bits = np.asarray(x, dtype=np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    codes = bits >> np.uint32(23)
    if mode == "rp":
        codes = codes + ((bits & 0x7FFFFF != 0) & (bits > 0x00400000) & (bits < 0x7F800000))
    if satfinite:
        codes = np.minimum(codes, 0xFE)
    return np.where(bits > 0x7F800000, 0xFF, codes).astype(np.uint8)


def bf16_to_f32(raw: np.ndarray) -> np.ndarray:
    """Values of raw bf16 (uint16), exact; NaN payloads are kept."""
    return (np.asarray(raw).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(raw: np.ndarray) -> np.ndarray:
    """Values of raw f16 (uint16), exact."""
    return np.asarray(raw, dtype=np.uint16).view(np.float16).astype(np.float32)


def f32_to_bf16(
    x: np.ndarray, mode: str = "rn", *, satfinite: bool = False, relu: bool = False
) -> np.ndarray:
    """cvt.<mode>{.satfinite}{.relu}.bf16.f32: raw uint16."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    if mode == "rn":
        raw = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    else:
        raw = upper + (_away(bits, mode) & (bits & np.uint32(0xFFFF) != 0))
    return _finish_16(x, raw.astype(np.uint16), np.uint16(0x7F7F), satfinite, relu)


def f32_to_f16(
    x: np.ndarray, mode: str = "rn", *, satfinite: bool = False, relu: bool = False
) -> np.ndarray:
    """cvt.<mode>{.satfinite}{.relu}.f16.f32: raw uint16; of float64, rounded once, too."""
    x = np.asarray(x)
    raw = narrow(x, np.float16, mode).view(np.uint16)
    return _finish_16(x, raw, np.uint16(0x7BFF), satfinite, relu)


def f32_to_tf32(x: np.ndarray, mode: str = "rna") -> np.ndarray:
    """cvt.{rna,rn,rz}.tf32.f32: float32 with the low 13 bits 0 (rna: ties away from zero)."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    add = {"rna": 0x1000, "rn": 0xFFF + ((bits >> 13) & 1), "rz": 0}[mode]
    bits = np.where(np.isfinite(x), bits + np.asarray(add, dtype=np.uint32), bits)
    return canonical_f32((bits & np.uint32(0xFFFFE000)).view(np.float32))


def _away(bits: np.ndarray, mode: str) -> np.ndarray:
    """Whether truncation is wrong in `mode` for inexact values of these signs."""
    if mode not in ("rz", "rm", "rp"):
        raise UnsupportedError(f"rounding mode {mode}")
    negative = bits >> np.uint32(31) != 0
    return {"rz": np.zeros_like(negative), "rm": negative, "rp": ~negative}[mode]


def _finish_16(
    x: np.ndarray, raw: np.ndarray, largest: np.uint16, satfinite: bool, relu: bool
) -> np.ndarray:
    if satfinite:
        sign = raw & np.uint16(0x8000)
        raw = np.where((raw ^ sign) > largest, sign | largest, raw)
    if relu:
        raw = np.where(raw & np.uint16(0x8000), np.uint16(0), raw)
    return np.where(x != x, NAN_16, raw)


def to_f32(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of raw bits of any format here: every one is exact in f32."""
    decoders = {"f16": f16_to_f32, "bf16": bf16_to_f32}
    decoders |= {"ue8m0": ue8m0_to_f32, "ue4m3": ue4m3_to_f32}
    if kind in MINIFLOATS:
        return _from_minifloat(raw, kind)
    if kind not in decoders:
        raise UnsupportedError(f"number format {kind}")
    return decoders[kind](raw)


# --- rounding exact values ---------------------------------------------------------------------


@quiet
def narrow(exact: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """`exact` (wider, rounded to odd if inexact) rounded to `dtype` in `mode`."""
    y = exact.astype(dtype)
    if mode == "rn":
        return y
    back = y.astype(exact.dtype)
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(exact), np.nextafter(y, dtype(0)), y)
    if mode == "rm":
        return np.where(back > exact, np.nextafter(y, dtype(-np.inf)), y)
    if mode == "rp":
        return np.where(back < exact, np.nextafter(y, dtype(np.inf)), y)
    raise UnsupportedError(f"rounding mode {mode}")


@quiet
def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 a + b rounded to odd: TwoSum, then the odd one of the two neighbours."""
    total = np.asarray(a + b)
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    even = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    if not even.any():
        return total
    step = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + even * step).view(np.float64)


def odd_f32(exact: np.ndarray) -> np.ndarray:
    """float64 (rounded to odd if inexact) to f32 rounded to odd."""
    y = narrow(exact, np.float32, "rz")
    return (y.view(np.uint32) | (y.astype(np.float64) != exact)).view(np.float32)


# --- integers -----------------------------------------------------------------------------------

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def round_to_integral(x: np.ndarray, mode: str) -> np.ndarray:
    """cvt.<mode>.f32.f32: the f32 (or float64) integral value."""
    if mode not in _ROUND:
        raise UnsupportedError(f"rounding mode {mode}: integer modes are {', '.join(_ROUND)}")
    y = _ROUND[mode](x)
    return canonical_f32(y) if y.dtype == np.float32 else y


@quiet
def float_to_int(
    x: np.ndarray, mode: str, bits: int, *, signed: bool, ftz: bool = False
) -> np.ndarray:
    """cvt.<mode>{.ftz}.{s,u}<bits>.f32 or .f64 (by dtype): raw unsigned integers of `bits` bits.

    Out of range saturates. NaN gives 0, but 2^(bits - 1) from .f64 or to 64 bits (PTX ISA, cvt).
    """
    x = np.asarray(x)
    if x.dtype != np.float64:
        x = flush(x) if ftz else x
    y = round_to_integral(x.astype(np.float64), mode)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    raw = np.dtype(f"u{bits // 8}")
    whole = np.dtype(np.int64 if signed else np.uint64)
    # float64 cannot hold 2^63 - 1 or 2^64 - 1: the bound itself is compared instead.
    over, under = y >= float(high) + (bits < 54), y <= float(low)
    result = np.where(over | under | (y != y), 0.0, y).astype(whole).astype(raw)
    result = np.where(
        over, raw.type(high), np.where(under, raw.type(low & (1 << bits) - 1), result)
    )
    nan = 1 << (bits - 1) if bits == 64 or x.dtype == np.float64 else 0
    return np.where(y != y, raw.type(nan), result)


def int_to_f32(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """cvt.<mode>.f32.{s,u}{8,16,32,64}: the sign is that of the dtype of `x`."""
    x = np.asarray(x)
    x = x.astype(np.int64 if np.issubdtype(x.dtype, np.signedinteger) else np.uint64)
    high = (x >> x.dtype.type(32)).astype(np.float64) * 2.0**32
    low = (x & x.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return narrow(add_odd(high, low), np.float32, mode)


# --- stochastic rounding ------------------------------------------------------------------------

# Bits of rbits, most significant first, that each element of cvt.rs...x4 (operands a, b, e, f)
# takes as its 16-bit fraction. The PTX ISA has this only in figures; these were probed on sm_100
# (github.com "nvidia_rs_bit_probe", third party) and agree with its text: for e2m1x4, a and b use
# the high bytes of both halves and e and f the low bytes.
_RS_BITS = {
    "e2m1": (
        [*range(8, 16), *range(24, 32)],
        [*range(31, 23, -1), *range(15, 7, -1)],
        [*range(8), *range(16, 24)],
        [*range(23, 15, -1), *range(7, -1, -1)],
    ),
}
_RS_BITS["e4m3"] = _RS_BITS["e5m2"] = (
    [*range(16, 32)],
    [*range(31, 15, -1)],
    [*range(16)],
    [*range(15, -1, -1)],
)


def stochastic_x4(values: list[np.ndarray], rbits: np.ndarray, kind: str) -> list[np.ndarray]:
    """cvt.rs.satfinite.<kind>x4.f32 {a, b, e, f}, rbits: the codes of a, b, e, f (uint8).

    An element at fraction p of the way to the next larger magnitude goes there if its 16 random
    bits R satisfy p + R / 2^16 >= 1. NaN is as in `from_f32` (not probed).
    """
    if kind not in _RS_BITS:
        raise UnsupportedError(f"cvt.rs.{kind}x4: modelled are {', '.join(_RS_BITS)}")
    rbits = np.asarray(rbits, dtype=np.uint32)
    form = MINIFLOATS[kind]
    codes = []
    for x, order in zip(values, _RS_BITS[kind], strict=True):
        random = np.zeros(rbits.shape, dtype=np.uint32)
        for bit in order:
            random = random << np.uint32(1) | (rbits >> np.uint32(bit)) & np.uint32(1)
        magnitude = np.minimum(np.abs(np.asarray(x, dtype=np.float32)), form.values[form.largest])
        below = np.searchsorted(form.values[: form.largest + 1], magnitude, side="right") - 1
        below = np.minimum(below, form.largest - 1)
        low, high = form.values[below].astype(np.float64), form.values[below + 1]
        up = (magnitude - low) / (high - low) >= 1 - random / 65536
        code = below + up + np.where(np.signbit(x), form.sign, 0)
        codes.append(np.where(x != x, form.nan, code).astype(np.uint8))
    return codes


def stochastic_bf16(x: np.ndarray, random: np.ndarray, *, satfinite: bool = False) -> np.ndarray:
    """One element of cvt.rs{.satfinite}.bf16x2.f32: raw uint16.

    `random` is the element's half of rbits: the high half for a, the low half for b (same probe).
    """
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    raw = (bits + (np.asarray(random, dtype=np.uint32) & np.uint32(0xFFFF))) >> np.uint32(16)
    raw = np.where(np.isinf(x), bits >> np.uint32(16), raw).astype(np.uint16)
    return _finish_16(x, raw, np.uint16(0x7F7F), satfinite, relu=False)


def stochastic_f16(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """cvt.rs.f16x2.f32 is refused: callers suggest 13 bits of each half, nothing proves it."""
    raise UnsupportedError("cvt.rs.f16x2.f32: how the random bits are used is not known")
