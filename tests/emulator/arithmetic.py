"""Floating-point arithmetic of PTX on numpy arrays, bit for bit.

f32 operands and results are float32 arrays, f16 and bf16 ones raw uint16. Products of two f32 are
exact in float64 and sums are rounded to odd there (see formats.py), so that every result is the
exact value rounded once. NaN results are canonical.
"""

from __future__ import annotations

import numpy as np

from tests.emulator import formats
from tests.emulator.errors import EmulatorError, UnsupportedError


def _wide(x: np.ndarray, ftz: bool) -> np.ndarray:
    x = np.asarray(x, dtype=np.float32)
    return (formats.flush(x) if ftz else x).astype(np.float64)


def _finish(exact: np.ndarray, mode: str, ftz: bool, sat: bool) -> np.ndarray:
    y = formats.narrow(exact, np.float32, mode)
    if sat:
        # Also NaN and -0 become +0.
        y = np.where(y > 0, np.minimum(y, np.float32(1)), np.float32(0))
    return formats.canonical_f32(formats.flush(y) if ftz else y)


# --- f32 arithmetic ----------------------------------------------------------------------------


def _sum(a: np.ndarray, b: np.ndarray, mode: str, ftz: bool, sat: bool) -> np.ndarray:
    exact = formats.add_odd(a, b)
    if mode == "rm":
        # x + (-x) is -0 when rounding down.
        cancel = (exact == 0) & (np.signbit(a) != np.signbit(b))
        exact = np.where(cancel, -0.0, exact)
    return _finish(exact, mode, ftz, sat)


@formats.quiet
def fma_f32(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    mode: str = "rn",
    *,
    ftz: bool = False,
    sat: bool = False,
) -> np.ndarray:
    """fma.<mode>{.ftz}{.sat}.f32: a * b + c with one rounding."""
    product = _wide(a, ftz) * _wide(b, ftz)
    return _sum(product, _wide(c, ftz), mode, ftz, sat)


def add_f32(
    a: np.ndarray, b: np.ndarray, mode: str = "rn", *, ftz: bool = False, sat: bool = False
) -> np.ndarray:
    """add.<mode>{.ftz}{.sat}.f32; subtraction is the addition of `-b`."""
    return _sum(_wide(a, ftz), _wide(b, ftz), mode, ftz, sat)


@formats.quiet
def mul_f32(
    a: np.ndarray, b: np.ndarray, mode: str = "rn", *, ftz: bool = False, sat: bool = False
) -> np.ndarray:
    """mul.<mode>{.ftz}{.sat}.f32."""
    product = _wide(a, ftz) * _wide(b, ftz)
    return _finish(product, mode, ftz, sat)


@formats.quiet
def div_f32(a: np.ndarray, b: np.ndarray, mode: str = "rn", *, ftz: bool = False) -> np.ndarray:
    """div.<mode>{.ftz}.f32.

    The float64 quotient need not be exact: for x of up to 25 bits, a and x * b are multiples of
    2^-50 |a|, so a / b is x or farther from it than float64 rounds.
    """
    quotient = _wide(a, ftz) / _wide(b, ftz)
    return _finish(quotient, mode, ftz, False)


@formats.quiet
def sqrt_f32(a: np.ndarray, mode: str = "rn", *, ftz: bool = False) -> np.ndarray:
    """sqrt.<mode>{.ftz}.f32; exact for the reason of `div_f32`, x^2 having 50 bits."""
    root = np.sqrt(_wide(a, ftz))
    return _finish(root, mode, ftz, False)


def rcp_f32(a: np.ndarray, mode: str = "rn", *, ftz: bool = False) -> np.ndarray:
    """rcp.<mode>{.ftz}.f32, and rcp.approx{.ftz}.f32, which hardware rounds within 1 ulp."""
    return div_f32(np.ones_like(np.asarray(a, dtype=np.float32)), a, mode, ftz=ftz)


# op -> function of an x87 long double, whose 64 bits make the f32 result the correctly rounded
# one unless the exact value is within 2^-62 of the middle of two f32.
_APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
}


@formats.quiet
def approximate(op: str, x: np.ndarray, *, ftz: bool = False) -> np.ndarray:
    """<op>.approx{.ftz}.f32 as the correctly rounded value, which hardware only approaches.

    The PTX ISA bounds the error (1 ulp for rcp, about 2 for the others), it does not give the
    bits: results that depend on these may differ from hardware in the last place.
    """
    if op not in _APPROXIMATE:
        raise UnsupportedError(f"{op}.approx.f32: modelled are {', '.join(_APPROXIMATE)}")
    x = np.asarray(x, dtype=np.float32)
    y = _APPROXIMATE[op]((formats.flush(x) if ftz else x).astype(np.longdouble)).astype(np.float32)
    return formats.canonical_f32(formats.flush(y) if ftz else y)


def minmax_f32(
    op: str, a: np.ndarray, b: np.ndarray, *, nan: bool = False, ftz: bool = False
) -> np.ndarray:
    """{min,max}{.ftz}{.NaN}.f32: -0 < +0; a NaN gives the other operand, or NaN with `nan`."""
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    if ftz:
        a, b = formats.flush(a), formats.flush(b)
    if op not in ("min", "max"):
        raise EmulatorError(f"{op} is not min or max")
    first = (a < b) | ((a == b) & np.signbit(a))
    if op == "max":
        first = (a > b) | ((a == b) & ~np.signbit(a))
    result = np.where(first | (b != b), a, b)
    if nan:
        result = np.where((a != a) | (b != b), np.float32(np.nan), result)
    return formats.canonical_f32(result)


# --- f16 and bf16 ------------------------------------------------------------------------------

_ENCODE = {"f16": formats.f32_to_f16, "bf16": formats.f32_to_bf16}


def _flush_16(raw: np.ndarray, kind: str) -> np.ndarray:
    """`.ftz` of f16: subnormals become zeros of the same sign. bf16 instructions have no .ftz."""
    if kind != "f16":
        raise UnsupportedError(f".ftz of {kind}")
    return np.where(raw & np.uint16(0x7C00), raw, raw & np.uint16(0x8000))


@formats.quiet
def arithmetic_16(
    op: str,
    kind: str,
    operands: tuple[np.ndarray, ...],
    *,
    ftz: bool = False,
    sat: bool = False,
    relu: bool = False,
) -> np.ndarray:
    """{add,sub,mul,fma}.rn{.ftz}{.sat}{.relu}.<kind> of raw uint16 arrays, rounded once."""
    raw = [np.asarray(x, dtype=np.uint16) for x in operands]
    if ftz:
        raw = [_flush_16(x, kind) for x in raw]
    value = [formats.to_f32(x, kind).astype(np.float64) for x in raw]
    if op == "fma":
        exact = formats.add_odd(value[0] * value[1], value[2])
    elif op == "mul":
        exact = value[0] * value[1]
    elif op in ("add", "sub"):
        exact = formats.add_odd(value[0], value[1] if op == "add" else -value[1])
    else:
        raise UnsupportedError(f"{op}.{kind}: modelled are add, sub, mul and fma")
    # float16 is rounded to from float64 directly, bf16 by way of f32.
    y = exact if kind == "f16" else formats.odd_f32(exact)
    if sat:
        y = np.where(y > 0, np.minimum(y, y.dtype.type(1)), y.dtype.type(0))
    result = _ENCODE[kind](y, relu=relu)
    return _flush_16(result, kind) if ftz else result


def minmax_16(
    op: str, kind: str, a: np.ndarray, b: np.ndarray, *, nan: bool = False, ftz: bool = False
) -> np.ndarray:
    """{min,max}{.ftz}{.NaN}.<kind> of raw uint16 arrays, with the rules of `minmax_f32`."""
    if ftz:
        a, b = _flush_16(a, kind), _flush_16(b, kind)
    value = minmax_f32(op, formats.to_f32(a, kind), formats.to_f32(b, kind), nan=nan)
    return _ENCODE[kind](value)


def packed(op: str, kind: str, *words: np.ndarray, **modifiers: bool) -> np.ndarray:
    """{add,sub,mul,fma,min,max}...<kind>x2 of packed registers (uint32), halves independently."""
    # Halves are rounded one by one, so all 64 lanes can be at once.
    halves = tuple(np.ascontiguousarray(word, dtype=np.uint32).view(np.uint16) for word in words)
    if op in ("min", "max"):
        result = minmax_16(op, kind, *halves, **modifiers)
    else:
        result = arithmetic_16(op, kind, halves, **modifiers)
    return np.ascontiguousarray(result, dtype=np.uint16).view(np.uint32)
