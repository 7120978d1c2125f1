"""tcgen05.mma: operands from shared and tensor memory, products, accumulators.

The sum over K of one instruction is formed exactly, in float64, added to the accumulator and
rounded once to f32. How hardware rounds inside is not published: results are to be compared within
an error budget (docs/emulator.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.emulator import descriptors, formats
from tests.emulator import tensor_memory_layout as layout
from tests.emulator.errors import Fault, UnsupportedError
from tests.emulator.isa.addresses import evaluate
from tests.emulator.isa.decoder import Decoder
from tests.emulator.isa.tensor_stream import cells, touch
from tests.emulator.machine.access import Actor, read_shared
from tests.emulator.machine.cluster import Cta
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Address, Vector

_KINDS = {"f16": 16, "mxf4nvf4": 4, "mxf4": 4, "f8f6f4": 8, "mxf8f6f4": 8}
"""Bits of an element in shared memory. tf32, i8 and others are refused."""
_VECTORS = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}
_BLOCKS = {"block16": 16, "block32": 32}
Run = Callable[[Warp, list[Cta], Actor], Callable[[], None]]


@dataclass(frozen=True)
class Form:
    """An instruction as written: slots of its operands."""

    kind: str
    group: int
    vector: int | None
    accumulator: Callable[[Warp], np.ndarray]
    a: int
    b: int
    shape: int
    scales: tuple[Callable[[Warp], np.ndarray], ...]
    enable: tuple[int, bool]
    disabled: tuple[int, ...]


def mma(decoder: Decoder, group: int) -> Run:
    """The instruction: given who issues it, checks it and returns what it does on completion."""
    if decoder.flag("sp") or decoder.flag("ws"):
        raise decoder.refuse("sparse and weight-stationary forms")
    kinds = [name.removeprefix("kind::") for name in decoder.left if name.startswith("kind::")]
    kind = kinds[0] if kinds else ""
    decoder.flag(f"kind::{kind}")
    if kind not in _KINDS:
        raise decoder.refuse(f"kind::{kind}")
    scaled = decoder.flag("block_scale")
    vector = _vector(decoder, kind) if scaled else None
    for name in list(decoder.left):
        if name.startswith("collector::a"):
            decoder.flag(name)
    operands = list(decoder.operands)
    if isinstance(operands[1], Address):
        raise decoder.refuse("A in tensor memory")
    vectors = [each for each in operands if isinstance(each, Vector)]
    disabled = tuple(decoder.source(item, 32) for each in vectors for item in each.items)
    decoder.count((7 if scaled else 5) + len(vectors))
    form = Form(
        kind, group, vector, evaluate(decoder, 0), decoder.source(1, 64), decoder.source(2, 64),
        decoder.source(3, 32),
        tuple(evaluate(decoder, i) for i in (4, 5)) if scaled else (),
        decoder.predicate(len(operands) - 1), disabled,
    )  # fmt: skip
    return lambda warp, ctas, who: _run(form, warp, ctas, who)


def _vector(decoder: Decoder, kind: str) -> int:
    """Scales an instruction takes along K, of an element of A or B."""
    named = decoder.choice(_VECTORS)
    block = decoder.choice(_BLOCKS)
    k = 32 if kind == "mxf8f6f4" else 64
    default = {"mxf8f6f4": 1, "mxf4": 2, "mxf4nvf4": 0}[kind]
    found = _VECTORS[named] if named else k // _BLOCKS[block] if block else default
    if not found:
        raise decoder.refuse("no scale vector size")
    return found


def _number(warp: Warp, slot: int, what: str) -> int:
    warp.require(slot, what)
    return int(warp.r[slot][warp.lanes][0])


def _run(form: Form, warp: Warp, ctas: list[Cta], who: Actor) -> Callable[[], None]:
    shape = descriptors.decode_instruction(
        _number(warp, form.shape, "the instruction descriptor"), form.kind, form.group, form.vector
    )
    if any(_number(warp, slot, "disable-output-lane") for slot in form.disabled):
        raise UnsupportedError("tcgen05.mma: disabling lanes of the output is not emulated")
    slot, negated = form.enable
    warp.require(slot, "enable-input-d")
    enabled = bool((warp.r[slot] & warp.mask) != 0) != negated
    a = _operand(warp, form.a, shape.m // len(ctas), shape.a_mn_major, _KINDS[form.kind])
    b = _operand(warp, form.b, shape.n // len(ctas), shape.b_mn_major, _KINDS[form.kind])
    for cta in ctas:
        for offsets in (a, b):
            read_shared(cta.shared, offsets, who, "tcgen05.mma")
    places = _accumulators(form, shape, int(form.accumulator(warp)[warp.lanes][0]), ctas)
    for cta, at in zip(ctas, places, strict=True):
        if enabled:
            touch(cta.tensor, at, who, "tcgen05.mma", write=False)
        touch(cta.tensor, at, who, "tcgen05.mma", write=True)
    scales = [
        _scale_cells(form, shape, int(each(warp)[warp.lanes][0]), side, ctas, who)
        for side, each in enumerate(form.scales)
    ]
    return lambda: _compute(form, shape, ctas, (a, b), places, scales, enabled)


def _operand(warp: Warp, slot: int, rows: int, mn_major: bool, bits: int) -> np.ndarray:
    """[rows, 32] offsets in shared memory of a CTA's part of A or B."""
    value = _number(warp, slot, "a matrix descriptor")
    element = bits // 8 if mn_major else None
    return descriptors.operand_bytes(
        descriptors.decode_shared(value), rows, 32, element_bytes=element
    )


def _accumulators(
    form: Form, shape: descriptors.InstructionDescriptor, address: int, ctas: list[Cta]
) -> list[np.ndarray]:
    """Cells of D in each CTA, [rows of the CTA, N]."""
    places = layout.accumulator(form.group, shape.m, shape.n)
    rows = shape.m // len(ctas)
    found = []
    for index, cta in enumerate(ctas):
        part = slice(index * rows, (index + 1) * rows)
        if (places.cta[part] != index).any():
            raise Fault("tcgen05.mma", "rows of an accumulator are not where they should be")
        found.append(cells(address, places.lane[part], places.column[part], cta.tensor))
    return found


def _scale_cells(
    form: Form, shape: descriptors.InstructionDescriptor, address: int, side: int,
    ctas: list[Cta], who: Actor,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Cells and bytes of scale factors in each CTA: its own rows of A, all columns of B."""
    rows = shape.m // len(ctas) if side == 0 else shape.n
    split = side == 1 and form.group == 2 and shape.m == 128
    id_ = shape.a_scale_id if side == 0 else shape.b_scale_id
    assert form.vector is not None
    # The top bits of the address say which byte; the instruction descriptor repeats them.
    if address >> 30 != id_:
        raise Fault(
            "scale factors", f"byte id {address >> 30} in the address, {id_} in the descriptor"
        )
    places = layout.scale_factors(rows, form.vector, id_, split=split)
    found = []
    for cta in ctas:
        at = cells(address & 0x3FFFFFFF, places.lane, places.column, cta.tensor)
        touch(cta.tensor, at, who, "tcgen05.mma", write=False)
        found.append((at, places.byte))
    return found


def _compute(
    form: Form, shape: descriptors.InstructionDescriptor, ctas: list[Cta],
    operands: tuple[np.ndarray, np.ndarray], places: list[np.ndarray],
    scales: list[list[tuple[np.ndarray, np.ndarray]]], enabled: bool,
) -> None:  # fmt: skip
    bits = _KINDS[form.kind]
    b_parts = [_numbers(cta, operands[1], shape.b, bits, "B") for cta in ctas]
    b = np.concatenate(b_parts) * (-1 if shape.b_negate else 1)
    for index, (cta, at) in enumerate(zip(ctas, places, strict=True)):
        a = _numbers(cta, operands[0], shape.a, bits, "A") * (-1 if shape.a_negate else 1)
        if form.vector is None:
            product = a @ b.T
        else:
            assert shape.scale is not None
            factors = [
                _factors(cta, *scales[side][index], shape.scale, "AB"[side]) for side in (0, 1)
            ]
            product = layout.block_scaled_product(a, factors[0], b, factors[1])
        _accumulate(cta, at, product, enabled, shape.d)


def _numbers(cta: Cta, offsets: np.ndarray, kind: str, bits: int, name: str) -> np.ndarray:
    """[rows, K] float64 from shared memory."""
    if not cta.shared.defined[offsets].all():
        row = int((~cta.shared.defined[offsets]).any(1).argmax())
        raise Fault("uninitialised", f"row {row} of {name} in {cta.name}")
    raw = np.ascontiguousarray(cta.shared.data[offsets])
    if bits == 4:
        codes = np.stack([raw & 0xF, raw >> 4], axis=2).reshape(len(raw), -1)
        return formats.to_f32(codes, kind).astype(np.float64)
    if bits == 8 and kind not in ("e4m3", "e5m2"):
        raise UnsupportedError(f"tcgen05.mma of {kind} in bytes")
    return formats.to_f32(raw.view(np.uint16) if bits == 16 else raw, kind).astype(np.float64)


def _factors(cta: Cta, at: np.ndarray, bytes_: np.ndarray, kind: str, name: str) -> np.ndarray:
    """[rows, blocks] float64 scale factors; their copies must agree."""
    if not cta.tensor.defined[at].all():
        raise Fault("uninitialised", f"scale factors of {name} in {cta.name}")
    raw = (cta.tensor.words[at] >> (8 * bytes_).astype(np.uint32) & 0xFF).astype(np.uint8)
    if (raw != raw[:1]).any():
        raise Fault("scale factors", f"copies of those of {name} differ in {cta.name}")
    if kind == "ue4m3" and (raw[0] & 0x80).any():
        raise Fault("scale factors", f"a negative one of {name} in {cta.name}: not UE4M3")
    return formats.to_f32(raw[0], kind).astype(np.float64)


def _accumulate(cta: Cta, at: np.ndarray, product: np.ndarray, enabled: bool, kind: str) -> None:
    if kind != "f32":
        raise UnsupportedError(f"tcgen05.mma with accumulators of {kind}")
    if enabled:
        if not cta.tensor.defined[at].all():
            raise Fault("uninitialised", f"accumulators in {cta.name}")
        product = product + cta.tensor.words[at].view(np.float32).astype(np.float64)
    cta.tensor.words[at] = formats.canonical_f32(product.astype(np.float32)).view(np.uint32)
    cta.tensor.defined[at] = True
