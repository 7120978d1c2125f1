"""PTX instructions on shared memory, and its 32-bit addresses.

Inline PTX keeps its order among barriers, so these are as good as what the DSL emits, and they
take addresses that a swizzle computed.
"""

from typing import Any

from cutlass import Uint32
from cutlass.cute import arch


def address_of(pointer: Any) -> Any:
    """Address of a pointer into shared memory as Uint32."""
    return Uint32(pointer.toint())


def copy_async_16(to: Any, source: Any) -> None:
    """Copy 16 aligned bytes of global memory (sm_80 and up)."""
    code = "cp.async.cg.shared.global [{$r0}], [{$r1}], 16;"
    arch.inline_ptx(code, read_only_args=[to, source])


def copy_async_16_or_zero(to: Any, source: Any, wanted: Any) -> None:
    """Copy 16 aligned bytes of global memory, or zeros unless `wanted` (sm_80 and up)."""
    code = (
        "{ .reg .pred p; .reg .b32 n; setp.ne.u32 p, {$r2}, 0; selp.b32 n, 16, 0, p; "
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, n; }"
    )
    arch.inline_ptx(code, read_only_args=[to, source, wanted])


def wait_copies() -> None:
    """Wait for all of this thread's asynchronous copies."""
    arch.inline_ptx("cp.async.wait_all;")


def load_v4(address: Any) -> tuple[Any, ...]:
    """16 aligned bytes."""
    code = "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return arch.inline_ptx(code, write_only_types=[Uint32] * 4, read_only_args=[address])


def load_v2(address: Any) -> tuple[Any, ...]:
    """8 aligned bytes."""
    code = "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    return arch.inline_ptx(code, write_only_types=[Uint32] * 2, read_only_args=[address])


def load_b32(address: Any) -> Any:
    """4 aligned bytes."""
    code = "ld.shared.b32 {$w0}, [{$r0}];"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[address])


def load_u8(address: Any) -> Any:
    """A byte."""
    return arch.inline_ptx(
        "ld.shared.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address]
    )


def load_u16(address: Any) -> Any:
    """2 aligned bytes."""
    code = "{ .reg .b16 t; ld.shared.b16 t, [{$r0}]; cvt.u32.u16 {$w0}, t; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[address])


def store_v4(address: Any, words: list[Any]) -> None:
    """16 bytes to an aligned address."""
    code = "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    arch.inline_ptx(code, read_only_args=[address, *words])


def store_v2(address: Any, a: Any, b: Any) -> None:
    """8 bytes to an aligned address."""
    arch.inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, a, b])


def store_b32(address: Any, a: Any) -> None:
    """4 bytes to an aligned address."""
    arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, a])


def store_u16(address: Any, a: Any) -> None:
    """The low half of a register."""
    code = "{ .reg .b16 t; cvt.u16.u32 t, {$r1}; st.shared.b16 [{$r0}], t; }"
    arch.inline_ptx(code, read_only_args=[address, a])


def store_u8(address: Any, a: Any) -> None:
    """The low byte of a register."""
    code = "{ .reg .b16 t; cvt.u16.u32 t, {$r1}; st.shared.b8 [{$r0}], t; }"
    arch.inline_ptx(code, read_only_args=[address, a])


def atomic_add(address: Any, a: Any) -> Any:
    """Add to a 32-bit integer of this CTA; what was there before."""
    code = "atom.shared.add.u32 {$w0}, [{$r0}], {$r1};"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[address, a])
