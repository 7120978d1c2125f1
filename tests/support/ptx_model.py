"""A numpy model of ``fos_compile.kernels.cute.ptx``: every value is an array, an entry a thread.

With it in place of the real module the arithmetic of a kernel runs on a CPU, bit for bit, except
that ``rcp_approx`` errs at random within the one ulp that PTX allows.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fos_compile.kernels.cute import conversions

F32, U32, F16, U16 = np.float32, np.uint32, np.float16, np.uint16
_random = np.random.default_rng(0)


def _f32(a: Any) -> np.ndarray:
    return np.asarray(a, F32)


def _rounded(exact: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 `exact` + `error` to float32 in one rounding: make `exact` odd first."""
    toward_zero = np.where(np.signbit(exact) != np.signbit(error), np.nextafter(exact, 0.0), exact)
    odd = (toward_zero.view(np.uint64) | np.uint64(1)).view(np.float64)
    inexact = (error != 0) & np.isfinite(exact)
    return np.where(inexact, odd, exact).astype(F32)


def mul(a, b):
    return _f32(a) * _f32(b)


def add(a, b):
    return _f32(a) + _f32(b)


def sub(a, b):
    return _f32(a) - _f32(b)


def fma(a, b, c):
    p = np.asarray(_f32(a), np.float64) * _f32(b)
    c = np.asarray(_f32(c), np.float64) + np.zeros_like(p)
    s = p + c
    t = s - p
    return _rounded(s, (p - (s - t)) + (c - t))


def add_down(a, b):
    exact = np.asarray(_f32(a), np.float64) + _f32(b)  # exact where exponents differ by 28 at most
    near = exact.astype(F32)
    return np.where(near > exact, np.nextafter(near, F32(-np.inf)), near)


def add_x2(a, b):
    return tuple(map(add, a, b))


def sub_x2(a, b):
    return tuple(map(sub, a, b))


def mul_x2(a, b):
    return tuple(map(mul, a, b))


def fma_x2(a, b, c):
    return tuple(map(fma, a, b, c))


def div(a, b):
    return _f32(a) / _f32(b)


def rcp(a):
    return F32(1) / _f32(a)


def rcp_approx(a):
    a = _f32(a)
    r = F32(1) / np.where(np.abs(a) < 2.0**-126, np.copysign(F32(0), a), a)
    # The neighbour beyond the exact quotient is within one ulp, too. Devices round a divisor of
    # all ones right: the sequence that nvcc makes of rcp.rn relies on that as well.
    beyond = np.where(np.asarray(r, np.float64) * a > 1, np.copysign(F32(0), r), r * F32(2))
    other = np.nextafter(r, beyond)
    may = np.isfinite(r) & (r != 0) & ((bits(a) & U32(0x7FFFFF)) != 0x7FFFFF)
    may &= np.asarray(r, np.float64) * a != 1
    r = np.where(may & (_random.random(a.shape) < 0.5), other, r)
    return np.where(np.abs(r) < 2.0**-126, np.copysign(F32(0), r), r)


def maximum(a, b):
    return np.fmax(_f32(a), _f32(b))


def max_nan(a, b):
    return np.maximum(_f32(a), _f32(b))


def floor(a):
    return np.floor(_f32(a))


def to_float(a):
    return np.asarray(a, U32).astype(F32)


def to_bfloat16(a):
    b = bits(a)
    rounded = (b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) & U32(0xFFFF0000)
    return np.where(np.isnan(_f32(a)), F32(np.nan), real(rounded))


def to_float16(a):
    return _f32(a).astype(F16).astype(F32)


def minimum(a, b):
    return np.fmin(_f32(a), _f32(b))


def absolute(a):
    return np.abs(_f32(a))


def negative(a):
    return -_f32(a)


def bits(a):
    return np.ascontiguousarray(_f32(a)).view(U32)


def real(a):
    return np.ascontiguousarray(np.asarray(a, U32)).view(F32)


def u32(value):
    return U32(value)


def _halves(a) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(a, U32)[..., None]).view(F16).astype(np.longdouble)


def _pack(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.astype(F16)).view(U32)[..., 0]


def hmul2(a, b):
    return _pack(_halves(a) * _halves(b))


def hadd2(a, b):
    return _pack(_halves(a) + _halves(b))


def hsub2(a, b):
    return _pack(_halves(a) - _halves(b))


def hfma2(a, b, c):
    return _pack(_halves(a) * _halves(b) + _halves(c))


def hfma2_relu(a, b, c):
    return _pack(np.maximum(_halves(a) * _halves(b) + _halves(c), 0))


def hneg2(a):
    return np.asarray(a, U32) ^ U32(0x80008000)


def half2(low, high):
    low, high = np.broadcast_arrays(_f32(low), _f32(high))
    return _pack(np.stack([low, high], -1))


def widen(a):
    both = _halves(a).astype(F32)
    return both[..., 0], both[..., 1]


def bf16_fma2(a, b, c):
    """Numbers whose product and sum bfloat16 has."""
    a, b, c = (real(_words(each).astype(U32) << U32(16)) for each in (a, b, c))
    exact = bits(fma(a, b, c)) >> U32(16)
    return np.ascontiguousarray(exact.astype(U16)).view(U32)[..., 0]


def _words(a) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(a, U32)[..., None]).view(U16)


@conversions.emulated_unless(conversions.has_sm_90)
def max_u16x2(a, b):
    return np.ascontiguousarray(np.maximum(_words(a), _words(b))).view(U32)[..., 0]


@conversions.emulated_unless(conversions.has_sm_90)
def add_relu_s16x2(a, b):
    total = (_words(a) + _words(b)).view(np.int16)
    return np.ascontiguousarray(np.maximum(total, 0).astype(U16)).view(U32)[..., 0]


def mul_wide(a, b):
    product = np.asarray(a, np.uint64) * np.uint64(b)
    return (product >> np.uint64(32)).astype(U32), product.astype(U32)


def max_u32(a, b):
    return np.maximum(np.asarray(a, U32), np.asarray(b, U32))


@conversions.emulated_unless(conversions.has_sm_90)
def clear_negative_zeros_bf16x2(a):
    w = _words(a)
    return np.ascontiguousarray(np.where(w == 0x8000, U16(0), w)).view(U32)[..., 0]


def where_less(a, b, yes, no):
    return np.where(_f32(a) < _f32(b), np.asarray(yes, U32), np.asarray(no, U32))


def where_nonzero(a, yes, no):
    return np.where(np.asarray(a, U32) != 0, np.asarray(yes, U32), np.asarray(no, U32))


def where_below(a, b, yes, no):
    return np.where(
        np.asarray(a, U32) < np.asarray(b, U32), np.asarray(yes, U32), np.asarray(no, U32)
    )


def prmt(a, b, selector):
    a, b = np.broadcast_arrays(np.asarray(a, np.uint64), np.asarray(b, np.uint64))
    both = a | (b << np.uint64(32))
    out = np.zeros(a.shape, np.uint64)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> np.uint64(8 * (nibble & 7)) & np.uint64(0xFF)
        if nibble & 8:
            byte = (byte >> np.uint64(7)) * np.uint64(0xFF)
        out |= byte << np.uint64(8 * i)
    return out.astype(U32)


def _round_e4m3(s: np.ndarray) -> np.ndarray:
    s = np.minimum(s, F32(448))
    exponent = np.maximum(bits(s) & U32(0x7F800000), U32((127 - 6) << 23))
    magic = real(exponent + U32(20 << 23))
    value = (s + magic) - magic
    subnormal = (value * F32(512)).astype(U32)
    code = np.where(value < 2.0**-6, subnormal, (bits(value) >> U32(20)) - U32((127 - 7) << 3))
    return code.astype(U32)


@conversions.emulated_unless(conversions.has_fp8)
def e4m3x2(low, high):
    codes = []
    for s in (_f32(low), _f32(high)):
        nan = np.isnan(s)
        codes.append(np.where(nan, U32(0x7F), _round_e4m3(np.where(nan, F32(0), s))))
    return codes[0] | (codes[1] << U32(8))


@conversions.emulated_unless(conversions.has_fp8)
def e5m2x4(*numbers):
    clipped = [np.clip(_f32(each), -57344, 57344) for each in numbers]
    bytes_ = torch.from_numpy(np.stack(np.broadcast_arrays(*clipped), -1)).to(torch.float8_e5m2)
    return bytes_.view(torch.uint8).numpy().view(U32)[..., 0]


def _round_e2m1(number: np.ndarray, whole: Callable[[Any], Any] = np.rint) -> np.ndarray:
    """With its sign; NaN becomes 6 (PTX ISA: cvt.satfinite to a type without NaN).

    `whole` rounds a number of steps, ties to even by default.
    """
    y = np.where(np.isnan(number), F32(np.inf), np.minimum(np.abs(number), F32(6)))
    step = np.where(y < 2, F32(0.5), np.where(y < 4, F32(1), F32(2)))
    q = np.minimum(whole(y / step) * step, F32(6))
    return np.where(np.signbit(number) & ~np.isnan(number), -q, q)


def e2m1x8(*numbers):
    return _nibbles([_round_e2m1(_f32(number)) for number in numbers])


def e2m1x8_stochastic(*operands):
    rounded = []
    for i, number in enumerate(operands[:8]):
        share = _random_share(operands[8 + i // 4], i % 4)
        rounded.append(_round_e2m1(_f32(number), lambda steps, u=share: np.floor(steps + u)))
    return _nibbles(rounded)


def _random_share(word: Any, element: int) -> np.ndarray:
    """16 bits of a word over 2^16 in float64: of two bytes, from one end or from the other."""
    word = np.asarray(word, np.int64)
    low = 0 if element < 2 else 8
    two = word >> (low + 16) & 0xFF, word >> low & 0xFF
    order = range(7, -1, -1) if element % 2 == 0 else range(8)
    bits = [byte >> i & 1 for byte in (two if element % 2 == 0 else two[::-1]) for i in order]
    return np.asarray(sum(bit * 0.5 ** (i + 1) for i, bit in enumerate(bits)))


def _nibbles(magnitudes: list[np.ndarray]) -> np.ndarray:
    word = U32(0)
    for i, rounded in enumerate(magnitudes):
        q = np.abs(rounded)
        code = np.where(q < 2, q * 2, np.where(q < 4, q + 2, q / 2 + 4)).astype(U32)
        word = word | ((code | (np.signbit(rounded).astype(U32) << U32(3))) << U32(4 * i))
    return word


def through_e2m1x2(low, high):
    return half2(_round_e2m1(_f32(low)), _round_e2m1(_f32(high)))


@conversions.emulated_unless(conversions.has_fp8)
def from_e4m3x2(a):
    out = []
    for shift in (0, 8):
        code = (np.asarray(a, U32) >> U32(shift)) & U32(0x7F)
        value = np.where(
            code < 8, code.astype(F32) * F32(2.0**-9), real((code << U32(20)) + U32(120 << 23))
        )
        value = np.where(code == 0x7F, F32(np.nan), value)
        out.append(np.where((np.asarray(a, U32) >> U32(shift)) & U32(0x80), -value, value))
    return half2(out[0], out[1])


def lane():
    """Lanes lie along the last axis, 32 of them."""
    return np.arange(32, dtype=U32)


def shuffle(a, source):
    a = np.asarray(a)
    return np.take_along_axis(a, np.broadcast_to(np.asarray(source, np.int64), a.shape), -1)


def shuffle_xor(a, distance):
    return shuffle(a, lane() ^ U32(distance))


def install(monkeypatch: Any, *modules: types.ModuleType) -> None:
    """Make `modules`, and those of ours that they compute with, compute with this model."""
    model = __import__(__name__)
    emulated = importlib.import_module("fos_compile.kernels.cute.emulated")
    for module in (emulated, *modules):
        if getattr(module, "ptx", model) is not model:
            monkeypatch.setattr(module, "ptx", model)
            install(monkeypatch, *(each for each in vars(module).values() if _is_ours(each)))


def _is_ours(thing: Any) -> bool:
    return isinstance(thing, types.ModuleType) and thing.__name__.startswith("fos_compile.")
