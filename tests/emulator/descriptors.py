"""Descriptors of tcgen05.mma and tcgen05.cp: shared-memory matrices and instructions.

Bits and canonical layouts are those of CUTLASS include/cute/arch/mma_sm100_desc.hpp
(`SmemDescriptor`, `InstrDescriptor`, `InstrDescriptorBlockScaled`, `make_umma_desc`); legal
shapes are the checks of CUTLASS include/cute/arch/mma_sm100_umma.hpp and of the DSL's
cute/nvgpu/tcgen05/mma.py. Reserved bits that are set, and fields whose effect is not modelled,
are refused by name. Addresses are byte offsets in the CTA's own shared memory (18 bits): a
descriptor holds no cluster rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tests.emulator import swizzle
from tests.emulator.errors import EmulatorError, Fault, UnsupportedError

# Bits 61-63 -> swizzle name. 1 (128 bytes of 32-byte atoms) exists but is not modelled.
LAYOUT_TYPES = {0: "none", 2: "128B", 4: "64B", 6: "32B"}
# 16-byte chunks of one row of the swizzle atom.
ATOM_CHUNKS = {"none": 1, "32B": 2, "64B": 4, "128B": 8}


@dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory: start and strides in bytes, and its swizzle."""

    start: int
    leading: int
    stride: int
    swizzle: str


@lru_cache(maxsize=4096)
def decode_shared(value: int) -> SharedDescriptor:
    """The 64-bit shared-memory matrix descriptor `value`."""
    reserved = {"bits 14-15": 14, "bits 30-31": 30}
    for name, shift in reserved.items():
        if (value >> shift) & 3:
            raise Fault("matrix descriptor", f"{value:#018x}: reserved {name} are set")
    if (value >> 46) & 7 != 1:
        bits = (value >> 46) & 7
        raise Fault("matrix descriptor", f"{value:#018x}: bits 46-48 are {bits:#05b}, need 0b001")
    if (value >> 49) & 7:
        raise UnsupportedError(f"matrix descriptor base offset {(value >> 49) & 7}: only 0")
    if (value >> 52) & 1:
        raise UnsupportedError("matrix descriptor leading-dimension mode 1 (sm_103): only 0")
    if (value >> 53) & 0xFF:
        raise Fault("matrix descriptor", f"{value:#018x}: reserved bits 53-60 are set")
    layout = value >> 61
    if layout == 1:
        raise UnsupportedError("matrix descriptor layout 1 (128B swizzle of 32B atoms)")
    if layout not in LAYOUT_TYPES:
        raise Fault("matrix descriptor", f"{value:#018x}: layout type {layout} does not exist")
    return SharedDescriptor(
        start=(value & 0x3FFF) << 4,
        leading=((value >> 16) & 0x3FFF) << 4,
        stride=((value >> 32) & 0x3FFF) << 4,
        swizzle=LAYOUT_TYPES[layout],
    )


# Bits 62-63 of a wgmma descriptor -> swizzle name (include/cute/arch/mma_sm90_desc.hpp).
WGMMA_LAYOUT_TYPES = {0: "none", 1: "128B", 2: "64B", 3: "32B"}


def decode_wgmma(value: int) -> SharedDescriptor:
    """The 64-bit matrix descriptor of sm_90 wgmma; its canonical layouts are the same."""
    if value & 0x3FF1_C000_C000_C000:
        raise Fault("matrix descriptor", f"{value:#018x}: reserved bits are set")
    if (value >> 49) & 7:
        raise UnsupportedError(f"matrix descriptor base offset {(value >> 49) & 7}: only 0")
    return SharedDescriptor(
        start=(value & 0x3FFF) << 4,
        leading=((value >> 16) & 0x3FFF) << 4,
        stride=((value >> 32) & 0x3FFF) << 4,
        swizzle=WGMMA_LAYOUT_TYPES[value >> 62],
    )


def encode_shared(descriptor: SharedDescriptor) -> int:
    """The 64 bits that `decode_shared` reads back as `descriptor`."""
    layout = {name: code for code, name in LAYOUT_TYPES.items()}[descriptor.swizzle]
    fields = (descriptor.start >> 4, descriptor.leading >> 4, descriptor.stride >> 4)
    return fields[0] | fields[1] << 16 | fields[2] << 32 | 1 << 46 | layout << 61


def operand_bytes(
    descriptor: SharedDescriptor, rows: int, row_bytes: int, *, element_bytes: int | None = None
) -> np.ndarray:
    """Shared byte address of every byte of an operand: int64 (rows, row_bytes), read only.

    Rows are M or N, `row_bytes` the bytes of one row's K extent: 32 for every dense MMA, 16 or 32
    for tcgen05.cp. K-major unless `element_bytes` names the element size of an MN-major operand.
    """
    return _operand(descriptor, rows, row_bytes, element_bytes)


@lru_cache(maxsize=1024)
def _operand(d: SharedDescriptor, rows: int, row_bytes: int, element: int | None) -> np.ndarray:
    if row_bytes not in (16, 32):
        raise UnsupportedError(f"operand rows of {row_bytes} bytes: 16 or 32 are modelled")
    linear = (
        _k_major(d, rows, row_bytes) if element is None else _mn_major(d, rows, row_bytes, element)
    )
    address = swizzle.apply(linear & 0x3FFFF, d.swizzle)
    address.flags.writeable = False
    return address


def _k_major(d: SharedDescriptor, rows: int, row_bytes: int) -> np.ndarray:
    """Layouts ((8,m),2):((W,SBO),1), without swizzle ((8,m),2):((1,SBO),LBO), in 16 bytes."""
    row = np.arange(rows, dtype=np.int64)[:, None]
    byte = np.arange(row_bytes, dtype=np.int64)[None, :]
    pitch = 16 * ATOM_CHUNKS[d.swizzle]
    chunk = d.leading if d.swizzle == "none" else 16
    return d.start + row // 8 * d.stride + row % 8 * pitch + byte // 16 * chunk + byte % 16


def _mn_major(d: SharedDescriptor, rows: int, row_bytes: int, element: int) -> np.ndarray:
    """Layouts ((W,n),(8,k)):((1,LBO),(W,SBO)), without swizzle ((1,n),(8,k)):((X,SBO),(1,LBO))."""
    if element not in (1, 2):
        raise UnsupportedError(f"MN-major operand of {element}-byte elements: 1 and 2 are modelled")
    row = np.arange(rows, dtype=np.int64)[:, None]
    byte = np.arange(row_bytes, dtype=np.int64)[None, :]
    chunk, k = row * element // 16, byte // element
    within = row * element % 16 + byte % element
    width = ATOM_CHUNKS[d.swizzle]
    along_mn, along_k = d.leading, d.stride
    if d.swizzle == "none":
        along_mn, along_k = d.stride, d.leading
    offset = chunk % width * 16 + chunk // width * along_mn
    return d.start + offset + k % 8 * width * 16 + k // 8 * along_k + within


# --- instruction descriptors -------------------------------------------------------------------

F8F6F4_FORMATS = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
# Kind -> (formats of A and B, K of one dense instruction).
KINDS = {
    "f16": ({0: "f16", 1: "bf16"}, 16),
    "tf32": ({2: "tf32"}, 8),
    "f8f6f4": (F8F6F4_FORMATS, 32),
    "mxf8f6f4": (F8F6F4_FORMATS, 32),
    "mxf4": ({1: "e2m1"}, 64),
    "mxf4nvf4": ({1: "e2m1"}, 64),
}
BLOCK_SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")
# Kind -> {scale factors per instruction: scale formats allowed} (PTX ISA, tcgen05.mma scale_vec).
SCALE_VECTORS = {
    "mxf8f6f4": {1: ("ue8m0",)},
    "mxf4": {2: ("ue8m0",)},
    "mxf4nvf4": {2: ("ue8m0",), 4: ("ue4m3", "ue8m0")},
}
# Elements that may be MN-major ("transposed").
TRANSPOSABLE = ("f16", "bf16", "tf32", "e4m3", "e5m2")


@dataclass(frozen=True)
class InstructionDescriptor:
    """What one tcgen05.mma computes. Fields of other kinds keep their defaults.

    `m` and `n` are the whole instruction's extents, over both CTAs of a pair with cta_group::2.
    """

    kind: str
    m: int
    n: int
    k: int
    a: str
    b: str
    d: str = "f32"
    scale: str | None = None
    a_scale_id: int = 0
    b_scale_id: int = 0
    a_negate: bool = False
    b_negate: bool = False
    a_mn_major: bool = False
    b_mn_major: bool = False


@lru_cache(maxsize=256)
def decode_instruction(
    value: int, kind: str, cta_group: int, scale_vector: int | None = None
) -> InstructionDescriptor:
    """The 32-bit instruction descriptor of `.kind::<kind>`, checked for `.cta_group::<cta_group>`.

    `scale_vector` is the instruction's `.scale_vec::<n>X` (4 for .block16 and 1 or 2 for .block32)
    and limits the scale formats and the byte ids.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"kind::{kind}: modelled are {', '.join(KINDS)}")
    if value & 7:
        raise UnsupportedError(f"instruction descriptor {value:#010x}: sparsity")
    formats, k = KINDS[kind]
    names = []
    for operand, shift in (("A", 7), ("B", 10)):
        code = (value >> shift) & 7
        if code not in formats:
            raise _illegal(value, f"{operand} format {code} of kind::{kind}")
        names.append(formats[code])
    fields = {
        "kind": kind,
        "m": ((value >> 24) & 31) << 4,
        "n": ((value >> 17) & 63) << 3,
        "k": k,
        "a": names[0],
        "b": names[1],
        "a_negate": bool((value >> 13) & 1),
        "b_negate": bool((value >> 14) & 1),
        "a_mn_major": bool((value >> 15) & 1),
        "b_mn_major": bool((value >> 16) & 1),
    }
    fields |= (_scaled if kind in BLOCK_SCALED else _unscaled)(value, kind, scale_vector)
    descriptor = InstructionDescriptor(**fields)
    _check_operands(value, descriptor)
    _check_shape(value, descriptor, cta_group)
    return descriptor


def _illegal(value: int, what: str) -> Fault:
    return Fault("instruction descriptor", f"{value:#010x}: {what} is not legal")


def _unscaled(value: int, kind: str, scale_vector: int | None) -> dict[str, object]:
    if scale_vector is not None:
        raise EmulatorError(f"kind::{kind} has no scale factors")
    reserved = {"saturate": (value >> 3) & 1, "bit 6": (value >> 6) & 1}
    reserved |= {"bit 23": (value >> 23) & 1, "bit 29": (value >> 29) & 1}
    for name, bit in reserved.items():
        if bit:
            raise _illegal(value, name)
    if value >> 30:
        raise UnsupportedError(f"instruction descriptor maximum shift {value >> 30} (.ws)")
    code = (value >> 4) & 3
    accumulators = {0: "f16", 1: "f32"}
    if code not in accumulators or (code == 0 and kind == "tf32"):
        raise _illegal(value, f"D format {code} of kind::{kind}")
    return {"d": accumulators[code]}


def _scaled(value: int, kind: str, scale_vector: int | None) -> dict[str, object]:
    for bit in (3, 6):
        if (value >> bit) & 1:
            raise _illegal(value, f"bit {bit}")
    if value >> 31:
        raise UnsupportedError("instruction descriptor K size 1 (K = 96, sm_103)")
    scale = ("ue4m3", "ue8m0")[(value >> 23) & 1]
    ids = {"a_scale_id": (value >> 29) & 3, "b_scale_id": (value >> 4) & 3}
    allowed = SCALE_VECTORS[kind]
    if scale_vector is None:
        scale_vector = min(allowed) if len(allowed) == 1 else 4
    if scale_vector not in allowed:
        raise _illegal(value, f".scale_vec::{scale_vector}X of kind::{kind}")
    if scale not in allowed[scale_vector]:
        raise _illegal(value, f"scale format {scale} of kind::{kind} scale_vec::{scale_vector}X")
    for name, number in ids.items():
        if number % scale_vector:
            raise _illegal(value, f"{name} {number} with scale_vec::{scale_vector}X")
    return {"scale": scale, **ids}


def _check_operands(value: int, d: InstructionDescriptor) -> None:
    for operand, name, mn_major in (("A", d.a, d.a_mn_major), ("B", d.b, d.b_mn_major)):
        if mn_major and (d.kind in ("mxf4", "mxf4nvf4") or name not in TRANSPOSABLE):
            raise _illegal(value, f"MN-major {operand} of {name} in kind::{d.kind}")
    if d.kind == "f16" and d.d == "f16" and "bf16" in (d.a, d.b):
        raise _illegal(value, "f16 accumulation of bf16")
    if d.kind == "f16" and d.a != d.b:
        raise UnsupportedError(f"instruction descriptor {value:#010x}: A {d.a} with B {d.b}")


def _check_shape(value: int, d: InstructionDescriptor, cta_group: int) -> None:
    """M and N of each cta_group; the step of N doubles for an MN-major 8-bit B."""
    if cta_group not in (1, 2):
        raise EmulatorError(f"cta_group {cta_group} is not 1 or 2")
    scaled = d.kind in BLOCK_SCALED
    legal_m = {1: (128,) if scaled else (64, 128), 2: (128, 256)}[cta_group]
    step = 8 * cta_group
    if d.b_mn_major and d.kind in ("f8f6f4", "mxf8f6f4"):
        step *= 2
    if d.m not in legal_m:
        raise _illegal(value, f"M {d.m} of kind::{d.kind} cta_group::{cta_group} ({legal_m})")
    if d.n % step or not step <= d.n <= 256:
        raise _illegal(value, f"N {d.n}: not {step} to 256 in steps of {step}")
