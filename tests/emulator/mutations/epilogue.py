"""Faults of the epilogue and of lifetimes: fences, groups of stores, bars, tensor memory."""

from __future__ import annotations

from dataclasses import replace

from tests.emulator.mutations.catalogue import ONE, PAIR, SQUARE, WIDE, WIDE_PAIR, mutant
from tests.emulator.mutations.roles import Gemm
from tests.emulator.ptx.syntax import Guard, Immediate

# Stores --------------------------------------------------


@mutant("missing proxy fence", "no fence.proxy.async before the store", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(*k.find("fence", "proxy", "async"))


@mutant("missing proxy fence", "only the storing warp fences, after the bar", ONE, WIDE)
def _(k: Gemm) -> None:
    fence = k.code[k.find("fence", "proxy", "async")[0]]
    k.drop(*k.find("fence", "proxy", "async"))
    for store in reversed(k.stores):
        k.insert(store, fence)


@mutant("missing bar", "no bar between writing and storing a tile", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.bars_of(k.stores[0])[0])


@mutant("missing bar", "no bar between storing a tile and writing the next", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    k.drop(k.bars_of(k.stores[-1])[1])


@mutant("missing bulk wait", "no wait before shared memory is written again", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(*k.find("cp", "wait_group", start=k.stores[0], stop=k.dealloc))


@mutant("missing bulk wait", "one more store may be under way than there is room", ONE, WIDE)
def _(k: Gemm) -> None:
    for index in k.find("cp", "wait_group", start=k.stores[0], stop=k.dealloc):
        k.immediate(index, lambda left: left + 1)


@mutant("missing bulk wait", "the CTA exits with stores that still read its memory", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.find("cp", "wait_group")[-1])


@mutant("missing commit_group", "stores are never committed", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(*k.find("cp", "commit_group"))


@mutant("off-by-one tile", "the output is stored a column on", ONE)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.stores[0], 0, 1)


@mutant("off-by-one tile", "the output is stored a row on", PAIR)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.stores[0], 1, 1)


@mutant("off-by-one tile", "the output is stored a tile on", WIDE)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.stores[0], 0, 32)


@mutant("wrong store", "stored from where the next part will be", ONE, PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.stores[0], 1, 128 * 64)


@mutant("wrong store", "stored with the prefetched map of A", ONE)
def _(k: Gemm) -> None:
    register = k.base_register(k.stores[0], 0)
    source = k.definition(register, k.stores[0])
    load = k.base_register(k.loads[0], 1)
    k.operand(source, 1, k.code[k.definition(load, k.loads[0])].operands[1])


@mutant("wrong epilogue", "halves of a register change places", ONE)
def _(k: Gemm) -> None:
    first = k.find("cvt", "bf16x2")[0]
    result, high, low = k.code[first].operands
    k.change(first, operands=(result, low, high))


@mutant("wrong epilogue", "a part is written without its swizzle", PAIR)
def _(k: Gemm) -> None:
    swizzled = k.find("xor", stop=k.reads[0])[-1]
    result, _, plain = k.code[swizzled].operands
    k.change(swizzled, opcode="mov", modifiers=("b32",), operands=(result, plain))


@mutant("wrong epilogue", "a warp reads lanes of another", ONE, PAIR)
def _(k: Gemm) -> None:
    shift = [i for i in k.find("shl", stop=k.reads[0]) if _literal(k, i) == 21][-1]
    k.immediate(shift, lambda bits: bits - 1)


@mutant("wrong accumulator", "the epilogue's second accumulator is half as far", ONE, PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.accumulator_shift(k.reads[0], 1), lambda bits: bits - 1)


@mutant("wrong accumulator", "the epilogue reads a column on", WIDE)
def _(k: Gemm) -> None:
    k.move_address(k.reads[0], 1, 1)


def _literal(k: Gemm, index: int) -> int | None:
    last = k.code[index].operands[-1]
    return last.value if isinstance(last, Immediate) else None


# Tensor memory --------------------------------------------------


@mutant("early dealloc", "tensor memory is freed after the first part is read", ONE, PAIR)
def _(k: Gemm) -> None:
    branch = k.find("bra", start=k.stores[0] - 9, stop=k.stores[0])[-1]
    guard = k.code[branch].guard
    assert guard is not None
    early = replace(k.code[k.dealloc], guard=Guard(guard.predicate, not guard.negated))
    columns = k.code[k.dealloc].operands[1]
    value = k.code[k.definition(columns, k.dealloc)].operands[1]
    early = replace(early, operands=(early.operands[0], value))
    k.drop(k.dealloc)
    k.insert(k.reads[0] + 1, early)


@mutant(
    "early dealloc", "no bar before dealloc", ONE, WIDE,
    survives="The bar after the last store comes after the last tcgen05.ld of every warp, so it "
    "orders their reads before dealloc already: this one is redundant.",
)  # fmt: skip
def _(k: Gemm) -> None:
    k.drop(k.find("bar", "sync", stop=k.dealloc)[-1])


@mutant("missing dealloc", "tensor memory is not freed", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.dealloc)


def columns(k: Gemm, count: int) -> None:
    """Allocate and free that many columns of tensor memory, not 512."""
    for index in (k.find("tcgen05", "alloc")[0], k.dealloc):
        k.operand(index, 1, Immediate(count))


@mutant("wrong alloc", "a quarter of the columns", ONE)
def _(k: Gemm) -> None:
    columns(k, 128)


@mutant("wrong alloc", "half of the columns", PAIR, WIDE)
def _(k: Gemm) -> None:
    columns(k, 256)


@mutant("wrong alloc", "48 columns", ONE)
def _(k: Gemm) -> None:
    k.operand(k.find("tcgen05", "alloc")[0], 1, Immediate(48))


@mutant("wrong alloc", "half of the columns are freed", PAIR)
def _(k: Gemm) -> None:
    k.operand(k.dealloc, 1, Immediate(256))


@mutant("wrong alloc", "the permit is given up before alloc", ONE, PAIR)
def _(k: Gemm) -> None:
    k.insert(k.find("tcgen05", "alloc")[0], k.code[k.find("tcgen05", "relinquish_alloc_permit")[0]])


@mutant(
    "missing relinquish", "the permit to alloc is not given up", ONE, PAIR,
    survives="Legal: the permit only matters to another CTA on the same SM that waits to allocate, "
    "and these kernels leave no room for one (all 512 columns, most of shared memory).",
)  # fmt: skip
def _(k: Gemm) -> None:
    k.drop(k.find("tcgen05", "relinquish_alloc_permit")[0])


@mutant("missing bar", "the tensor core's warp does not wait for the address of alloc", ONE, PAIR)
def _(k: Gemm) -> None:
    issue, store = k.bars_of_alloc()
    k.drop(issue)
    threads = k.code[store].operands[1]
    assert isinstance(threads, Immediate)
    k.operand(store, 1, Immediate(threads.value - 32))


# Clusters --------------------------------------------------


@mutant("missing cluster barrier", "no barrier after mbarriers are made", ONE, PAIR, SQUARE)
def _(k: Gemm) -> None:
    k.drop(*k.find("barrier", "cluster"))


@mutant("missing cluster barrier", "no wait at the cluster's barrier", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(*k.find("barrier", "cluster", "wait"))


@mutant("missing mbarrier fence", "no fence.mbarrier_init before a relaxed arrive", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(*k.find("fence", "mbarrier_init"))


@mutant("missing mbarrier", "an mbarrier is not made", ONE)
def _(k: Gemm) -> None:
    k.drop(k.inits()[0][-1])


@mutant("missing mbarrier", "two mbarriers at one place", PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.inits()[2][1], 0, -8)
