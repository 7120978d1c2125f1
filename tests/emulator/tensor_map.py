"""The 128-byte tensor map (CUtensorMap, tiled mode) that CuTe-DSL host code writes itself.

Bit positions and type codes were measured by running that host code and agree with
cute/arch/copy_sm90_desc.hpp; `tensormap.replace` of the PTX ISA numbers its types otherwise. Only
the first 64 bytes mean anything; the rest is whatever was on the stack. Every field whose meaning
was not observed is refused by name rather than guessed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from tests.emulator import swizzle
from tests.emulator.errors import EmulatorError, UnsupportedError

# Type code -> (name, bits of an element). Codes 3, 5, 8 and 13 were never observed.
TYPES = {
    0: ("u8", 8),
    1: ("u16", 16),
    2: ("u32", 32),
    4: ("u64", 64),
    6: ("f16", 16),
    7: ("f32", 32),
    9: ("f64", 64),
    10: ("bf16", 16),
    11: ("u4_align8", 4),
}
CODES = {name: code for code, (name, _) in TYPES.items()}
SWIZZLES = ("none", "32B", "64B", "128B")
VERSION = 2
MAX_RANK = 5


@dataclass(frozen=True)
class LoadPlan:
    """Which global byte each byte of a box comes from, or goes to.

    offset: int64 (box_bytes,), from the map's address, meaningless where not valid.
    valid: bool (box_bytes,), False outside the tensor (loads write 0, stores write nothing).
    Bytes are in dense shared-memory order, dimension 0 fastest.
    """

    offset: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map; tuples are innermost dimension first, `rank` long.

    `strides` is in bytes and starts with dimension 1: dimension 0 is contiguous.
    """

    address: int
    kind: str
    bits: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: str
    atom: str = "16B"
    interleave: str = "none"
    oob_fill: str = "zeros"
    l2_promotion: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rank(self) -> int:
        """Number of dimensions, 1 to 5."""
        return len(self.dims)

    @cached_property
    def box_bytes(self) -> int:
        """Bytes of a whole box: what an mbarrier's transaction count gets, clipped or not."""
        return int(np.prod(self.box, dtype=np.int64)) * self.bits // 8

    @cached_property
    def _box(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Offsets of the box at the origin (box_bytes,), and the steps of each dimension."""
        inner = self.box[0] * self.bits // 8
        offset = np.arange(inner, dtype=np.int64)
        for size, stride in zip(self.box[1:], self.strides, strict=True):
            steps = np.arange(size, dtype=np.int64) * stride
            offset = (steps[:, None] + offset[None, :]).reshape(-1)
        offset.flags.writeable = False
        steps = [np.arange(inner, dtype=np.int64) * 8 // self.bits]
        steps += [np.arange(size, dtype=np.int64) for size in self.box[1:]]
        return offset, steps

    @cached_property
    def _whole(self) -> np.ndarray:
        valid = np.ones(self.box_bytes, dtype=bool)
        valid.flags.writeable = False
        return valid

    def load_plan(self, coords: tuple[int, ...] | list[int]) -> LoadPlan:
        """The box whose first element is at `coords` (signed, innermost first, `rank` long)."""
        coords = tuple(int(c) for c in coords)
        if len(coords) != self.rank:
            raise EmulatorError(f"coordinates: {len(coords)} given, the map has rank {self.rank}")
        if coords[0] * self.bits % 8:
            raise UnsupportedError(
                f"coordinate 0: {coords[0]} starts inside a byte of {self.kind} elements"
            )
        offset, steps = self._box
        origin = coords[0] * self.bits // 8
        origin += sum(c * s for c, s in zip(coords[1:], self.strides, strict=True))
        inside = [0 <= c <= d - b for c, d, b in zip(coords, self.dims, self.box, strict=True)]
        if all(inside):
            return LoadPlan(offset + origin, self._whole)
        valid = np.ones(1, dtype=bool)
        for step, coord, dim in zip(steps, coords, self.dims, strict=True):
            ok = (step + coord >= 0) & (step + coord < dim)
            valid = (ok[:, None] & valid[None, :]).reshape(-1)
        return LoadPlan(offset + origin, valid)

    def shared_addresses(self, address: int) -> np.ndarray:
        """Shared byte address of every byte of a box put at `address`: int64 (box_bytes,)."""
        return _shared(int(address), self.box_bytes, self.swizzle)


@lru_cache(maxsize=256)
def _shared(address: int, size: int, mode: str) -> np.ndarray:
    result = swizzle.apply(np.arange(address, address + size, dtype=np.int64), mode)
    result.flags.writeable = False
    return result


def _check(m: TensorMap) -> None:
    """Raise unless the map obeys the driver's rules for tiled maps (cuTensorMapEncodeTiled)."""
    if not 1 <= m.rank <= MAX_RANK:
        raise EmulatorError(f"rank: {m.rank} is not 1 to {MAX_RANK}")
    if len(m.strides) != m.rank - 1 or len(m.box) != m.rank:
        raise EmulatorError(f"rank: {m.rank} dims, {len(m.strides)} strides, {len(m.box)} boxes")
    if m.address % 16:
        raise EmulatorError(f"address: {m.address:#x} is not a multiple of 16")
    for i, stride in enumerate(m.strides, 1):
        if stride % 16 or not 0 <= stride < 1 << 40:
            raise EmulatorError(f"stride {i}: {stride} is not a multiple of 16 below 2^40")
    for i, (dim, box) in enumerate(zip(m.dims, m.box, strict=True)):
        if not 1 <= dim <= 1 << 32:
            raise EmulatorError(f"dim {i}: {dim} is not 1 to 2^32")
        if not 1 <= box <= 256:
            raise EmulatorError(f"box {i}: {box} is not 1 to 256")
    if m.bits == 4 and (m.box[0] % 2 or m.dims[0] % 2):
        name = "box 0" if m.box[0] % 2 else "dim 0"
        raise UnsupportedError(f"{name}: an odd number of 4-bit elements ends inside a byte")
    inner = m.box[0] * m.bits // 8
    if inner % 16:
        raise EmulatorError(f"box 0: {inner} bytes are not a multiple of 16")
    if m.swizzle not in SWIZZLES:
        raise UnsupportedError(f"swizzle: {m.swizzle!r} is not one of {SWIZZLES}")
    if m.swizzle != "none" and inner > swizzle.SPAN[m.swizzle]:
        raise EmulatorError(f"box 0: {inner} bytes exceed the span of swizzle {m.swizzle}")
    if m.element_strides != (1,) * m.rank:
        raise UnsupportedError(f"element strides: {m.element_strides}, only 1 was observed")


def _refuse_unobserved(flags: int, words: tuple[int, ...]) -> None:
    """Raise for the fields of word 1 and the reserved bits that were only ever seen as 0."""
    refusals = {
        "interleave": (flags >> 11) & 3,
        "oob fill (NaN)": (flags >> 15) & 1,
        "tf32": (flags >> 16) & 1,
        "swizzle atom": (flags >> 19) & 3,
        "word 1 bits 22-31": (flags >> 22) & 0x3FF,
        "word 3 bits 48-63": words[3] >> 48,
        "word 6 bits 47-55": (words[6] >> 47) & 0x1FF,
        "word 7 bits 32-63": words[7] >> 32,
    }
    for name, value in refusals.items():
        if value:
            raise UnsupportedError(f"tensor map field {name} = {value:#x}: only 0 was observed")


def decode(raw: bytes) -> TensorMap:
    """The map in its 128 bytes (64 suffice: the second half is not read).

    Equal bytes give the same object, so that what a map caches about its box is computed once.
    """
    if len(raw) < 64:
        raise EmulatorError(f"tensor map: {len(raw)} bytes, needs 64 of its 128")
    return _decode(bytes(raw[:64]))


@lru_cache(maxsize=256)
def _decode(raw: bytes) -> TensorMap:
    words = struct.unpack("<8Q", raw)
    flags = words[1] & 0xFFFFFFFF
    if flags & 15 != VERSION:
        raise UnsupportedError(f"tensor map field version = {flags & 15}: only 2 was observed")
    _refuse_unobserved(flags, words)
    code = (flags >> 7) & 15
    if code not in TYPES:
        raise UnsupportedError(f"tensor map field type = {code}: observed are {sorted(TYPES)}")
    rank = ((flags >> 4) & 7) + 1
    if rank > MAX_RANK:
        raise EmulatorError(f"rank: {rank} is not 1 to {MAX_RANK}")
    low = (words[1] >> 32, words[2] & 0xFFFFFFFF, words[2] >> 32, words[3] & 0xFFFFFFFF)
    high = words[3] >> 32
    strides = [(low[i] | ((high >> (4 * i)) & 15) << 32) << 4 for i in range(4)]
    dims = [((words[4 + i // 2] >> (32 * (i % 2))) & 0xFFFFFFFF) + 1 for i in range(5)]
    steps = [((words[6] >> (32 + 3 * i)) & 7) + 1 for i in range(5)]
    kind, bits = TYPES[code]
    return TensorMap(
        address=words[0],
        kind=kind,
        bits=bits,
        dims=tuple(dims[:rank]),
        strides=tuple(strides[: rank - 1]),
        box=tuple(raw[55 + i] + 1 for i in range(rank)),
        element_strides=tuple(steps[:rank]),
        swizzle=SWIZZLES[(flags >> 13) & 3],
        l2_promotion=(flags >> 17) & 3,
    )


def encode(m: TensorMap) -> bytes:
    """The 128 bytes that `decode` reads back as `m` (tests; the real ones come from the host)."""
    pad = (1,) * (MAX_RANK - m.rank)
    dims = [d - 1 for d in m.dims + pad]
    box = [b - 1 for b in m.box + pad]
    strides = [s >> 4 for s in m.strides] + [0] * (MAX_RANK - m.rank)
    flags = VERSION | (m.rank - 1) << 4 | CODES[m.kind] << 7
    flags |= SWIZZLES.index(m.swizzle) << 13 | m.l2_promotion << 17
    high = sum((s >> 32) << (4 * i) for i, s in enumerate(strides))
    low = [s & 0xFFFFFFFF for s in strides]
    words = [
        m.address,
        flags | low[0] << 32,
        low[1] | low[2] << 32,
        low[3] | high << 32,
        dims[0] | dims[1] << 32,
        dims[2] | dims[3] << 32,
        dims[4] | box[0] << 56,
        box[1] | box[2] << 8 | box[3] << 16 | box[4] << 24,
    ]
    return struct.pack("<8Q", *words) + bytes(64)
