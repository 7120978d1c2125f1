"""Register fragments of warp-level matrix instructions: mma.sync, ldmatrix and stmatrix.

Places follow CUTLASS include/cute/atom/mma_traits_sm80.hpp, mma_traits_sm89.hpp and
mma_traits_sm120.hpp for mma.sync, copy_traits_sm75.hpp and copy_traits_sm90.hpp for the matrix
moves; they are the PTX ISA's figures of the same instructions. Registers are raw uint32 arrays of
shape (registers, 32 lanes). Products are summed in float64 and rounded once to f32: the order and
rounding inside a tensor core are not specified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tests.emulator import formats
from tests.emulator.errors import EmulatorError, Fault, UnsupportedError

# Shape -> element bits that it exists for here.
SHAPES = {
    "m16n8k8": (16, 32),
    "m16n8k16": (16,),
    "m16n8k32": (8,),
    "m16n8k64": (4,),
}
M, N = 16, 8


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Fragment:
    """Matrix coordinates of each element, int64 (registers, 32 lanes, elements a register).

    Element 0 is in the low bits. A is (row, k), B is (column, k), C and D are (row, column).
    """

    major: np.ndarray
    minor: np.ndarray


@lru_cache(maxsize=64)
def fragment(shape: str, operand: str, bits: int) -> Fragment:
    """Operand "A", "B" or "C" (also D) of mma.sync `shape`; `bits` is that operand's element."""
    if shape not in SHAPES:
        raise UnsupportedError(f"mma.sync {shape}: modelled are {', '.join(SHAPES)}")
    k = int(shape.split("k")[1])
    per = 32 // bits
    if operand == "C":
        if bits not in (16, 32):
            raise UnsupportedError(f"mma.sync {shape}: C of {bits} bits")
        return _accumulator(per)
    if operand not in ("A", "B") or bits not in SHAPES[shape]:
        raise UnsupportedError(f"mma.sync {shape}: operand {operand} of {bits} bits")
    extent = {"A": M, "B": N}[operand]
    count = extent * k // (32 * per)
    register, lane, element = np.meshgrid(
        np.arange(count), np.arange(32), np.arange(per), indexing="ij"
    )
    row, column = lane // 4, lane % 4 * per + element
    if operand == "A":
        return Fragment(
            _frozen(row + 8 * (register % 2)), _frozen(column + 4 * per * (register // 2))
        )
    return Fragment(_frozen(row), _frozen(column + 4 * per * register))


def _accumulator(per: int) -> Fragment:
    """SM80_16x8_Row: rows lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next."""
    register, lane, element = np.meshgrid(
        np.arange(4 // per), np.arange(32), np.arange(per), indexing="ij"
    )
    value = register * per + element
    return Fragment(_frozen(lane // 4 + 8 * (value // 2)), _frozen(lane % 4 * 2 + value % 2))


def elements(registers: np.ndarray, bits: int) -> np.ndarray:
    """Raw elements of registers: uint32 (registers, 32) -> uint32 (registers, 32, 32 / bits)."""
    if bits == 32:
        return registers[..., None]
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (registers[..., None] >> shifts) & np.uint32((1 << bits) - 1)


def gather(
    registers: np.ndarray, place: Fragment, bits: int, extent: tuple[int, int]
) -> np.ndarray:
    """The matrix of raw elements, uint32 `extent`, that the fragment `registers` holds."""
    matrix = np.empty(extent, dtype=np.uint32)
    matrix[place.major, place.minor] = elements(np.asarray(registers, dtype=np.uint32), bits)
    return matrix


_NARROW = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8, "ue4m3": 8, "ue8m0": 8}
"""Formats that are looked up, and their bits."""


@lru_cache(maxsize=len(_NARROW))
def _table(kind: str) -> np.ndarray:
    codes = np.arange(1 << _NARROW[kind], dtype=np.uint8)
    return _frozen(formats.to_f32(codes, kind).astype(np.float64))


def _decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """float64 values of raw elements of `kind`, as mma.sync reads them."""
    if kind in _NARROW:
        return _table(kind)[raw]
    if kind == "tf32":
        # The low 13 bits are not read.
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return raw.astype(np.uint8).view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return formats.to_f32(raw, kind).astype(np.float64)


_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def mma(
    shape: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, a_kind: str, b_kind: str
) -> np.ndarray:
    """D = A B + C of mma.sync `shape`.row.col, C and D f32 (or s32 for s8 and u8): (4, 32).

    a: uint32 (registers, 32), b: likewise, c: float32 or int32 (4, 32).
    """
    if a_kind not in _BITS or _BITS[a_kind] != _BITS.get(b_kind):
        raise UnsupportedError(f"mma.sync {shape} of {a_kind} and {b_kind}")
    bits = _BITS[a_kind]
    k = int(shape.split("k")[1])
    raw_a = gather(a, fragment(shape, "A", bits), bits, (M, k))
    raw_b = gather(b, fragment(shape, "B", bits), bits, (N, k))
    with np.errstate(invalid="ignore", over="ignore"):
        product = _decode(raw_a, a_kind) @ _decode(raw_b, b_kind).T
    place = fragment(shape, "C", 32)
    spread = product[place.major, place.minor][..., 0]
    if a_kind in ("s8", "u8"):
        return (spread.astype(np.int64) + c).astype(np.uint32).view(np.int32)
    return _rounded(spread + c.astype(np.float64))


def mma_f16(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str = "f16") -> np.ndarray:
    """D = A B + C of mma.sync.m16n8k16.f32.<kind>.<kind>.f32: a (4, 32), b (2, 32), c (4, 32)."""
    return mma("m16n8k16", a, b, c, kind, kind)


def _rounded(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return formats.canonical_f32(value.astype(np.float32))


# --- block scaling (sm_120) --------------------------------------------------------------------

# Kind -> (shape, bits of an element's container, {scale_vec: scale formats}).
BLOCK_SCALED = {
    "mxf4nvf4": ("m16n8k64", 4, {2: ("ue8m0",), 4: ("ue4m3", "ue8m0")}),
    "mxf4": ("m16n8k64", 4, {2: ("ue8m0",)}),
    "mxf8f6f4": ("m16n8k32", 8, {1: ("ue8m0",)}),
}
# Where a narrow element sits in its 8-bit container (mma_traits_sm120.hpp, fp4_shift_A).
CONTAINER_SHIFT = {"e2m1": 2, "e2m3": 0, "e3m2": 0, "e4m3": 0, "e5m2": 0}
CONTAINER_MASK = {"e2m1": 0xF, "e2m3": 0x3F, "e3m2": 0x3F, "e4m3": 0xFF, "e5m2": 0xFF}


@lru_cache(maxsize=64)
def scale_lanes(operand: str, thread_id: int) -> np.ndarray:
    """Lane whose scale register serves each row of A (16,) or column of B (8,).

    SFALayout: of the four lanes of a row, thread-id 0 picks lanes 0 (row g) and 1 (row g + 8),
    thread-id 1 lanes 2 and 3. SFBLayout: thread-id 0 to 3 picks the lane of column g.
    """
    if operand == "A":
        if thread_id not in (0, 1):
            raise Fault("scale selector", f"thread-id-a {thread_id} is not 0 or 1")
        row = np.arange(M)
        return _frozen(row % 8 * 4 + 2 * thread_id + row // 8)
    if thread_id not in (0, 1, 2, 3):
        raise Fault("scale selector", f"thread-id-b {thread_id} is not 0 to 3")
    return _frozen(np.arange(N) * 4 + thread_id)


def scales(
    register: np.ndarray, operand: str, byte_id: int, thread_id: int, vector: int
) -> np.ndarray:
    """Raw scale factors uint8 (16 or 8, vector) from the scale operand of 32 lanes."""
    if byte_id % vector or not 0 <= byte_id <= 3:
        raise Fault("scale selector", f"byte-id {byte_id} with scale_vec::{vector}X")
    word = np.asarray(register, dtype=np.uint32)[scale_lanes(operand, thread_id)]
    shifts = (8 * (byte_id + np.arange(vector))).astype(np.uint32)
    return ((word[:, None] >> shifts) & np.uint32(0xFF)).astype(np.uint8)


@dataclass(frozen=True)
class BlockScale:
    """Modifiers and immediate selectors of a block-scaled mma.sync."""

    kind: str = "mxf4nvf4"
    vector: int = 4
    a: str = "e2m1"
    b: str = "e2m1"
    scale: str = "ue4m3"
    a_byte: int = 0
    a_thread: int = 0
    b_byte: int = 0
    b_thread: int = 0


def mma_block_scale(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    sfa: np.ndarray,
    sfb: np.ndarray,
    options: BlockScale = BlockScale(),
) -> np.ndarray:
    """D = (A SFA) (B SFB) + C of mma.sync.kind::<kind>.block_scale, f32 (4, 32).

    a: uint32 (4, 32), b: uint32 (2, 32), c: float32 (4, 32), sfa and sfb: uint32 (32,).
    """
    if options.kind not in BLOCK_SCALED:
        raise UnsupportedError(f"mma.sync kind::{options.kind}")
    shape, bits, vectors = BLOCK_SCALED[options.kind]
    if options.scale not in vectors.get(options.vector, ()):
        raise EmulatorError(
            f"mma.sync kind::{options.kind}: {options.scale} with scale_vec::{options.vector}X"
        )
    k = int(shape.split("k")[1])
    scaled = []
    sides = (
        ("A", a, options.a, sfa, options.a_byte, options.a_thread, M),
        ("B", b, options.b, sfb, options.b_byte, options.b_thread, N),
    )
    for operand, registers, kind, selector, byte_id, thread_id, extent in sides:
        raw = gather(registers, fragment(shape, operand, bits), bits, (extent, k))
        if bits == 8:
            raw = (raw >> CONTAINER_SHIFT[kind]) & CONTAINER_MASK[kind]
        elif kind != "e2m1":
            raise EmulatorError(f"mma.sync kind::{options.kind}: {operand} is {kind}, not e2m1")
        factors = scales(selector, operand, byte_id, thread_id, options.vector)
        factors = np.repeat(_decode(factors, options.scale), k // options.vector, axis=1)
        scaled.append(_decode(raw, kind) * factors)
    place = fragment(shape, "C", 32)
    with np.errstate(invalid="ignore", over="ignore"):
        product = scaled[0] @ scaled[1].T
    return _rounded(product[place.major, place.minor][..., 0] + c.astype(np.float64))


# --- ldmatrix and stmatrix ---------------------------------------------------------------------


@lru_cache(maxsize=16)
def matrix_move(count: int, *, trans: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """ldmatrix / stmatrix .m8n8.x<count>.b16: (address lane, byte) of each half register.

    Two int64 arrays (count, 32 lanes, 2 halves): the half in register j of a lane is the 16-bit
    element `byte` bytes past the row address that lane `address lane` supplies.
    """
    if count not in (1, 2, 4):
        raise UnsupportedError(f"ldmatrix/stmatrix .x{count}: x1, x2 and x4 exist")
    matrix, lane, half = np.meshgrid(np.arange(count), np.arange(32), np.arange(2), indexing="ij")
    row, column = lane // 4, lane % 4 * 2 + half
    if trans:
        row, column = column, row
    return _frozen(8 * matrix + row), _frozen(2 * column)
