"""Integer, logic, bit and compare instructions against Python ints, and which opcodes have tests.

Each case is PTX that computes d0 from x0, x1, ... and a function of Python numbers that does the
same to one lane, written from the PTX ISA alone.
"""

from __future__ import annotations

import importlib
import random
import re
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.isa import decoder
from tests.emulator.snippets import by_lane, by_lane_defined

DTYPES = {1: bool, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
COUNT = 512
HERE = Path(__file__).parent

# Opcode -> the file whose tests run it, where that is not one with instructions by hand.
ELSEWHERE = {"tcgen05": "test_bf16_gemm.py"}
BY_HAND = [
    f"test_{name}.py" for name in ("instructions", "floats", "warps", "memory", "matrix_moves")
]


def test_every_opcode_has_a_test():
    """Of its own: its name is in a test that runs it from PTX."""
    for name in decoder.MODULES:
        importlib.import_module(f"tests.emulator.isa.{name}")
    written = "\n".join((HERE / name).read_text() for name in BY_HAND)
    missing = [
        opcode
        for opcode in sorted(decoder._REGISTRY)
        if opcode not in ELSEWHERE and not re.search(rf"\b{opcode}[.;\"]", written)
    ]
    assert not missing
    assert all((HERE / name).exists() for name in ELSEWHERE.values())


def signed(value, bits):
    """A pattern as a number in two's complement."""
    return value - (1 << bits) if value >> bits - 1 else value


def _edges(bits):
    top = 1 << bits - 1
    special = [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1]
    return [*special, *(n for n in (7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255) if n < 2 * top)]


def _operand(generator, bits):
    """Patterns of a width: limits, small ones, few bits, and any."""
    edges = _edges(bits) if bits > 1 else [0, 1]
    choose = (
        lambda: generator.choice(edges),
        lambda: generator.getrandbits(bits),
        lambda: generator.randrange(min(70, 1 << bits)),
        lambda: (1 << generator.randrange(bits)) ^ generator.getrandbits(1),
    )
    return [generator.choice(choose)() for _ in range(COUNT)]


def check(code, model, widths, result, **options):
    """Compare lanes with the model on random operands of these widths."""
    generator = random.Random(code)
    operands = [_operand(generator, bits) for bits in widths]
    if re.match(r"(div|rem)", code):  # by zero: unspecified
        operands[1] = [value or 1 for value in operands[1]]
    arrays = [np.array(values, DTYPES[bits]) for values, bits in zip(operands, widths, strict=True)]
    (got,) = by_lane(code, arrays, [DTYPES[result]], **options)
    mask = (1 << result) - 1
    for values, found in zip(zip(*operands, strict=True), got.tolist(), strict=True):
        wanted = model(*values) & mask
        assert int(found) == wanted, f"{code} of {[hex(v) for v in values]}: {found:#x}"


def _quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# name -> function of numbers, already signed where the type is
_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": _quotient,
    "rem": lambda a, b: a - b * _quotient(a, b),
    "min": min,
    "max": max,
    "mad.lo": lambda a, b, c: a * b + c,
    "sad": lambda a, b, c: c + abs(a - b),
    "neg": lambda a: -a,
    "abs": abs,
}
TYPES = ("u16", "u32", "u64", "s16", "s32", "s64")


def _sources(function):
    return 2 if function is min or function is max else 1 if function is abs else (
        function.__code__.co_argcount
    )  # fmt: skip


def _numbers(type_):
    bits = int(type_[1:])
    return (lambda v: signed(v, bits)) if type_[0] == "s" else (lambda v: v)


@pytest.mark.parametrize("type_", TYPES)
def test_integer_arithmetic(type_):
    bits, number = int(type_[1:]), _numbers(type_)
    for name, function in _ARITHMETIC.items():
        if name in ("neg", "abs") and type_[0] == "u":
            continue
        count = _sources(function)
        code = f"{name}.{type_} d0, {', '.join(f'x{i}' for i in range(count))};"
        check(code, lambda *v, f=function: f(*map(number, v)), [bits] * count, bits)
    high = lambda a, b: number(a) * number(b) >> bits  # noqa: E731
    check(f"mul.hi.{type_} d0, x0, x1;", high, [bits] * 2, bits)
    check(f"mad.hi.{type_} d0, x0, x1, x2;", lambda a, b, c: high(a, b) + c, [bits] * 3, bits)


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32"])
def test_wide_products(type_):
    bits, number = int(type_[1:]), _numbers(type_)
    product = lambda a, b: number(a) * number(b)  # noqa: E731
    check(f"mul.wide.{type_} d0, x0, x1;", product, [bits] * 2, 2 * bits)
    widths = [bits, bits, 2 * bits]
    check(f"mad.wide.{type_} d0, x0, x1, x2;", lambda a, b, c: product(a, b) + c, widths, 2 * bits)


def _clamped(value):
    return max(min(value, 2**31 - 1), -(2**31))


def _low24(a, b, number):
    return number(a & 0xFFFFFF) * number(b & 0xFFFFFF)


def test_saturating_narrow_and_paired_arithmetic():
    s32 = lambda v: signed(v, 32)  # noqa: E731
    check("add.sat.s32 d0, x0, x1;", lambda a, b: _clamped(s32(a) + s32(b)), [32] * 2, 32)
    check("sub.sat.s32 d0, x0, x1;", lambda a, b: _clamped(s32(a) - s32(b)), [32] * 2, 32)
    for kind, number in (("u32", lambda v: v), ("s32", lambda v: signed(v, 24))):
        product = lambda a, b, n=number: _low24(a, b, n)  # noqa: E731
        check(f"mul24.lo.{kind} d0, x0, x1;", product, [32] * 2, 32)
        add = lambda a, b, c, p=product: p(a, b) + c  # noqa: E731
        check(f"mad24.lo.{kind} d0, x0, x1, x2;", add, [32] * 3, 32)
    for name, function in (("add", _ARITHMETIC["add"]), ("min", min), ("max", max)):
        for kind in ("u16x2", "s16x2"):
            number = _numbers(kind[:3])

            def pair(a, b, f=function, n=number):
                low = f(n(a & 0xFFFF), n(b & 0xFFFF)) & 0xFFFF
                return (f(n(a >> 16), n(b >> 16)) & 0xFFFF) << 16 | low

            check(f"{name}.{kind} d0, x0, x1;", pair, [32] * 2, 32)


@pytest.mark.parametrize("bits", [1, 16, 32, 64])
def test_logic(bits):
    kind = "pred" if bits == 1 else f"b{bits}"
    check(f"and.{kind} d0, x0, x1;", lambda a, b: a & b, [bits] * 2, bits)
    check(f"or.{kind} d0, x0, x1;", lambda a, b: a | b, [bits] * 2, bits)
    check(f"xor.{kind} d0, x0, x1;", lambda a, b: a ^ b, [bits] * 2, bits)
    check(f"not.{kind} d0, x0;", lambda a: ~a, [bits], bits)
    check(f"mov.{kind} d0, x0;", lambda a: a, [bits], bits)
    if bits == 1:
        check("and.pred d0, !x0, x1;", lambda a, b: ~a & b, [1, 1], 1)
        check("mov.pred d0, !x0;", lambda a: ~a, [1], 1)
        return
    check(f"cnot.{kind} d0, x0;", lambda a: a == 0, [bits], bits)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp(bits):
    check(f"shl.b{bits} d0, x0, x1;", lambda a, n: a << min(n, bits), [bits, 32], bits)
    for kind in ("b", "u"):
        check(f"shr.{kind}{bits} d0, x0, x1;", lambda a, n: a >> min(n, bits), [bits, 32], bits)
    down = lambda a, n: signed(a, bits) >> min(n, bits)  # noqa: E731
    check(f"shr.s{bits} d0, x0, x1;", down, [bits, 32], bits)


def _funnel(low, high, n, left):
    both = high << 32 | low
    return both << n >> 32 if left else both >> n


def test_funnel_shifts():
    for side, left in (("l", True), ("r", False)):
        wrap = lambda a, b, n, s=left: _funnel(a, b, n & 31, s)  # noqa: E731
        check(f"shf.{side}.wrap.b32 d0, x0, x1, x2;", wrap, [32] * 3, 32)
        clamp = lambda a, b, n, s=left: _funnel(a, b, min(n, 32), s)  # noqa: E731
        check(f"shf.{side}.clamp.b32 d0, x0, x1, x2;", clamp, [32] * 3, 32)


def _permuted(a, b, selector):
    data = (b << 32 | a).to_bytes(8, "little")
    result = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def test_bytes_are_permuted():
    check("prmt.b32 d0, x0, x1, x2;", _permuted, [32] * 3, 32)
    for selector in (0x3210, 0x7654, 0x0123, 0xBA98, 0x5F1C):
        code = f"prmt.b32 d0, x0, x1, {selector:#x};"
        check(code, lambda a, b, s=selector: _permuted(a, b, s), [32] * 2, 32)


def test_all_tables_of_lop3():
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(0, 2**32, 32, dtype=np.uint32) for _ in range(3))
    place = 4 * (a[:, None] >> np.arange(32) & 1) + 2 * (b[:, None] >> np.arange(32) & 1)
    place = place + (c[:, None] >> np.arange(32) & 1)
    for start in range(0, 256, 32):
        tables = range(start, start + 32)
        code = "\n".join(f"lop3.b32 d{i}, x0, x1, x2, {t:#x};" for i, t in enumerate(tables))
        for table, got in zip(tables, by_lane(code, [a, b, c], [np.uint32] * 32), strict=True):
            bits = table >> place & 1
            assert (got == (bits << np.arange(32)).sum(1)).all(), table


def _extracted(value, start, length, bits, is_signed):
    start, length = start & 255, length & 255
    sign = 0
    if is_signed and length:
        sign = value >> min(start + length - 1, bits - 1) & 1
    result = 0
    for i in range(bits):
        inside = i < length and start + i < bits
        result |= (value >> start + i & 1 if inside else sign) << i
    return result


def _inserted(field, base, start, length, bits):
    start, length = start & 255, length & 255
    for i in range(length):
        if start + i < bits:
            base = base & ~(1 << start + i) | (field >> i & 1) << start + i
    return base


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits):
    for kind in "us":
        extracted = lambda *v, s=kind == "s": _extracted(*v, bits, s)  # noqa: E731
        check(f"bfe.{kind}{bits} d0, x0, x1, x2;", extracted, [bits, 32, 32], bits)
    inserted = lambda *v: _inserted(*v, bits)  # noqa: E731
    check(f"bfi.b{bits} d0, x0, x1, x2, x3;", inserted, [bits, bits, 32, 32], bits)
    for kind, number in (("u", lambda v: v), ("s", lambda v: signed(v, bits))):
        top = lambda v, n=number: (n(v) if n(v) >= 0 else ~n(v)).bit_length() - 1  # noqa: E731
        check(f"bfind.{kind}{bits} d0, x0;", top, [bits], 32)
        shift = lambda v, t=top: -1 if t(v) < 0 else bits - 1 - t(v)  # noqa: E731
        check(f"bfind.shiftamt.{kind}{bits} d0, x0;", shift, [bits], 32)
    check(f"popc.b{bits} d0, x0;", lambda v: bin(v).count("1"), [bits], 32)
    check(f"clz.b{bits} d0, x0;", lambda v: bits - v.bit_length(), [bits], 32)
    check(f"brev.b{bits} d0, x0;", lambda v: int(f"{v:0{bits}b}"[::-1], 2), [bits], bits)


def _extended(value, n, kind):
    low = value & (1 << n) - 1
    return signed(low, n) if kind == "s32" and n else low


def test_masks_and_extensions():
    for mode, limit in (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n & 31)):
        mask = lambda a, n, f=limit: ((1 << f(n)) - 1) << f(a)  # noqa: E731
        check(f"bmsk.{mode}.b32 d0, x0, x1;", mask, [32] * 2, 32)
        for kind in ("u32", "s32"):
            extended = lambda a, n, f=limit, k=kind: _extended(a, f(n), k)  # noqa: E731
            check(f"szext.{mode}.{kind} d0, x0, x1;", extended, [32] * 2, 32)


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
def test_dot_product(a_type, b_type):
    def dot(a, b, c):
        parts = (
            [signed(v >> s & 255, 8) if t == "s32" else v >> s & 255 for s in (0, 8, 16, 24)]
            for v, t in ((a, a_type), (b, b_type))
        )
        return c + sum(x * y for x, y in zip(*parts, strict=True))

    check(f"dp4a.{a_type}.{b_type} d0, x0, x1, x2;", dot, [32] * 3, 32)


_RELATIONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("type_", [*TYPES, "b16", "b32", "b64"])
def test_integer_comparisons(type_):
    bits, number = int(type_[1:]), _numbers(type_)
    for name, relation in _RELATIONS.items():
        if type_[0] == "b" and name not in ("eq", "ne"):
            continue
        holds = lambda a, b, r=relation: r(number(a), number(b))  # noqa: E731
        check(f"setp.{name}.{type_} d0, x0, x1;", holds, [bits] * 2, 1)
    if type_[0] == "u":
        for name, same in _UNSIGNED.items():
            check(f"setp.{name}.{type_} d0, x0, x1;", _RELATIONS[same], [bits] * 2, 1)


def test_combined_comparisons_and_two_results():
    less = lambda a, b: signed(a, 32) < signed(b, 32)  # noqa: E731
    for name, c in (("and", lambda t, p: t & p), ("or", lambda t, p: t | p),
                    ("xor", lambda t, p: t ^ p)):  # fmt: skip
        first = lambda a, b, p, c=c: c(less(a, b), p)  # noqa: E731
        check(f"setp.lt.{name}.s32 d0, x0, x1, x2;", first, [32, 32, 1], 1)
        inverted = lambda a, b, p, c=c: c(less(a, b), 1 - p)  # noqa: E731
        check(f"setp.lt.{name}.s32 d0, x0, x1, !x2;", inverted, [32, 32, 1], 1)
        second = lambda a, b, p, c=c: c(not less(a, b), p)  # noqa: E731
        code = f"setp.lt.{name}.s32 p1|d0, x0, x1, x2;"
        check(code, second, [32, 32, 1], 1)
    check("setp.lt.s32 d0|p1, x0, x1;", less, [32, 32], 1)
    check("setp.lt.s32 p1|d0, x0, x1;", lambda a, b: not less(a, b), [32, 32], 1)


def test_selection():
    check("selp.b64 d0, x0, x1, x2;", lambda a, b, p: a if p else b, [64, 64, 1], 64)
    check("selp.u16 d0, x0, x1, !x2;", lambda a, b, p: b if p else a, [16, 16, 1], 16)
    slct = lambda a, b, c: a if signed(c, 32) >= 0 else b  # noqa: E731
    check("slct.u32.s32 d0, x0, x1, x2;", slct, [32] * 3, 32)
    holds = lambda a, b: 0xFFFFFFFF if a < b else 0  # noqa: E731
    check("set.lt.u32.u32 d0, x0, x1;", holds, [32] * 2, 32)
    check("set.ge.f32.u32 d0, x0, x1;", lambda a, b: 0x3F800000 * (a >= b), [32] * 2, 32)


def test_what_is_not_selected_need_not_be_defined():
    lanes = np.arange(64, dtype=np.uint32)
    code = "setp.lt.u32 p1, x0, 40; selp.b32 d0, x0, r9, p1; selp.b32 d1, r9, x0, p1;"
    (first, second), known = by_lane_defined(code, [lanes], [np.uint32] * 2)
    assert known[0].tolist() == [lane < 40 for lane in range(64)]
    assert known[1].tolist() == [lane >= 40 for lane in range(64)]
    assert (first[:40] == lanes[:40]).all() and (second[40:] == lanes[40:]).all()
    code = "setp.lt.u32 p1, x0, 40; setp.eq.u32 p2, r9, 0; and.pred d0, p1, p2; or.pred d1, p1, p2;"
    _, known = by_lane_defined(code, [lanes], [bool] * 2)
    assert known[0].tolist() == [lane >= 40 for lane in range(64)], "False and ? is False"
    assert known[1].tolist() == [lane < 40 for lane in range(64)], "True or ? is True"


def test_packing():
    check("mov.b32 d0, {x0, x1};", lambda a, b: a | b << 16, [16, 16], 32)
    check("mov.b64 d0, {x0, x1};", lambda a, b: a | b << 32, [32, 32], 64)
    four = lambda *v: sum(x << 16 * i for i, x in enumerate(v))  # noqa: E731
    check("mov.b64 d0, {x0, x1, x2, x3};", four, [16] * 4, 64)
    bytes_ = lambda *v: int.from_bytes(bytes(v), "little")  # noqa: E731
    check("mov.b32 d0, {x0, x1, x2, x3};", bytes_, [8] * 4, 32)
    check("mov.b32 d0, {x0, 7};", lambda a: a | 7 << 16, [16], 32)
    check("mov.b64 {_, d0}, x0;", lambda a: a >> 32, [64], 32)
    check("mov.b32 {d0, h1}, x0;", lambda a: a, [32], 16)
    check("mov.b32 {b1, b2, d0, b3}, x0;", lambda a: a >> 16, [32], 8)


@pytest.mark.parametrize("source", ["u8", "s8", *TYPES])
def test_conversions_between_integers(source):
    bits, number = int(source[1:]), _numbers(source)
    for target in ("u8", "s8", *TYPES):
        wide = int(target[1:])
        low, high = (-(1 << wide - 1), (1 << wide - 1) - 1) if target[0] == "s" else (
            0, (1 << wide) - 1,
        )  # fmt: skip
        # Narrow results are extended to the register they are in.
        register = max(wide, 16)
        check(f"cvt.{target}.{source} d0, x0;",
              lambda a, w=wide, t=target: signed(number(a) & (1 << w) - 1, w) if t[0] == "s"
              else number(a) & (1 << w) - 1, [bits], register)  # fmt: skip
        clamp = lambda a, lo=low, hi=high: max(lo, min(hi, number(a)))  # noqa: E731
        check(f"cvt.sat.{target}.{source} d0, x0;", clamp, [bits], register)
    # A wider source register: its upper bits are ignored.
    if bits < 64:
        check(f"cvt.u64.{source} d0, x0;",
              lambda a: number(a & (1 << bits) - 1), [64], 64)  # fmt: skip
