"""What the instructions of NVIDIA's persistent GEMM are for, found by structure.

Warp 5 loads (the producer), warp 4 issues to the tensor core, warps 0 to 3 store (the epilogue).
The text has them in this order; each waits by a look-ahead ``try_wait`` and a loop of them.
"""

from __future__ import annotations

from functools import cached_property

from tests.emulator.mutations.editing import Kernel, register_of
from tests.emulator.ptx.syntax import Immediate, Register


class Gemm(Kernel):
    """A kernel of ``PersistentDenseBlockScaledGemmKernel``."""

    # Copies and the tensor core ----------------------------------------------------------------

    @property
    def loads(self) -> list[int]:
        """Loads of A, B, and the scale factors of A and B."""
        found = self.find("cp", "tensor", "mbarrier::complete_tx::bytes")
        assert len(found) == 4
        return found

    @property
    def stores(self) -> list[int]:
        """Stores of the output."""
        return self.find("cp", "tensor", "bulk_group")

    @property
    def mmas(self) -> list[int]:
        """The four K steps of a stage, as many times as the kernel has N halves."""
        return self.find("tcgen05", "mma")

    @property
    def scale_copies(self) -> list[int]:
        """From shared to tensor memory: four of SFA, then those of SFB."""
        return self.find("tcgen05", "cp")

    @property
    def release(self) -> int:
        """The commit that gives a stage back to the producer."""
        return self.find("tcgen05", "commit")[0]

    @property
    def finished(self) -> int:
        """The commit that gives an accumulator to the epilogue."""
        return self.find("tcgen05", "commit")[1]

    @property
    def reads(self) -> list[int]:
        """Loads of accumulators by the epilogue."""
        return self.find("tcgen05", "ld")

    @property
    def returned(self) -> int:
        """The arrival that gives an accumulator back."""
        return self.find("mbarrier", "arrive", start=self.reads[-1])[0]

    @property
    def expect(self) -> int:
        """The producer's arrival with the bytes of a stage."""
        (found,) = self.find("mbarrier", "expect_tx")
        return found

    @property
    def dealloc(self) -> int:
        """Where tensor memory is given back."""
        (found,) = self.find("tcgen05", "dealloc")
        return found

    # Waits -------------------------------------------------------------------------------------

    def _loop_before(self, index: int, number: int = 1) -> int:
        """The `number`-th wait in a loop before an index."""
        return [i for i in self.find("mbarrier", "try_wait", stop=index) if self._loops(i)][-number]

    def _loops(self, index: int) -> bool:
        branch = self.code[index + 1]
        return branch.opcode == "bra" and branch.guard is not None

    @property
    def wait_empty(self) -> int:
        """The producer's wait for a free stage."""
        return self._loop_before(self.expect)

    @property
    def wait_full(self) -> int:
        """The wait for a stage's operands."""
        return self._loop_before(self.scale_copies[0])

    @property
    def wait_returned(self) -> int:
        """The wait for a free accumulator."""
        return self._loop_before(self.scale_copies[0], 2)

    @property
    def wait_finished(self) -> int:
        """The epilogue's wait for an accumulator."""
        return self._loop_before(self.reads[0])

    @property
    def wait_peer(self) -> int:
        """The wait for the other CTA of a pair, before tensor memory is given back."""
        found = self._loop_before(self.dealloc)
        assert found > self.reads[-1]
        return found

    @property
    def tail_of_producer(self) -> list[int]:
        """Waits for all stages to be free, after the last load."""
        stop = self.scale_copies[0]
        found = self.find("mbarrier", "try_wait", start=self.loads[-1], stop=stop)
        issue = self.find("bar", "sync", start=self.loads[-1])[0]
        return [i for i in found if self._loops(i) and i < issue]

    @property
    def tail_of_issuer(self) -> int:
        """The wait for the last accumulator to be read."""
        alloc = self.find("tcgen05", "alloc")[0]
        found = self._loop_before(alloc)
        assert found > self.finished
        return found

    def look_ahead(self, wait: int) -> list[int]:
        """The attempts before a wait in a loop: those that set the predicate to jump over it."""
        guard = self.code[self._skip(wait)].guard
        assert guard is not None
        return [
            i for i in self.find("mbarrier", "try_wait")
            if self.code[i].operands[0] == guard.predicate
        ]  # fmt: skip

    def _skip(self, wait: int) -> int:
        """The branch over a wait in a loop whose look-ahead had come true."""
        return self.find("bra", start=wait - 3, stop=wait)[-1]

    def is_skipped(self, wait: int) -> bool:
        """Whether a look-ahead may jump over a wait in a loop."""
        return bool(self._earlier(wait))

    def skip_of(self, wait: int) -> int:
        """The same, checked to be guarded by a look-ahead."""
        assert self.look_ahead(wait)
        return self._skip(wait)

    # Data flow ---------------------------------------------------------------------------------

    def parity_start(self, wait: int) -> tuple[int, int]:
        """Where the parity of a wait gets its first value, and that value."""
        first = min([wait, *self._earlier(wait)])
        index = self.definition(self.code[wait].operands[2], first)
        value = self.code[index].operands[1]
        while isinstance(value, Register):
            value = self.code[self.definition(value, index)].operands[1]
        assert self.code[index].opcode == "mov"
        assert isinstance(value, Immediate)
        return index, value.value

    def _earlier(self, wait: int) -> list[int]:
        index = self.find("bra", start=wait - 3, stop=wait)
        if not index or self.code[index[-1]].guard is None:
            return []
        return self.look_ahead(wait)

    def parity_flip(self, wait: int) -> int:
        """Where the parity of a wait is flipped: the xor in the loop."""
        (found,) = [
            i for i in self.writers(self.code[wait].operands[2]) if self.code[i].opcode == "xor"
        ]
        return found

    def bars_of(self, store: int) -> tuple[int, int]:
        """The bars before and after a store of the output."""
        return (
            self.find("bar", "sync", stop=store)[-1],
            self.find("bar", "sync", start=store)[0],
        )

    def bars_of_alloc(self) -> tuple[int, int]:
        """Where the tensor core's warp and the epilogue meet after tensor memory is allocated."""
        alloc = self.find("tcgen05", "alloc")[0]
        return (
            self.find("bar", "sync", stop=self.scale_copies[0])[-1],
            self.find("bar", "sync", start=alloc)[0],
        )

    def stage_of(self, operand: int) -> int:
        """Where the low word of A's or B's descriptor gets the offset of the stage."""
        return self.low_word(self.mmas[0], operand)

    def accumulator_shift(self, index: int, number: int) -> int:
        """The shift of the accumulator's stage in the address of a product or of a load."""
        at = self.definition(self.base_register(index, number), index)
        for operand in self.code[at].operands[1:]:
            found = self.writers(operand, 0, at)[-1]
            if self.code[found].opcode in ("shl", "mul"):
                return found
        raise AssertionError("no stage in the accumulator's address")

    def ring_end(self, wait: int) -> int:
        """Where the index of the stage after that of a wait is compared with their number."""
        flip = self.parity_flip(wait)
        select = self.definition(self.code[flip].operands[2], flip)
        return self.definition(self.code[select].operands[3], select)

    def inits(self) -> list[list[int]]:
        """Where mbarriers are made: full, empty, finished, returned, and that of dealloc."""
        groups: list[list[int]] = []
        last = -2
        for index in self.find("mbarrier", "init"):
            if index != last + 1:
                groups.append([])
            groups[-1].append(index)
            last = index
        return groups

    def descriptor_base(self, operand: int) -> int:
        """The ``or`` that makes the descriptor of A (1) or B (2) of the products."""
        mma = self.mmas[0]
        pair = self.definition(self.code[mma].operands[operand], mma)
        high = self.code[pair].operands[1].items[1]
        whole = self.code[self.definition(high, pair)].operands[1]
        return self.definition(whole, pair)

    def copy_descriptor_base(self, copy: int) -> int:
        """The ``or`` that makes the descriptor of a copy of scale factors."""
        pair = self.definition(self.code[copy].operands[1], copy)
        high = self.code[pair].operands[1].items[1]
        whole = self.code[self.definition(high, pair)].operands[1]
        return self.definition(whole, pair)

    def low_word(self, mma: int, operand: int) -> int:
        """Where the low word of a descriptor of a product is computed: start address."""
        pair = self.definition(self.code[mma].operands[operand], mma)
        return self.definition(self.code[pair].operands[1].items[0], pair)

    @cached_property
    def shape(self) -> int:
        """The ``selp`` that chooses the instruction descriptor by A's negation."""
        mma = self.mmas[0]
        whole = self.definition(self.code[mma].operands[3], mma)
        base = self.definition(self.code[whole].operands[1], whole)
        return self.definition(self.code[base].operands[1], base)

    def change_shape(self, change) -> None:
        """Change every instruction descriptor."""
        first, second = (
            Immediate(change(each.value)) for each in self.code[self.shape].operands[1:3]
        )
        self.operand(self.shape, 1, first)
        self.operand(self.shape, 2, second)

    def base_register(self, index: int, number: int) -> Register:
        """Register of an operand in brackets."""
        return register_of(self.code[index].operands[number])
