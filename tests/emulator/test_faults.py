"""Diagnosis: every wrong kernel is caught by its check, with its place; its correct twin passes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from cutlass import Float32

from tests.emulator.emulate import emulate
from tests.emulator.errors import ArgumentsError, Deadlock, Fault
from tests.emulator.kernels import copies, faulty
from tests.emulator.kernels import tensor_copies as tiles
from tests.emulator.launch import Launch
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.global_memory import GlobalMemory
from tests.emulator.machine.program import Program, Settings
from tests.emulator.ptx.parser import parse
from tests.emulator.snippets import host, module

SETTINGS = [
    Settings(mode=mode, schedule=schedule, seed=3)
    for mode in MODES
    for schedule in ("round_robin", "random")
]
IN_ORDER = [settings for settings in SETTINGS if settings.schedule == "round_robin"]


def _line(text):
    """Number in faulty.py of the only line that reads `text`, for patterns."""
    with open(faulty.__file__) as file:
        found = [i for i, line in enumerate(file, 1) if line.strip() == text]
    assert len(found) == 1, (text, found)
    return rf"\(faulty\.py:{found[0]}\)"


@dataclass(frozen=True)
class Case:
    """The check that catches a fault, and patterns that its message holds, in their order."""

    check: str
    patterns: tuple[str, ...]
    n: int = 256
    settings: tuple[Settings, ...] = tuple(SETTINGS)
    archs: tuple[str, ...] = ("sm_90a", "sm_100a")


WARP = r"CTA \(\d, 0, 0\) warp \d"
AT = r"at line \d+ `"
CASES = {
    "race": Case(
        "race",
        (
            r"(write after read|read after write) at byte \d+ of CTA \(0, 0, 0\)'s shared memory",
            rf"{WARP} {AT}(ld|st)\.shared",
            _line("y[i] = tile[THREADS - 1 - tid]"),
            "nothing orders the two",
            rf"in {WARP} {AT}(st|ld)\.shared",
            r"\(faulty\.py:\d+\)",
        ),
    ),
    "uninitialised": Case(
        "output", (r"512 bytes of tensor 0 \(256,\) int32 were written undefined", "at byte 256")
    ),
    "past output": Case(
        "out of bounds",
        (
            r"store of 128 bytes at bytes 896 to 1024 of tensor 0 \(250,\) int32 \(1000 bytes\)",
            rf"in CTA \(1, 0, 0\) warp 3 {AT}st\.global\.b32",
            _line("if i < (arch.grid_dim()[0] * THREADS if broken else y.shape[0]):")[:-5],
        ),
        n=250,
    ),
    "past shared": Case(
        "out of bounds",
        (
            r"store of shared bytes 512 to 516 of CTA \(\d, 0, 0\), which has 512",
            rf"in CTA \(\d, 0, 0\) warp 0 lanes 0x00000001 {AT}st\.shared",
            _line("tile[place] = Int32(1)"),
        ),
    ),
    "missing arrival": Case(
        "deadlock",
        tuple(
            rf"CTA \(0, 0, 0\) warp {warp} at line \d+ `mbarrier\.try_wait\.parity.*faulty\.py:\d+"
            r".*: waits for parity 0 of the mbarrier at byte 0 of CTA \(0, 0, 0\)'s shared memory "
            r"\(made at line \d+\): phase 0 \(parity 0\), 1 of 129 arrivals and 0 bytes pending"
            for warp in range(4)
        ),
    ),
    "divergent barrier": Case(
        "divergence",
        (
            rf"these lanes exit while lanes 0x0000ffff wait for them {AT}(bar|barrier)\.sync",
            r"\(faulty\.py:\d+\)",
            rf"in {WARP} lanes 0xffff0000 {AT}ret;",
        ),
    ),
    "divergent shuffle": Case(
        "shuffle",
        (
            "lane 0 reads a lane that is not here",
            rf"in {WARP}( lanes 0x0000ffff)? {AT}shfl\.sync\.bfly\.b32",
            _line("y[i] = arch.shuffle_sync_bfly(tid, offset=16)"),
        ),
    ),
    "misaligned": Case(
        "misaligned",
        (r"store of 16 bytes at 0x[0-9a-f]+4\b", rf"in {WARP}.* {AT}.*st\.global\.v4", r"\.py:\d+"),
    ),
    "written twice": Case("output", (r"8 bytes of tensor 0 .* were written twice", "at byte 4")),
    "never written": Case("output", (r"4 bytes of tensor 0 .* were never written", "at byte 1020")),
    "early exit": Case(
        "cluster lifetime",
        (
            r"store of shared memory of CTA \(0, 0, 0\) \(rank 0\), which exited",
            rf"in CTA \(1, 0, 0\) \(rank 1\) warp \d {AT}st\.shared::cluster",
            r"\(faulty\.py:\d+\)",
        ),
        # In another order of the warps, nothing goes wrong.
        settings=tuple(IN_ORDER),
    ),
    "leaked columns": Case(
        "tensor memory",
        (
            rf"CTA \(0, 0, 0\) exits without freeing what it got {AT}tcgen05\.alloc",
            _line("arch.alloc_tmem(TMEM_COLUMNS, address)"),
        ),
        archs=("sm_100a",),
    ),
}
assert CASES.keys() == faulty.FAULTS.keys()


def _check(caught, case):
    """The right check, and its patterns one after the other."""
    error = caught.value
    assert error.check == case.check, error
    assert isinstance(error, Deadlock) == (case.check == "deadlock")
    at, text = 0, str(error)
    for pattern in case.patterns:
        found = re.compile(pattern).search(text, at)
        assert found, f"{pattern!r} is not in {text[at:]!r}"
        at = found.end()


@pytest.mark.parametrize(("name", "arch"), [(name, a) for name in CASES for a in CASES[name].archs])
def test_faults_are_caught(name, arch):
    case = CASES[name]
    for settings in case.settings:
        y = torch.empty(case.n, dtype=torch.int32)
        with pytest.raises(Fault) as caught:
            emulate(host(faulty.compile_fault, arch, name), y, outputs=[y], settings=settings)
        _check(caught, case)


@pytest.mark.parametrize(("name", "arch"), [(name, a) for name in CASES for a in CASES[name].archs])
def test_correct_twins_pass(name, arch):
    for settings in SETTINGS:
        y = torch.empty(CASES[name].n, dtype=torch.int32)
        emulate(host(faulty.compile_fault, arch, name, False), y, outputs=[y], settings=settings)


COPY_CASES = {
    "expects more": Case(
        "deadlock",
        (
            rf"warp 0 {AT}mbarrier\.try_wait",
            r"waits for parity 0 of the mbarrier at byte 0 of CTA \(0, 0, 0\)'s shared memory",
            r"phase 0 \(parity 0\), 0 of 1 arrivals and 16 bytes pending",
            rf"warp 3 {AT}mbarrier\.try_wait",
        ),
    ),
    "reads early": Case(
        "race",
        (
            r"at byte \d+ of CTA \(0, 0, 0\)'s shared memory",
            r"ld\.shared|cp\.async\.bulk",
            r"\(faulty\.py:\d+\)",
            rf"in {WARP}.* {AT}(ld\.shared|cp\.async\.bulk)",
            r"\(faulty\.py:\d+\)",
        ),
    ),
    "no proxy fence": Case(
        "missing proxy fence",
        (
            rf"read after write at byte \d+ of CTA .*: {WARP} {AT}st\.shared",
            _line("tile[row + tid // 32, tid % 32] = Float32(turn + 1)"),
            r"no fence\.proxy\.async between them",
            rf"in {WARP} lanes 0x00000001 {AT}cp\.async\.bulk\.tensor",
            _line("cute.copy(store, source, to)"),
        ),
    ),
    "overwritten": Case(
        "race",
        (
            rf"write after read at byte \d+ .*: {WARP}'s bulk stores {AT}cp\.async\.bulk\.tensor",
            _line("cute.copy(store, source, to)"),
            rf"in {WARP} {AT}st\.shared",
            _line("tile[row + tid // 32, tid % 32] = Float32(turn + 1)"),
        ),
    ),
    "exits": Case(
        "bulk copy",
        (
            rf"{WARP} exits without waiting until a store has read: line \d+ `cp\.async\.bulk",
            _line("cute.copy(store, source, to)"),
        ),
    ),
}
assert {*COPY_CASES, "correct"} == {*faulty.LOAD_FAULTS, *faulty.STORE_FAULTS}


def _copy(arch, name, settings, kind):
    x, y = torch.randn(8, 32), torch.empty(8 if kind == "load" else 16, 32)
    kernel = host(getattr(faulty, f"compile_{kind}_fault"), arch, name)
    emulate(kernel, *((x, y) if kind == "load" else (y,)), outputs=[y], settings=settings)
    return x, y


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
@pytest.mark.parametrize("name", COPY_CASES)
def test_faults_of_tensor_copies_are_caught(name, arch):
    kind = "load" if name in faulty.LOAD_FAULTS else "store"
    for settings in SETTINGS:
        with pytest.raises(Fault) as caught:
            _copy(arch, name, settings, kind)
        _check(caught, COPY_CASES[name])


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_correct_tensor_copies_pass(arch):
    for settings in SETTINGS:
        x, y = _copy(arch, "correct", settings, "load")
        assert torch.equal(y, x)
        _, y = _copy(arch, "correct", settings, "store")
        assert torch.equal(y, torch.tensor([1.0, 2.0]).repeat_interleave(8)[:, None].expand(16, 32))


# Arguments of emulate() --------------------------------------------------


def _add():
    return host(copies.compile_add, "sm_90a")


def _numbers(n=8, **options):
    return torch.zeros(n, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (_numbers(), _numbers()), r"takes 3 arguments .*\(a, b, c\), 2 were given"),
        (lambda: [_numbers()] * 5, r"takes 3 arguments .*\(a, b, c\), 5 were given"),
        (
            lambda: (_numbers(), _numbers(dtype=torch.float16), _numbers()),
            r"argument 1 \(b\) of .*: torch.float32 is required \(Float32\), got torch.float16",
        ),
        (
            lambda: (_numbers(), _numbers(), _numbers().view(2, 4)),
            r"argument 2 \(c\) of .*: rank 1 is required, got shape \(2, 4\)",
        ),
        (lambda: (_numbers(), 3, _numbers()), r"argument 1 \(b\) of .*: a tensor is required"),
        (
            lambda: (_numbers(), _numbers(), _numbers(device="meta")),
            r"a CPU tensor is required, got one on meta",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ArgumentsError, match=message):
        emulate(_add(), *arguments())


def test_numbers_are_checked():
    kernel = host(copies.compile_sums, "sm_90a")
    x, sums = _numbers(), _numbers(1)
    for value, message in ((2**31, "does not fit in Int32"), (1.5, "Int32 is required, got float")):
        with pytest.raises(ArgumentsError, match=message):
            emulate(kernel, x, sums, value)


def test_overlapping_tensors_are_refused():
    whole = _numbers(16)
    with pytest.raises(ArgumentsError, match=r"overlaps .* without being the same bytes"):
        emulate(_add(), whole[:12], whole[4:], _numbers(12))


def test_memory_that_is_no_argument_is_out_of_bounds():
    """Addresses are reachable only if their tensors are named."""
    kernel = host(tiles.compile_tensor_copy, "sm_90a", Float32, (16, 16), 64, "threads", "threads")
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    with pytest.raises(Fault, match=r"out of bounds: load of .*no tensor is registered"):
        emulate(kernel, x.data_ptr(), y.data_ptr(), 16, 16, 16)
    emulate(kernel, x.data_ptr(), y.data_ptr(), 16, 16, 16, memory=[x], outputs=[y])
    assert torch.equal(x, y)


def test_an_output_in_place_of_an_input_is_undefined():
    a, b = _numbers(), _numbers()
    with pytest.raises(Fault, match=r"output: 32 bytes of tensor 1 .* were written undefined"):
        emulate(_add(), a, b, b, outputs=[b])


@dataclass(frozen=True)
class Shape:
    """How a snippet is launched."""

    kernel: str = "snippet"
    grid: int = 1
    block: int = 32
    cluster: int = 1
    params: tuple[bytes, ...] = (bytes(8),)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(kernel="other"), "kernel other is not in this PTX, which has snippet"),
        (Shape(params=()), "snippet takes 1 parameters, got 0"),
        (Shape(params=(bytes(4),)), "a0 has 8 bytes, got 4"),
        (Shape(block=64), r"snippet requires blocks of \(32, 1, 1\), got \(64, 1, 1\)"),
        (Shape(grid=3, cluster=2), r"grid \(3, 1, 1\) is no multiple of cluster \(2, 1, 1\)"),
    ],
)
def test_launches_that_do_not_fit_are_refused(shape, message):
    text = module("", 1).replace("a0)", "a0) .reqntid 32, 1, 1")
    sizes = ((n, 1, 1) for n in (shape.grid, shape.block, shape.cluster))
    launch = Launch(shape.kernel, *sizes, 0, shape.params)
    with pytest.raises(ArgumentsError, match=message):
        Program(parse(text), launch, GlobalMemory())
