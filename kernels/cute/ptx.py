"""The PTX instructions that the quantize kernels are made of, one function an instruction.

Every function takes and returns DSL scalars. Kernels call them through this module
(``ptx.fma(...)``), so that tests can put a numpy model in its place and run the arithmetic of a
kernel on a CPU. Rounding is always explicit: a PTX ``mul`` or ``add`` without ``.rn`` may be
contracted into a multiply-add.
"""

# Kernels find everything here.
# ruff: noqa: F401

from typing import Any

from cutlass import Float32, Uint32
from cutlass.cute import arch

from fos_compile.kernels.cute import conversions
from fos_compile.kernels.cute.global_memory import (
    atomic_add_u32,
    atomic_max_u32,
    load_b16,
    load_b32,
    load_f32,
    load_stream_v4,
    load_u8,
    load_v2,
    store_b16,
    store_b32,
    store_u8,
    store_v2,
    store_v4,
)
from fos_compile.kernels.cute.registers import register, u32


def _emit(code: str, result: Any, *operands: Any) -> Any:
    names = ", ".join(f"{{$r{i}}}" for i in range(len(operands)))
    operands_ = [register(each) for each in operands]
    text = code.replace("@", names)
    return arch.inline_ptx(text, write_only_types=[result], read_only_args=operands_)


# float32


def mul(a: Any, b: Any) -> Any:
    """a * b, one rounding."""
    return _emit("mul.rn.f32 {$w0}, @;", Float32, a, b)


def add(a: Any, b: Any) -> Any:
    """a + b, one rounding."""
    return _emit("add.rn.f32 {$w0}, @;", Float32, a, b)


def sub(a: Any, b: Any) -> Any:
    """a - b, one rounding."""
    return _emit("sub.rn.f32 {$w0}, @;", Float32, a, b)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, one rounding."""
    return _emit("fma.rn.f32 {$w0}, @;", Float32, a, b, c)


def add_down(a: Any, b: Any) -> Any:
    """a + b, rounded down."""
    return _emit("add.rm.f32 {$w0}, @;", Float32, a, b)


def div(a: Any, b: Any) -> Any:
    """a / b, correctly rounded."""
    return _emit("div.rn.f32 {$w0}, @;", Float32, a, b)


def rcp(a: Any) -> Any:
    """1 / a, correctly rounded."""
    return _emit("rcp.rn.f32 {$w0}, @;", Float32, a)


def rcp_approx(a: Any) -> Any:
    """1 / a to one ulp; subnormal arguments and results are flushed."""
    return _emit("rcp.approx.ftz.f32 {$w0}, @;", Float32, a)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two numbers, the other one if one is NaN."""
    return _emit("max.f32 {$w0}, @;", Float32, a, b)


def max_nan(a: Any, b: Any) -> Any:
    """The larger of two numbers, NaN if one is."""
    return _emit("max.NaN.f32 {$w0}, @;", Float32, a, b)


def floor(a: Any) -> Any:
    """The largest whole number not above a."""
    return _emit("cvt.rmi.f32.f32 {$w0}, @;", Float32, a)


def to_float(a: Any) -> Any:
    """An unsigned integer as float32, exact below 2^24."""
    return _emit("cvt.rn.f32.u32 {$w0}, @;", Float32, a)


def to_bfloat16(a: Any) -> Any:
    """a rounded to bfloat16, as float32."""
    code = "{ .reg .b16 t; cvt.rn.bf16.f32 t, {$r0}; mov.b32 {$w0}, {0, t}; }"
    return arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[a])


def to_float16(a: Any) -> Any:
    """a rounded to float16, as float32."""
    code = "{ .reg .b16 t; cvt.rn.f16.f32 t, {$r0}; cvt.f32.f16 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[a])


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two numbers, the other one if one is NaN."""
    return _emit("min.f32 {$w0}, @;", Float32, a, b)


def absolute(a: Any) -> Any:
    """|a|; costs nothing where the instruction that reads it has the modifier."""
    return _emit("abs.f32 {$w0}, @;", Float32, a)


def negative(a: Any) -> Any:
    """-a; costs nothing where the instruction that reads it has the modifier."""
    return _emit("neg.f32 {$w0}, @;", Float32, a)


def bits(a: Any) -> Any:
    """The pattern of a float32."""
    return _emit("mov.b32 {$w0}, @;", Uint32, a)


def real(a: Any) -> Any:
    """The float32 of a pattern."""
    return _emit("mov.b32 {$w0}, @;", Float32, a)


# Pairs of float32 (sm_100 and up: `conversions.has_f32x2`)


def _emit_x2(name: str, *pairs: tuple[Any, Any]) -> tuple[Any, Any]:
    names = "abc"[: len(pairs)]
    packs = " ".join(
        f"mov.b64 {each}, {{{{$r{2 * i}}}, {{$r{2 * i + 1}}}}};" for i, each in enumerate(names)
    )
    code = (
        f"{{ .reg .b64 {', '.join(names)}; {packs} "
        f"{name}.rn.f32x2 a, {', '.join(names)}; mov.b64 {{{{$w0}}, {{$w1}}}}, a; }}"
    )
    operands = [register(each) for pair in pairs for each in pair]
    return arch.inline_ptx(code, write_only_types=[Float32, Float32], read_only_args=operands)


def add_x2(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """a + b of each, one rounding."""
    return _emit_x2("add", a, b)


def sub_x2(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """a - b of each, one rounding."""
    return _emit_x2("sub", a, b)


def mul_x2(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """a * b of each, one rounding."""
    return _emit_x2("mul", a, b)


def fma_x2(a: tuple[Any, Any], b: tuple[Any, Any], c: tuple[Any, Any]) -> tuple[Any, Any]:
    """a * b + c of each, one rounding."""
    return _emit_x2("fma", a, b, c)


# Two float16 in a 32-bit register


def hmul2(a: Any, b: Any) -> Any:
    """a * b, one rounding a half."""
    return _emit("mul.rn.f16x2 {$w0}, @;", Uint32, a, b)


def hadd2(a: Any, b: Any) -> Any:
    """a + b, one rounding a half."""
    return _emit("add.rn.f16x2 {$w0}, @;", Uint32, a, b)


def hsub2(a: Any, b: Any) -> Any:
    """a - b, one rounding a half."""
    return _emit("sub.rn.f16x2 {$w0}, @;", Uint32, a, b)


def hfma2(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, one rounding a half."""
    return _emit("fma.rn.f16x2 {$w0}, @;", Uint32, a, b, c)


def hfma2_relu(a: Any, b: Any, c: Any) -> Any:
    """max(a * b + c, 0), one rounding a half."""
    return _emit("fma.rn.relu.f16x2 {$w0}, @;", Uint32, a, b, c)


def hneg2(a: Any) -> Any:
    """-a of each half, as a modifier of the instruction that reads it."""
    return _emit("neg.f16x2 {$w0}, @;", Uint32, a)


def half2(low: Any, high: Any) -> Any:
    """Two float32, rounded to float16, as halves of a register."""
    return _emit("cvt.rn.f16x2.f32 {$w0}, @;", Uint32, high, low)


def bfloat16x2(low: Any, high: Any) -> Any:
    """Two float32, rounded to bfloat16, as halves of a register."""
    return _emit("cvt.rn.bf16x2.f32 {$w0}, @;", Uint32, high, low)


def widen(a: Any) -> tuple[Any, Any]:
    """The halves of a register as float32: (low, high)."""
    code = "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }"
    return arch.inline_ptx(code, write_only_types=[Float32, Float32], read_only_args=[a])


def bf16_fma2(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, one rounding a half (bfloat16)."""
    return _emit("fma.rn.bf16x2 {$w0}, @;", Uint32, a, b, c)


# Two 16-bit integers in a 32-bit register


@conversions.emulated_unless(conversions.has_sm_90)
def max_u16x2(a: Any, b: Any) -> Any:
    """The larger of each half; orders the patterns of non-negative float16 or bfloat16."""
    return _emit("max.u16x2 {$w0}, @;", Uint32, a, b)


@conversions.emulated_unless(conversions.has_sm_90)
def add_relu_s16x2(a: Any, b: Any) -> Any:
    """max(a + b, 0) of each half, wrapping; one instruction on sm_90."""
    code = "{ .reg .b32 t, z; mov.b32 z, 0; add.s16x2 t, {$r0}, {$r1}; max.s16x2 {$w0}, t, z; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b])


def mul_wide(a: Any, b: Any) -> tuple[Any, Any]:
    """(high, low) word of the product of two unsigned integers."""
    low = _emit("mul.lo.u32 {$w0}, @;", Uint32, a, b)
    return _emit("mul.hi.u32 {$w0}, @;", Uint32, a, b), low


# Bytes


def max_u32(a: Any, b: Any) -> Any:
    """The larger of two unsigned integers."""
    return _emit("max.u32 {$w0}, @;", Uint32, a, b)


@conversions.emulated_unless(conversions.has_sm_90)
def clear_negative_zeros_bf16x2(a: Any) -> Any:
    """a + 0 of each half: -0 becomes +0, every other number stays."""
    code = "{ .reg .b32 z; mov.b32 z, 0; add.rn.bf16x2 {$w0}, {$r0}, z; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


def where_less(a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b (float32), else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.lt.f32 p, {$r0}, {$r1}; selp.b32 {$w0}, {$r2}, {$r3}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(register, (a, b, yes, no))]
    )


def where_nonzero(a: Any, yes: Any, no: Any) -> Any:
    """yes where a is not 0, else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(register, (a, yes, no))]
    )


def where_below(a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b (unsigned), else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.lo.u32 p, {$r0}, {$r1}; selp.b32 {$w0}, {$r2}, {$r3}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(register, (a, b, yes, no))]
    )


def prmt(a: Any, b: Any, selector: int) -> Any:
    """Four of the eight bytes of (a, b), lowest nibble of the selector first."""
    return _emit("prmt.b32 {$w0}, @;", Uint32, a, b, selector)


# Small floats


@conversions.emulated_unless(conversions.has_fp8)
def e4m3x2(low: Any, high: Any) -> Any:
    """Two float32, rounded to nearest even E4M3 and saturated at 448: bytes 0 and 1."""
    code = "{ .reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, {$r1}, {$r0}; cvt.u32.u16 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[low, high])


@conversions.emulated_unless(conversions.has_fp8)
def e5m2x4(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four float32, rounded to nearest even E5M2 and saturated: bytes 0 to 3."""
    code = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.e5m2x2.f32 l, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e5m2x2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }"
    )
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, c, d])


def e2m1x8(*numbers: Any) -> Any:
    """Eight float32, rounded to nearest even E2M1 and saturated at 6: nibbles, lowest first.

    In hardware on sm_100a, sm_103a and sm_120a: `conversions.has_e2m1`.
    """
    pairs = " ".join(
        f"cvt.rn.satfinite.e2m1x2.f32 b{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}};" for i in range(4)
    )
    code = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 {{$w0}}, {{b0, b1, b2, b3}}; }}"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=list(numbers))


def e2m1x8_stochastic(*operands: Any) -> Any:
    """Eight float32, rounded by the random bits of two words and saturated at 6: as `e2m1x8`.

    In hardware on `conversions.STOCHASTIC` alone.
    """
    # The first of the four numbers ends in the upper bits.
    fours = [", ".join(f"{{$r{4 * i + j}}}" for j in (3, 2, 1, 0)) for i in range(2)]
    halves = " ".join(
        f"cvt.rs.satfinite.e2m1x4.f32 h{i}, {{{fours[i]}}}, {{$r{8 + i}}};" for i in range(2)
    )
    code = f"{{ .reg .b16 h0, h1; {halves} mov.b32 {{$w0}}, {{h0, h1}}; }}"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=list(operands))


def through_e2m1x2(low: Any, high: Any) -> Any:
    """Two float32, rounded to nearest even E2M1 and saturated at 6, as two float16.

    Two instructions, where `e2m1x8` is in hardware.
    """
    code = (
        "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, {$r1}, {$r0}; cvt.rn.f16x2.e2m1x2 {$w0}, t; }"
    )
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[low, high])


@conversions.emulated_unless(conversions.has_fp8)
def from_e4m3x2(a: Any) -> Any:
    """E4M3 bytes 0 and 1 as two float16."""
    code = "{ .reg .b16 t; cvt.u16.u32 t, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


# Threads


def lane() -> Any:
    """This thread's position in its warp."""
    return Uint32(arch.lane_idx())


def shuffle(a: Any, source: Any) -> Any:
    """The value that another lane has."""
    code = "shfl.sync.idx.b32 {$w0}, @, 0x1f, 0xffffffff;"
    return _emit(code, type(a), a, source)


def shuffle_xor(a: Any, distance: int) -> Any:
    """The value of the lane whose number differs in `distance`."""
    code = "shfl.sync.bfly.b32 {$w0}, @, 0x1f, 0xffffffff;"
    return _emit(code, type(a), a, distance)


def warp_max_u32(a: Any) -> Any:
    """The largest of a warp's unsigned integers, in every lane (sm_80 and up)."""
    return _emit("redux.sync.max.u32 {$w0}, @, 0xffffffff;", Uint32, a)


def popc(a: Any) -> Any:
    """Number of set bits."""
    return _emit("popc.b32 {$w0}, @;", Uint32, a)


def find_low(a: Any) -> Any:
    """Position of the lowest set bit."""
    code = "{ .reg .b32 t; brev.b32 t, {$r0}; bfind.shiftamt.u32 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


__all__ = [name for name in dir() if not name.startswith("_")]
