"""The PTX instructions that the quantize kernels are made of, one function an instruction.

Every function takes and returns DSL scalars. Kernels call them through this module
(``ptx.fma(...)``), so that tests can put a numpy model in its place and run the arithmetic of a
kernel on a CPU. Rounding is always explicit: a PTX ``mul`` or ``add`` without ``.rn`` may be
contracted into a multiply-add.
"""

from typing import Any

from cutlass import Float32, Uint32
from cutlass.cute import arch


def _emit(code: str, result: Any, *operands: Any) -> Any:
    names = ", ".join(f"{{$r{i}}}" for i in range(len(operands)))
    operands_ = [_register(each) for each in operands]
    text = code.replace("@", names)
    return arch.inline_ptx(text, write_only_types=[result], read_only_args=operands_)


def _register(operand: Any) -> Any:
    if isinstance(operand, int):
        return u32(operand)
    return Float32(operand) if isinstance(operand, float) else operand


def u32(value: int) -> Any:
    """A constant in a register.

    Packed instructions take no immediates in PTX, and a bare int above 2^31 would make an
    expression 64 bits wide. The assembler folds the move.
    """
    return arch.inline_ptx(f"mov.b32 {{$w0}}, {value:#x};", write_only_types=[Uint32])


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


# Two 16-bit integers in a 32-bit register (sm_90 and up)


def max_u16x2(a: Any, b: Any) -> Any:
    """The larger of each half; orders the patterns of non-negative float16 or bfloat16."""
    return _emit("max.u16x2 {$w0}, @;", Uint32, a, b)


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


def clear_negative_zeros_bf16x2(a: Any) -> Any:
    """a + 0 of each half: -0 becomes +0, every other number stays (sm_90 and up)."""
    code = "{ .reg .b32 z; mov.b32 z, 0; add.rn.bf16x2 {$w0}, {$r0}, z; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


def where_less(a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b (float32), else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.lt.f32 p, {$r0}, {$r1}; selp.b32 {$w0}, {$r2}, {$r3}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(_register, (a, b, yes, no))]
    )


def where_nonzero(a: Any, yes: Any, no: Any) -> Any:
    """yes where a is not 0, else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(_register, (a, yes, no))]
    )


def where_below(a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b (unsigned), else no (32-bit integers)."""
    code = "{ .reg .pred p; setp.lo.u32 p, {$r0}, {$r1}; selp.b32 {$w0}, {$r2}, {$r3}, p; }"
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[*map(_register, (a, b, yes, no))]
    )


def prmt(a: Any, b: Any, selector: int) -> Any:
    """Four of the eight bytes of (a, b), lowest nibble of the selector first."""
    return _emit("prmt.b32 {$w0}, @;", Uint32, a, b, selector)


# E4M3 (sm_89 and up)


def e4m3x2(low: Any, high: Any) -> Any:
    """Two float32, rounded to nearest even E4M3 and saturated at 448: bytes 0 and 1."""
    code = "{ .reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, {$r1}, {$r0}; cvt.u32.u16 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[low, high])


def e5m2x4(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four float32, rounded to nearest even E5M2 and saturated: bytes 0 to 3 (sm_89 and up)."""
    code = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.e5m2x2.f32 l, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e5m2x2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }"
    )
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, c, d])


def from_e4m3x2(a: Any) -> Any:
    """E4M3 bytes 0 and 1 as two float16."""
    code = "{ .reg .b16 t; cvt.u16.u32 t, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


# Memory


def load_stream_v4(address: Any, wanted: Any) -> tuple[Any, ...]:
    """16 aligned bytes of global memory, or zeros unless `wanted`.

    Evicted first from L1, where the other half of a 32-byte sector is taken next; not allocating
    it there took the same time on an H100.
    """
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; "
        "mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0; "
        "@p ld.global.L1::evict_first.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32] * 4, read_only_args=[address, _register(wanted)]
    )


def load_b32(address: Any, wanted: Any) -> Any:
    """32 bits of global memory, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; "
        "@p ld.global.b32 {$w0}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, _register(wanted)]
    )


def load_b16(address: Any, wanted: Any) -> Any:
    """16 bits of global memory in the low half of a register, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r1}, 0; mov.b16 t, 0; "
        "@p ld.global.b16 t, [{$r0}]; cvt.u32.u16 {$w0}, t; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, _register(wanted)]
    )


def load_v2(address: Any, wanted: Any = 1) -> tuple[Any, Any]:
    """8 aligned bytes of global memory, or zeros unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; "
        "@p ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32, Uint32], read_only_args=[address, _register(wanted)]
    )


def load_u8(address: Any, wanted: Any) -> Any:
    """A byte of global memory, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; "
        "@p ld.global.u8 {$w0}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, _register(wanted)]
    )


def load_f32(address: Any) -> Any:
    """A float32 of global memory."""
    return _emit("ld.global.f32 {$w0}, [@];", Float32, address)


def store_v2(address: Any, a: Any, b: Any, wanted: Any) -> None:
    """8 bytes to aligned global memory, if `wanted`."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r3}, 0; @p st.global.v2.b32 [{$r0}], {{$r1}, {$r2}}; }"
    arch.inline_ptx(code, read_only_args=[address, *map(_register, (a, b, wanted))])


def store_v4(address: Any, words: list[Any], wanted: Any) -> None:
    """16 bytes to aligned global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r5}, 0; "
        "@p st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *words, _register(wanted)])


def store_b32(address: Any, a: Any, wanted: Any) -> None:
    """4 bytes to aligned global memory, if `wanted`."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r2}, 0; @p st.global.b32 [{$r0}], {$r1}; }"
    arch.inline_ptx(code, read_only_args=[address, a, _register(wanted)])


def store_b16(address: Any, a: Any, wanted: Any) -> None:
    """The low half of a register to global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r2}, 0; cvt.u16.u32 t, {$r1}; "
        "@p st.global.b16 [{$r0}], t; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *map(_register, (a, wanted))])


def store_u8(address: Any, a: Any, wanted: Any) -> None:
    """The low byte of a register to global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r2}, 0; cvt.u16.u32 t, {$r1}; "
        "@p st.global.b8 [{$r0}], t; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *map(_register, (a, wanted))])


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


def atomic_add_u32(address: Any, a: Any) -> None:
    """Add to a 32-bit integer in global memory."""
    arch.inline_ptx("red.global.add.u32 [{$r0}], {$r1};", read_only_args=[address, a])


def atomic_max_u32(address: Any, a: Any) -> None:
    """Raise a 32-bit unsigned integer in global memory to at least `a`."""
    arch.inline_ptx("red.global.max.u32 [{$r0}], {$r1};", read_only_args=[address, a])


def popc(a: Any) -> Any:
    """Number of set bits."""
    return _emit("popc.b32 {$w0}, @;", Uint32, a)


def find_low(a: Any) -> Any:
    """Position of the lowest set bit."""
    code = "{ .reg .b32 t; brev.b32 t, {$r0}; bfind.shiftamt.u32 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])


__all__ = [name for name in dir() if not name.startswith("_")]
