"""PTX instructions on global memory, predicated by a value; kernels call them through `ptx`."""

from typing import Any

from cutlass import Float32, Uint32
from cutlass.cute import arch

from fos_compile.kernels.cute.registers import register


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
        code, write_only_types=[Uint32] * 4, read_only_args=[address, register(wanted)]
    )


def load_b32(address: Any, wanted: Any) -> Any:
    """32 bits of global memory, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; "
        "@p ld.global.b32 {$w0}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, register(wanted)]
    )


def load_b16(address: Any, wanted: Any) -> Any:
    """16 bits of global memory in the low half of a register, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r1}, 0; mov.b16 t, 0; "
        "@p ld.global.b16 t, [{$r0}]; cvt.u32.u16 {$w0}, t; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, register(wanted)]
    )


def load_v2(address: Any, wanted: Any = 1) -> tuple[Any, Any]:
    """8 aligned bytes of global memory, or zeros unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; "
        "@p ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32, Uint32], read_only_args=[address, register(wanted)]
    )


def load_u8(address: Any, wanted: Any) -> Any:
    """A byte of global memory, or 0 unless `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r1}, 0; mov.b32 {$w0}, 0; "
        "@p ld.global.u8 {$w0}, [{$r0}]; }"
    )
    return arch.inline_ptx(
        code, write_only_types=[Uint32], read_only_args=[address, register(wanted)]
    )


def load_f32(address: Any) -> Any:
    """A float32 of global memory."""
    return arch.inline_ptx(
        "ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address]
    )


def store_v2(address: Any, a: Any, b: Any, wanted: Any) -> None:
    """8 bytes to aligned global memory, if `wanted`."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r3}, 0; @p st.global.v2.b32 [{$r0}], {{$r1}, {$r2}}; }"
    arch.inline_ptx(code, read_only_args=[address, *map(register, (a, b, wanted))])


def store_v4(address: Any, words: list[Any], wanted: Any) -> None:
    """16 bytes to aligned global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; setp.ne.u32 p, {$r5}, 0; "
        "@p st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *words, register(wanted)])


def store_b32(address: Any, a: Any, wanted: Any) -> None:
    """4 bytes to aligned global memory, if `wanted`."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r2}, 0; @p st.global.b32 [{$r0}], {$r1}; }"
    arch.inline_ptx(code, read_only_args=[address, a, register(wanted)])


def store_b16(address: Any, a: Any, wanted: Any) -> None:
    """The low half of a register to global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r2}, 0; cvt.u16.u32 t, {$r1}; "
        "@p st.global.b16 [{$r0}], t; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *map(register, (a, wanted))])


def store_u8(address: Any, a: Any, wanted: Any) -> None:
    """The low byte of a register to global memory, if `wanted`."""
    code = (
        "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, {$r2}, 0; cvt.u16.u32 t, {$r1}; "
        "@p st.global.b8 [{$r0}], t; }"
    )
    arch.inline_ptx(code, read_only_args=[address, *map(register, (a, wanted))])


def atomic_add_u32(address: Any, a: Any) -> None:
    """Add to a 32-bit integer in global memory."""
    arch.inline_ptx("red.global.add.u32 [{$r0}], {$r1};", read_only_args=[address, a])


def atomic_max_u32(address: Any, a: Any) -> None:
    """Raise a 32-bit unsigned integer in global memory to at least `a`."""
    arch.inline_ptx("red.global.max.u32 [{$r0}], {$r1};", read_only_args=[address, a])
