"""Rung 8: block-scaled GEMMs for sm_120, cooperative and pingpong, and faults planted in ours.

NVIDIA's are examples of its repository and not in CI: results/nvidia_sm120.md has what they gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cutlass import BFloat16, Float16, Float32

from tests.emulator.emulate import emulate
from tests.emulator.errors import Fault
from tests.emulator.kernels.block_scaled_sm120 import compile_block_scaled
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.mutations.editing import Kernel, instruction
from tests.emulator.operators import problem
from tests.emulator.ptx.syntax import Immediate, Vector
from tests.emulator.snippets import host

SCHEDULES = ("cooperative", "pingpong")
SETTINGS = [
    Settings(mode=mode, schedule=schedule, seed=seed)
    for seed, mode in enumerate(MODES)
    for schedule in ("round_robin", "random")
]
SPACING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding."""
KINDS = {torch.float32: Float32, torch.bfloat16: BFloat16, torch.float16: Float16}


class WrongResult(AssertionError):
    """Nothing was violated, but an element is off by more than its budget."""

    check = "result"


def run(kernel, sizes, *, ctas=1, alpha=1.0, output=torch.bfloat16, settings=None):
    """Multiply random operands; the result, within its budget, and the exact one."""
    case, alpha = problem(*sizes), float(np.float32(alpha))
    m, n, *_ = case.sizes
    out = torch.empty(m, n + n % 2, dtype=output)[:, :n]
    scales = case.sfa.view(-1), case.sfb.view(-1)
    emulate(
        kernel, case.a[0], case.b[0], *scales, out, alpha, ctas, outputs=[out], settings=settings
    )
    # `problem` has the budget of a bf16 result; the product with alpha is rounded, too.
    exact = case.exact[0]
    rounding = SPACING[output] * (1 + 2.0**-7) + 2.0**-23
    sums = case.budget[0] - SPACING[torch.bfloat16] * (1 + 2.0**-7) * exact.abs()
    errors = (out.double() / alpha - exact).abs() / (sums + rounding * exact.abs())
    if not (errors <= 1).all():
        raise WrongResult(f"error of {errors.max():.3g} budgets")
    return out, exact * alpha


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mode}-{s.schedule}")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sizes", "ctas", "stages"),
    [
        ((128, 128, 128), 1, 5),
        ((1, 1, 32), 1, 5),
        ((200, 141, 288), 2, 5),  # ragged in all, two tiles a CTA
        ((64, 136, 1184), 1, 3),  # ten steps, the ring's fourth turn
        ((150, 300, 160), 1, 5),  # six tiles a CTA
    ],
    ids=str,
)
def test_every_order_of_events_gives_the_result(sizes, ctas, stages, schedule, settings):
    out, exact = run(
        host(compile_block_scaled, schedule, stages), sizes, ctas=ctas, settings=settings
    )
    # Sums are rounded to float32 before bf16: next to a tie, that can decide.
    assert (out == exact.float().bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("output", KINDS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_and_alpha(schedule, output):
    kernel = host(compile_block_scaled, schedule, 5, KINDS[output])
    run(kernel, (70, 131, 224), alpha=0.37, output=output, settings=Settings(mode="late"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_memory_fits(schedule):
    kernel = host(compile_block_scaled, schedule, 5)
    case = problem(128, 128, 64)
    scales, out = (
        (case.sfa.view(-1), case.sfb.view(-1)),
        torch.empty(128, 128, dtype=torch.bfloat16),
    )
    (launch,) = kernel.launches(case.a[0], case.b[0], *scales, out, 1.0, 1)
    assert launch.shared_bytes <= 99 * 1024


# Faults -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A kernel with one fault, and the checks that may find it first."""

    name: str
    schedule: str
    checks: tuple[str, ...]
    edit: Callable[[Kernel], None]

    def __str__(self) -> str:
        return f"{self.schedule}: {self.name}"


MUTANTS: list[Mutant] = []


def mutant(*checks, schedules=SCHEDULES):
    """Register a fault in each of these schedules."""

    def register(edit):
        name = edit.__name__.replace("_", " ")
        MUTANTS.extend(Mutant(name, each, checks, edit) for each in schedules)
        return edit

    return register


def waits(kernel):
    """Indices of the waits for an empty stage, the group's turn if there are two, full stages."""
    empty, *turn, first, other = kernel.find("mbarrier", "try_wait")
    return {"empty": empty, "turn": turn[0] if turn else None, "first": first, "other": other}


def no_wait(kernel, which):
    """Go on whether or not the phase is complete."""
    index = waits(kernel)[which]
    kernel.drop(index)
    kernel.change(index + 1, guard=None)


def arrivals(kernel):
    """Indices of the arrivals: a stage is expected, was read, the other group has its turn."""
    return kernel.find("mbarrier", "arrive")


def copies(kernel):
    """Indices of the tensor copies of a, b and their scales."""
    return kernel.find("cp", "tensor")


def select(kernel, operand, byte, thread):
    """The selector of an MMA's scales: operand 5 is A's, 7 B's."""
    for index in kernel.find("mma"):
        kernel.operand(index, operand, Vector((Immediate(byte), Immediate(thread))))


# Pipeline


@mutant("uninitialised")
def consumers_do_not_wait_for_the_first_stage(kernel):
    no_wait(kernel, "first")


@mutant("race")
def consumers_do_not_wait_for_a_later_stage(kernel):
    no_wait(kernel, "other")


@mutant("race")
def producer_does_not_wait_for_an_empty_stage(kernel):
    no_wait(kernel, "empty")


@mutant("deadlock")
def producer_starts_with_the_other_parity(kernel):
    wait = waits(kernel)["empty"]
    first = kernel.writers(kernel.code[wait].operands[2])[0]
    kernel.operand(first, 1, Immediate(0))


@mutant("race")
def consumers_do_not_flip_the_parity(kernel):
    parity = kernel.code[waits(kernel)["other"]].operands[2]
    kernel.drop(kernel.writers(parity)[-1])


@mutant("race")
def stages_expect_a_block_of_scales_less(kernel):
    expected = kernel.code[arrivals(kernel)[0]].operands[2]
    kernel.immediate(kernel.definition(expected, arrivals(kernel)[0]), lambda size: size - 1024)


@mutant("deadlock")
def stages_expect_16_bytes_more(kernel):
    expected = kernel.code[arrivals(kernel)[0]].operands[2]
    kernel.immediate(kernel.definition(expected, arrivals(kernel)[0]), lambda size: size + 16)


@mutant("deadlock")
def stages_are_not_released(kernel):
    kernel.drop(arrivals(kernel)[1])


@mutant("race")
def stages_are_released_by_one_warp_less(kernel):
    count = kernel.code[kernel.find("mbarrier", "init")[1]].operands[1]
    kernel.immediate(kernel.writers(count)[0], lambda warps: warps - 1)


@mutant("race")
def stages_are_released_before_they_are_read(kernel):
    release = arrivals(kernel)[1]
    loads = kernel.find("ld", "shared", start=release - 40, stop=release)
    late = [kernel.code[index] for index in loads]
    kernel.drop(*loads)
    kernel.insert(release + 1, *late)


@mutant("race", "deadlock", schedules=["pingpong"])
def groups_do_not_wait_for_their_turn(kernel):
    no_wait(kernel, "turn")


@mutant("deadlock", schedules=["pingpong"])
def groups_do_not_give_the_turn_away(kernel):
    kernel.drop(arrivals(kernel)[2])


@mutant("barrier")
def consumers_do_not_wait_for_the_barriers(kernel):
    kernel.drop(*kernel.find("bar", "sync"))


# Places


@mutant("result")
def a_is_loaded_from_a_row_too_far(kernel):
    kernel.add_to_coordinate(copies(kernel)[0], 1, 1)


@mutant("result")
def b_is_loaded_from_the_next_tile(kernel):
    kernel.add_to_coordinate(copies(kernel)[1], 1, 128)


@mutant("result")
def scales_are_loaded_from_the_next_tile(kernel):
    kernel.add_to_coordinate(copies(kernel)[2], 1, 1)


@mutant("result")
def scales_are_loaded_64_numbers_too_far(kernel):
    kernel.add_to_coordinate(copies(kernel)[3], 0, 128)


@mutant("result")
def the_second_block_is_a_chunk_too_near(kernel):
    index = next(i for i in kernel.find("xor") if Immediate(32) in kernel.code[i].operands)
    kernel.operand(index, 2, Immediate(16))


@mutant("result")
def the_swizzle_of_a_is_left_out(kernel):
    """Of the two exclusive ors of a row with a chunk, those that do not flip a parity."""
    code = kernel.code
    found = [i for i in kernel.find("xor") if i < waits(kernel)["first"]]
    index = next(i for i in found if code[i].operands[0] != code[i].operands[1])
    kernel.change(index, opcode="mov", operands=code[index].operands[:2])


@mutant("result")
def scales_are_read_from_the_next_row(kernel):
    kernel.move_address(kernel.find("ld", "shared", "v4")[0], 1, 16)


# MMAs


@mutant("result")
def the_numbers_of_a_byte_are_swapped(kernel):
    (mma, *_) = kernel.find("mma")
    items = kernel.code[mma].operands[2].items
    low, high, swapped = (kernel.register(32) for _ in range(3))
    code = [
        instruction("and.b32", low, items[0], Immediate(0x0F0F0F0F)),
        instruction("shl.b32", low, low, Immediate(4)),
        instruction("shr.u32", high, items[0], Immediate(4)),
        instruction("and.b32", high, high, Immediate(0x0F0F0F0F)),
        instruction("or.b32", swapped, low, high),
    ]
    kernel.operand(mma, 2, Vector((swapped, items[1])))
    kernel.insert(mma, *code)


@mutant("result")
def rows_and_k_of_a_are_swapped(kernel):
    (mma, *_) = kernel.find("mma")
    a = kernel.code[mma].operands[1].items
    kernel.operand(mma, 1, Vector((a[0], a[2], a[1], a[3])))


@mutant("result", schedules=["pingpong"])
def scales_of_b_come_from_another_lane(kernel):
    select(kernel, 7, 0, 0)


@mutant("scale selector")
def scales_start_at_another_byte(kernel):
    select(kernel, 5, 1, 0)


@mutant("scale selector")
def scales_of_b_come_from_no_lane(kernel):
    select(kernel, 7, 0, 4)


@mutant("result")
def scales_of_a_and_b_are_swapped(kernel):
    (mma, *_) = kernel.find("mma")
    a, b = (kernel.code[mma].operands[i] for i in (4, 6))
    kernel.operand(mma, 4, b)
    kernel.operand(mma, 6, a)


@mutant("result")
def an_accumulator_is_another_ones(kernel):
    *_, other, mma = kernel.find("mma")
    kernel.operand(mma, 3, kernel.code[other].operands[3])


# Output


@mutant("out of bounds", "output")
def a_row_and_a_column_more_are_stored(kernel):
    for index in kernel.find("setp", "ge", start=kernel.find("mma")[-1]):
        names = ["gt" if name == "ge" else name for name in kernel.code[index].modifiers]
        kernel.change(index, modifiers=tuple(names))


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_faults_are_found(mutant):
    """By one of the ways to run: a race shows in some of the orders that it allows."""
    kernel = Kernel(host(compile_block_scaled, mutant.schedule, 3))
    mutant.edit(kernel)
    changed, found = kernel.mutated(), None
    k = 224 if "result" in mutant.checks else 864  # which wraps the ring of three stages, twice
    for settings in SETTINGS:
        try:
            run(changed, (120, 250, k), settings=settings)
        except (Fault, WrongResult) as error:
            found = error.check
            break
    assert found in mutant.checks


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scales_of_a_may_come_from_either_pair_of_lanes(schedule):
    """A change that is no fault: both pairs of a quad have read the same scales."""
    kernel = Kernel(host(compile_block_scaled, schedule, 3))
    select(kernel, 5, 0, 1)
    run(kernel.mutated(), (120, 250, 224))
