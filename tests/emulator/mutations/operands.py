"""Faults of what the tensor core is told: descriptors, shapes, scale factors, accumulation."""

from __future__ import annotations

from dataclasses import replace

from tests.emulator.mutations.catalogue import ONE, PAIR, WIDE, WIDE_PAIR, mutant
from tests.emulator.mutations.roles import Gemm
from tests.emulator.ptx.syntax import Immediate

A, B = 1, 2
STRIDE, LEADING, VERSION, LAYOUT = 32, 16, 46, 61
"""Where fields of a matrix descriptor start."""

# Matrix descriptors --------------------------------------------------


def descriptor(k: Gemm, operand: int, change) -> None:
    """Change the descriptor of A or B in all products."""
    k.immediate(k.descriptor_base(operand), change)


@mutant("wrong descriptor start", "A starts a row late", ONE, PAIR)
def _(k: Gemm) -> None:
    descriptor(k, A, lambda bits: bits | 128 >> 4)


@mutant("wrong descriptor start", "B starts 32 bytes late", WIDE)
def _(k: Gemm) -> None:
    descriptor(k, B, lambda bits: bits | 32 >> 4)


@mutant("wrong descriptor start", "stages of A are half as far apart", ONE)
def _(k: Gemm) -> None:
    shift = k.definition(k.code[k.stage_of(A)].operands[1], k.stage_of(A))
    k.immediate(shift, lambda bits: bits - 1)


@mutant("wrong descriptor start", "stages of B are twice as far apart", PAIR)
def _(k: Gemm) -> None:
    shift = k.definition(k.code[k.stage_of(B)].operands[1], k.stage_of(B))
    k.immediate(shift, lambda bits: bits + 1)


@mutant("wrong descriptor stride", "groups of rows of A are half as far apart", ONE, PAIR)
def _(k: Gemm) -> None:
    descriptor(k, A, lambda bits: bits & ~(0x3FFF << STRIDE) | 512 >> 4 << STRIDE)


@mutant("wrong descriptor stride", "groups of rows of B are twice as far apart", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    descriptor(k, B, lambda bits: bits & ~(0x3FFF << STRIDE) | 2048 >> 4 << STRIDE)


@mutant("wrong descriptor swizzle", "A is read with a swizzle of 64 bytes", ONE, PAIR)
def _(k: Gemm) -> None:
    descriptor(k, A, lambda bits: bits & ~(7 << LAYOUT) | 4 << LAYOUT)


@mutant("wrong descriptor swizzle", "B is read without a swizzle", ONE)
def _(k: Gemm) -> None:
    descriptor(k, B, lambda bits: bits & ~(7 << LAYOUT))


@mutant("wrong descriptor swizzle", "a swizzle that does not exist", ONE)
def _(k: Gemm) -> None:
    descriptor(k, A, lambda bits: bits | 7 << LAYOUT)


@mutant("wrong descriptor version", "the descriptor of another architecture", ONE)
def _(k: Gemm) -> None:
    descriptor(k, A, lambda bits: bits & ~(1 << VERSION))


@mutant(
    "wrong descriptor leading offset", "a leading offset of B, which is swizzled", ONE,
    survives="Swizzled K-major operands have no leading offset: hardware ignores the field "
    "(PTX ISA, leading-dimension byte offset), so the kernel is as right as before.",
)  # fmt: skip
def _(k: Gemm) -> None:
    descriptor(k, B, lambda bits: bits & ~(0x3FFF << LEADING) | 64 << LEADING)


@mutant("wrong K advance", "the second K step reads A of the first", ONE, PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.low_word(k.mmas[1], A), lambda by: 0)


@mutant("wrong K advance", "the third K step reads B 32 bytes on", WIDE_PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.low_word(k.mmas[2], B), lambda by: by + 2)


@mutant("swapped operands", "the descriptors of A and B change places", ONE, PAIR)
def _(k: Gemm) -> None:
    _, a, b, *_ = k.code[k.mmas[0]].operands
    k.operand(k.mmas[0], A, b)
    k.operand(k.mmas[0], B, a)


# Instruction descriptors --------------------------------------------------


@mutant("negate flag", "A is negated", ONE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits ^ 1 << 13)


@mutant("negate flag", "B is negated", PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits ^ 1 << 14)


@mutant("wrong shape", "N is 8 less", ONE, WIDE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits - (1 << 17))


@mutant("wrong shape", "N is 16 more", PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits + (2 << 17))


@mutant("wrong shape", "N is not a multiple of 16", WIDE_PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits - (1 << 17))


@mutant("wrong shape", "M is 64", ONE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits - (4 << 24))


@mutant("wrong shape", "M is 128 of a pair's 256", PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits - (8 << 24))


@mutant("wrong format", "scale factors are UE8M0", ONE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits | 1 << 23)


@mutant("wrong format", "A's format is reserved", ONE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits ^ 3 << 7)


@mutant("wrong format", "K is that of sm_103", PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits | 1 << 31)


@mutant("scale byte id", "the descriptor says byte 2 of A's scales", ONE, PAIR)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits | 2 << 29)


@mutant("scale byte id", "descriptor and address say byte 2 of B's scales", ONE)
def _(k: Gemm) -> None:
    k.change_shape(lambda bits: bits | 2 << 4)
    for mma in k.mmas:
        k.move_address(mma, 5, 2 << 30)


# Scale factors --------------------------------------------------


@mutant("wrong scale column", "scales of A four columns on", ONE, PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.mmas[0], 4, 4)


@mutant("wrong scale column", "scales of B four columns back", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.mmas[1], 5, -4)


@mutant("wrong scale column", "scales of A and B change places", PAIR)
def _(k: Gemm) -> None:
    operands = k.code[k.mmas[0]].operands
    k.operand(k.mmas[0], 4, operands[5])
    k.operand(k.mmas[0], 5, operands[4])


@mutant("missing scale shift", "odd tiles take B's scales of even ones", ONE, WIDE)
def _(k: Gemm) -> None:
    at = k.definition(k.base_register(k.mmas[0], 5), k.mmas[0])
    # The tile's shift plus the columns' start.
    k.operand(at, 1, Immediate(0))


@mutant("scale copy", "the first copy of A's scales is dropped", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.scale_copies[0])


@mutant("scale copy", "the last copy of B's scales is dropped", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    k.drop(k.scale_copies[-1])


@mutant("scale copy", "the second copy of A's scales takes the first", ONE, PAIR)
def _(k: Gemm) -> None:
    first = k.code[k.scale_copies[0]].operands[1]
    k.operand(k.scale_copies[1], 1, first)


@mutant("scale copy", "the second copy of A's scales goes where the first went", WIDE)
def _(k: Gemm) -> None:
    first = k.code[k.scale_copies[0]].operands[0]
    k.operand(k.scale_copies[1], 0, first)


@mutant("scale copy", "the first copy of A's scales comes after its product", ONE, PAIR)
def _(k: Gemm) -> None:
    copy = k.code[k.scale_copies[0]]
    k.drop(k.scale_copies[0])
    k.insert(k.mmas[0] + 1, copy)


@mutant("scale copy", "groups of rows of the copied scales are twice as far apart", ONE)
def _(k: Gemm) -> None:
    k.immediate(
        k.copy_descriptor_base(k.scale_copies[0]),
        lambda bits: bits & ~(0x3FFF << STRIDE) | 256 >> 4 << STRIDE,
    )


@mutant("scale copy", "the copied scales are taken as swizzled", ONE, PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.copy_descriptor_base(k.scale_copies[0]), lambda bits: bits | 6 << LAYOUT)


@mutant("scale copy", "scales are not multicast to all lanes", ONE)
def _(k: Gemm) -> None:
    k.change(k.scale_copies[0], modifiers=("cp", "cta_group::1", "4x256b"))


# Accumulation --------------------------------------------------


@mutant("accumulation", "the first product adds to what was there", ONE, PAIR)
def _(k: Gemm) -> None:
    compare = k.definition(k.code[k.mmas[0]].operands[6], k.mmas[0])
    k.operand(compare, 2, Immediate(-12345))


@mutant("accumulation", "the second K step starts again", ONE, PAIR)
def _(k: Gemm) -> None:
    move = k.definition(k.code[k.mmas[1]].operands[6], k.mmas[1])
    k.operand(move, 1, Immediate(0))


@mutant("accumulation", "the first product of each stage starts again", WIDE)
def _(k: Gemm) -> None:
    compare = k.definition(k.code[k.mmas[0]].operands[6], k.mmas[0])
    k.change(compare, modifiers=("ne", "b32"))
    k.operand(compare, 2, k.code[compare].operands[1])


@mutant("accumulation", "a K step is left out", ONE)
def _(k: Gemm) -> None:
    k.drop(k.mmas[3])


@mutant("accumulation", "a K step goes to the other accumulator", PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.mmas[2], 0, 128)


@mutant("wrong accumulator", "the tensor core's second accumulator starts in the first", ONE, PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.accumulator_shift(k.mmas[0], 0), lambda bits: bits - 1)


@mutant("cta_group", "a product of one CTA in a kernel of pairs", PAIR)
def _(k: Gemm) -> None:
    mma = k.code[k.mmas[0]]
    names = tuple("cta_group::1" if n == "cta_group::2" else n for n in mma.modifiers)
    k.change(k.mmas[0], modifiers=names)


@mutant("cta_group", "both CTAs of a pair issue", PAIR)
def _(k: Gemm) -> None:
    (branch,) = [
        i for i in k.find("bra", start=k.finished - 9, stop=k.finished)
        if k.code[i].guard and k.code[i].operands[0].index > k.finished
    ][:1]  # fmt: skip
    k.change(branch, guard=replace(k.code[branch].guard, negated=True))
