"""Faults of pipelines: waits, parities, arrivals, commits, counts."""

from __future__ import annotations

from tests.emulator.mutations.catalogue import ONE, PAIR, SQUARE, WIDE, WIDE_PAIR, mutant
from tests.emulator.mutations.editing import instruction
from tests.emulator.mutations.roles import Gemm
from tests.emulator.ptx.syntax import Immediate, Instruction, Register, Special

# Dropped waits --------------------------------------------------


def no_wait(k: Gemm, wait: int) -> None:
    """Go on at once: the loop and the look-ahead before it."""
    if k.is_skipped(wait):
        for index in k.look_ahead(wait):
            true = instruction("mov.pred", k.code[index].operands[0], Immediate(-1))
            k.change(index, opcode="mov", modifiers=("pred",), operands=true.operands)
    k.drop(wait)
    k.change(wait + 1, guard=None)


@mutant("dropped wait", "tensor core does not wait for operands", ONE, PAIR)
def _(k: Gemm) -> None:
    no_wait(k, k.wait_full)


@mutant("dropped wait", "producer does not wait for free stages", ONE, WIDE, PAIR)
def _(k: Gemm) -> None:
    no_wait(k, k.wait_empty)


@mutant("dropped wait", "epilogue does not wait for accumulators", ONE, PAIR)
def _(k: Gemm) -> None:
    no_wait(k, k.wait_finished)


@mutant("dropped wait", "tensor core does not wait for free accumulators", ONE, PAIR, WIDE)
def _(k: Gemm) -> None:
    no_wait(k, k.wait_returned)


@mutant("dropped wait", "operands are waited for once, without a loop", ONE, PAIR)
def _(k: Gemm) -> None:
    k.change(k.wait_full + 1, guard=None)


@mutant("dropped wait", "accumulators are waited for once, without a loop", ONE)
def _(k: Gemm) -> None:
    k.change(k.wait_finished + 1, guard=None)


@mutant("dropped wait", "the look-ahead's answer is not looked at", ONE, PAIR)
def _(k: Gemm) -> None:
    k.change(k.skip_of(k.wait_full), guard=None)


@mutant("dropped wait", "producer exits without waiting for its stages", ONE, PAIR, SQUARE)
def _(k: Gemm) -> None:
    for wait in k.tail_of_producer:
        no_wait(k, wait)


@mutant(
    "dropped wait", "tensor core's warp exits without waiting for the epilogue", PAIR,
    survives="The other CTA's arrivals come before it says, through the barrier before dealloc, "
    "that it is done, and the leader waits for that: its exit is in order all the same.",
)  # fmt: skip
def _(k: Gemm) -> None:
    no_wait(k, k.tail_of_issuer)


@mutant("dropped wait", "dealloc does not wait for the other CTA of the pair", PAIR, WIDE_PAIR)
def _(k: Gemm) -> None:
    no_wait(k, k.wait_peer)


@mutant("missing acquire", "epilogue waits for accumulators relaxed", ONE)
def _(k: Gemm) -> None:
    k.change(k.wait_finished, modifiers=("try_wait", "parity", "relaxed", "cta", "shared", "b64"))


# Parity and ring --------------------------------------------------


def other_parity(k: Gemm, wait: int) -> None:
    """Start with the other parity."""
    index, value = k.parity_start(wait)
    k.operand(index, 1, Immediate(1 - value))


@mutant("wrong parity", "producer starts with parity 0", ONE, PAIR)
def _(k: Gemm) -> None:
    other_parity(k, k.wait_empty)


@mutant("wrong parity", "tensor core starts on operands with parity 1", ONE, PAIR)
def _(k: Gemm) -> None:
    other_parity(k, k.wait_full)


@mutant("wrong parity", "tensor core starts on accumulators with parity 0", ONE, PAIR)
def _(k: Gemm) -> None:
    other_parity(k, k.wait_returned)


@mutant("wrong parity", "epilogue starts with parity 1", ONE, PAIR)
def _(k: Gemm) -> None:
    other_parity(k, k.wait_finished)


@mutant("phase not flipped", "producer never flips its parity", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.parity_flip(k.wait_empty))


@mutant("phase not flipped", "tensor core never flips its parity for operands", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.parity_flip(k.wait_full))


@mutant("phase not flipped", "tensor core never flips its parity for accumulators", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.parity_flip(k.wait_returned))


@mutant("phase not flipped", "epilogue never flips its parity", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    k.drop(k.parity_flip(k.wait_finished))


@mutant("wrong ring", "tensor core's ring has a stage less", ONE)
def _(k: Gemm) -> None:
    k.immediate(k.ring_end(k.wait_full), lambda stages: stages - 1)


@mutant("wrong ring", "producer's ring has a stage more", PAIR)
def _(k: Gemm) -> None:
    k.immediate(k.ring_end(k.wait_empty), lambda stages: stages + 1)


# Bytes and counts --------------------------------------------------


def more_bytes(k: Gemm, by: int) -> None:
    """Expect other bytes a stage."""
    number = len(k.code[k.expect].operands) - 1
    value = k.code[k.definition(k.code[k.expect].operands[number], k.expect)].operands[1]
    assert isinstance(value, Immediate)
    k.operand(k.expect, number, Immediate(value.value + by))


@mutant("wrong expected bytes", "16 bytes more than come", ONE, PAIR)
def _(k: Gemm) -> None:
    more_bytes(k, 16)


@mutant("wrong expected bytes", "scale factors of B not counted", ONE, PAIR)
def _(k: Gemm) -> None:
    more_bytes(k, -2048)


@mutant("wrong expected bytes", "A counted only", PAIR)
def _(k: Gemm) -> None:
    more_bytes(k, 32768 - 57344)


def init_count(k: Gemm, ring: int, change) -> None:
    """Make the mbarriers of the full, empty, finished or returned ring for other arrivals."""
    for index in k.inits()[ring]:
        count = k.code[k.definition(k.code[index].operands[1], index)].operands[1]
        assert isinstance(count, Immediate)
        k.operand(index, 1, Immediate(change(count.value)))


FULL, EMPTY, FINISHED, RETURNED = range(4)


@mutant("wrong arrival count", "two arrivals at full barriers", ONE, PAIR)
def _(k: Gemm) -> None:
    init_count(k, FULL, lambda count: count + 1)


@mutant("wrong arrival count", "one CTA's release frees a stage of two", ONE)
def _(k: Gemm) -> None:
    init_count(k, EMPTY, lambda count: count - 1)


@mutant("wrong arrival count", "two arrivals at empty barriers", PAIR)
def _(k: Gemm) -> None:
    init_count(k, EMPTY, lambda count: count + 1)


@mutant("wrong arrival count", "one warp less returns an accumulator", ONE)
def _(k: Gemm) -> None:
    init_count(k, RETURNED, lambda count: count - 32)


@mutant("wrong arrival count", "one CTA of the pair returns an accumulator", PAIR, WIDE_PAIR)
def _(k: Gemm) -> None:
    init_count(k, RETURNED, lambda count: count // 2)


@mutant("wrong arrival count", "two arrivals at finished barriers", WIDE)
def _(k: Gemm) -> None:
    init_count(k, FINISHED, lambda count: count + 1)


# Arrivals and commits --------------------------------------------------


@mutant("dropped arrive", "accumulators are not given back", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.returned)


@mutant("dropped arrive", "the producer arrives without the bytes", ONE)
def _(k: Gemm) -> None:
    k.drop(k.expect)


@mutant("dropped arrive", "the other CTA is not told before dealloc", PAIR)
def _(k: Gemm) -> None:
    k.drop(k.find("mbarrier", "arrive", start=k.returned + 1, stop=k.dealloc)[0])


@mutant("early arrive", "accumulators are given back before they are read", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    at = k.returned
    early = k.code[at]
    arrival = [_one_arrival(early)]
    if "shared::cluster" in early.modifiers:
        # The address of the leader's barrier is computed after the loads: bring it along.
        (mapa,) = k.find("mapa", start=k.reads[-1], stop=at)
        arrival = [k.code[k.definition(k.code[mapa].operands[1], mapa)], k.code[mapa], *arrival]
    k.drop(at)
    k.insert(k.reads[0], *arrival)


def _one_arrival(early: Instruction) -> Instruction:
    return instruction(early.name, early.operands[0], early.operands[1], Immediate(1))


@mutant("missing tcgen05.wait::ld", "accumulators are given back before the load is done", ONE)
def _(k: Gemm) -> None:
    early = k.code[k.returned]
    k.drop(k.returned)
    k.insert(k.reads[-1] + 1, _one_arrival(early))


@mutant("missing commit", "stages are not given back", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.release)


@mutant("missing commit", "accumulators are never finished", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.finished)


@mutant("wrong barrier", "the next stage is given back", ONE, PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.release, 0, 8)


@mutant("wrong barrier", "the other accumulator is finished", ONE)
def _(k: Gemm) -> None:
    k.move_address(k.finished, 0, 8)


@mutant("wrong barrier", "a stage is given back where operands are signalled", ONE, PAIR)
def _(k: Gemm) -> None:
    stages = len(k.inits()[FULL])
    k.move_address(k.release, 0, -8 * stages)


@mutant("early commit", "a stage is given back before its last product", ONE, PAIR)
def _(k: Gemm) -> None:
    commit = k.code[k.release]
    k.drop(k.release)
    k.insert(k.mmas[-1], commit)


# Masks and ranks --------------------------------------------------


def commit_mask(k: Gemm, index: int, mask: int) -> None:
    """Signal other CTAs."""
    k.operand(index, 1, Immediate(mask))


@mutant("wrong multicast mask", "stages are given back to rank 0 only", ONE, PAIR)
def _(k: Gemm) -> None:
    commit_mask(k, k.release, 1)


@mutant("wrong multicast mask", "stages are given back to one pair of two", SQUARE)
def _(k: Gemm) -> None:
    commit_mask(k, k.release, 3)


@mutant("wrong multicast mask", "accumulators are finished for the whole cluster", SQUARE)
def _(k: Gemm) -> None:
    commit_mask(k, k.finished, 0xF)


@mutant("wrong multicast mask", "accumulators are finished for the leader only", PAIR, SQUARE)
def _(k: Gemm) -> None:
    commit_mask(k, k.finished, 1)


@mutant("wrong multicast mask", "a mask of no CTA", ONE)
def _(k: Gemm) -> None:
    commit_mask(k, k.finished, 0)


@mutant("wrong leader", "accumulators are given back to the own CTA", PAIR, WIDE_PAIR)
def _(k: Gemm) -> None:
    (mapa,) = k.find("mapa", start=k.reads[-1], stop=k.returned)
    k.operand(mapa, 2, Special("%cluster_ctarank"))


@mutant("wrong leader", "the own CTA is told before dealloc", PAIR)
def _(k: Gemm) -> None:
    (mapa,) = k.find("mapa", start=k.returned, stop=k.dealloc)
    k.operand(mapa, 2, Special("%cluster_ctarank"))


@mutant("wrong leader", "loads signal the own CTA's barrier", PAIR, SQUARE)
def _(k: Gemm) -> None:
    barrier = k.base_register(k.loads[0], 2)
    mask = k.definition(barrier, k.loads[0])
    assert isinstance(barrier, Register)
    k.immediate(mask, lambda value: -8)
