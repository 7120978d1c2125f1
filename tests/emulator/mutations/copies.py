"""Faults of loads, of tensor maps, of the launch, and of the data's format."""

from __future__ import annotations

from dataclasses import replace

from tests.emulator.launch import Launch
from tests.emulator.mutations.catalogue import ONE, PAIR, SQUARE, WIDE, WIDE_PAIR, mutant
from tests.emulator.mutations.roles import Gemm
from tests.emulator.operators import Problem
from tests.emulator.ptx.syntax import Immediate
from tests.emulator.tensor_map import TensorMap

A, B, SFA, SFB, OUT = range(5)

# Loads --------------------------------------------------


@mutant("off-by-one tile", "A is loaded a row on", ONE, PAIR)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[A], 1, 1)


@mutant("off-by-one tile", "B is loaded a tile on", ONE, PAIR)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[B], 1, 64)


@mutant("off-by-one tile", "B is loaded 32 elements of K on", WIDE)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[B], 0, 32)


@mutant("off-by-one tile", "scales of A are loaded an atom of K on", ONE, PAIR)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[SFA], 1, 1)


@mutant("off-by-one tile", "scales of B are loaded an atom of N on", ONE, WIDE_PAIR)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[SFB], 2, 1)


@mutant("off-by-one tile", "A is loaded of the next batch", ONE)
def _(k: Gemm) -> None:
    k.add_to_coordinate(k.loads[A], 2, 1)


@mutant("dropped load", "scales of A are not loaded", ONE, PAIR)
def _(k: Gemm) -> None:
    k.drop(k.loads[SFA])


@mutant("wrong destination", "A is loaded to the next stage", ONE, PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.loads[A], 0, 16384)


@mutant("wrong destination", "B is loaded 128 bytes on", WIDE)
def _(k: Gemm) -> None:
    k.move_address(k.loads[B], 0, 128)


@mutant("wrong destination", "scales of B are loaded 16 bytes on", ONE)
def _(k: Gemm) -> None:
    k.move_address(k.loads[SFB], 0, 16)


@mutant("wrong barrier", "a load signals the next stage's barrier", ONE, PAIR)
def _(k: Gemm) -> None:
    k.move_address(k.loads[A], 2, 8)


@mutant("wrong multicast mask", "B goes to rank 0 only", ONE, WIDE)
def _(k: Gemm) -> None:
    k.operand(k.loads[B], 3, Immediate(1))


@mutant("wrong multicast mask", "scales of B go to the other CTA only", ONE, PAIR)
def _(k: Gemm) -> None:
    k.operand(k.loads[SFB], 3, Immediate(2))


@mutant("wrong multicast mask", "A goes to the other column of the cluster", SQUARE)
def _(k: Gemm) -> None:
    k.operand(k.loads[A], 3, Immediate(0b1010))


@mutant("wrong multicast mask", "a CTA that the cluster does not have", ONE, PAIR)
def _(k: Gemm) -> None:
    k.operand(k.loads[SFB], 3, Immediate(7))


# Tensor maps --------------------------------------------------


def _box(dimension: int, size: int):
    def change(map_: TensorMap) -> TensorMap:
        box = list(map_.box)
        box[dimension] = size
        return replace(map_, box=tuple(box))

    return change


@mutant("wrong tensor map", "A's box has half the rows", ONE, PAIR)
def _(k: Gemm) -> None:
    k.tensor_map(A, _box(1, 64))


@mutant("wrong tensor map", "the output's box has half the columns", ONE)
def _(k: Gemm) -> None:
    k.tensor_map(OUT, _box(0, 16))


@mutant("wrong tensor map", "rows of A are 16 bytes further apart", ONE, PAIR)
def _(k: Gemm) -> None:
    k.tensor_map(A, lambda m: replace(m, strides=(m.strides[0] + 16, *m.strides[1:])))


@mutant("wrong tensor map", "rows of B are half as far apart", WIDE)
def _(k: Gemm) -> None:
    k.tensor_map(B, lambda m: replace(m, strides=(m.strides[0] // 2, *m.strides[1:])))


@mutant("wrong tensor map", "K of B is a tile less", ONE)
def _(k: Gemm) -> None:
    k.tensor_map(B, lambda m: replace(m, dims=(m.dims[0] - 256, *m.dims[1:])))


@mutant("wrong tensor map", "the output has a row less", ONE)
def _(k: Gemm) -> None:
    k.tensor_map(OUT, lambda m: replace(m, dims=(m.dims[0], m.dims[1] - 1, m.dims[2])))


@mutant("wrong tensor map", "A is loaded without a swizzle", ONE, PAIR)
def _(k: Gemm) -> None:
    k.tensor_map(A, lambda m: replace(m, swizzle="none"))


@mutant("wrong tensor map", "the output is stored with another swizzle", ONE)
def _(k: Gemm) -> None:
    k.tensor_map(OUT, lambda m: replace(m, swizzle="128B"))


@mutant("wrong tensor map", "B starts 16 bytes on", PAIR)
def _(k: Gemm) -> None:
    k.tensor_map(B, lambda m: replace(m, address=m.address + 16))


# Launch and data --------------------------------------------------


def _resized(launch: Launch, **fields) -> Launch:
    return replace(launch, **fields)


@mutant("wrong launch", "half of the shared memory", ONE, PAIR)
def _(k: Gemm) -> None:
    k.launch(lambda launch: _resized(launch, shared_bytes=launch.shared_bytes // 2))


@mutant("wrong launch", "no clusters", ONE, PAIR)
def _(k: Gemm) -> None:
    k.launch(lambda launch: _resized(launch, cluster=(1, 1, 1)))


@mutant("wrong launch", "one cluster too many that runs the same tiles", ONE)
def _(k: Gemm) -> None:
    # Tiles are dealt by z; a grid that is wider in x has a second cluster of the same z.
    k.launch(lambda launch: _resized(launch, grid=(2 * launch.grid[0], *launch.grid[1:])))


def _swapped(which: str):
    def change(problem: Problem) -> Problem:
        packed = getattr(problem, which)
        return replace(problem, **{which: packed >> 4 | packed << 4})

    return change


@mutant("swapped nibble", "elements of A in the other order", ONE, PAIR)
def _(k: Gemm) -> None:
    k.data_edits.append(_swapped("a"))


@mutant("swapped nibble", "elements of B in the other order", WIDE)
def _(k: Gemm) -> None:
    k.data_edits.append(_swapped("b"))


@mutant("wrong scale order", "scales of B with four blocks of K in the other order", ONE)
def _(k: Gemm) -> None:
    def change(problem: Problem) -> Problem:
        return replace(problem, sfb=problem.sfb.flip(-1).contiguous())

    k.data_edits.append(change)
