"""Rung 9: the project's own kernels, on the way that users' calls take, give the reference's bits.

The PTX is that of sm_90a, sm_100a and sm_120a; on the latter two E2M1 is converted by hardware and
pairs of float32 are computed at once. vectors/own_kernels.json holds digests of what a Hopper GPU
made of the same calls (`own_kernels.record`): the bits of the emulator.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

import filter_blocks
import vectors

from cute_cases import SPECIAL
from fos_compile.kernels.cute import tables
from tests.emulator import own_kernels
from tests.emulator.errors import Fault
from tests.emulator.machine.program import Settings
from tests.emulator.own_kernels import ARCHS, CASES, OPS, Device, has

slow = pytest.mark.slow


def equal(actual, expected):
    """Bit for bit, except that one NaN is as good as another."""
    return len(actual) == len(expected) and all(map(_equal, actual, expected))


def _equal(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = a == b
    if a.is_floating_point():
        same = (same & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
    return bool(same.all())


@functools.lru_cache(maxsize=256)
def outputs(name, arch):
    """What a case gives, and the kernels that ran."""
    device = Device(arch)
    return CASES[name].run(device), [key.name for key, _ in device.runs]


def everywhere():
    """Every case on every architecture; all but the chosen ones are slow."""
    for name, arch in itertools.product(CASES, ARCHS):
        if not has(arch, CASES[name].options.values()):
            continue
        marks = () if arch in CASES[name].archs else slow
        yield pytest.param(name, arch, marks=marks, id=f"{name}-{arch}".replace(", ", "-"))


@pytest.mark.parametrize(("name", "arch"), list(everywhere()))
def test_bits_of_the_reference(name, arch):
    found, kernels = outputs(name, arch)
    assert kernels == [CASES[name].kernel]
    assert equal(found, CASES[name].expected())


def key_of(case):
    """What serves a case, by the tables."""
    given = {**tables.DEFAULTS[case.op], **case.options, "scaled": "qs" in case.options}
    x = case.inputs()[0]
    x = x.mT if given.get("transpose") else x
    names = tables.NAMES[case.op]
    options = (True,) if case.op == "amax" else tuple(given[name] for name in names)
    return next(
        entry.key(x.dtype, options)
        for entry in tables.TABLES[case.op]
        if not entry.refuses(names, x.dtype, options) and not entry.layout(x)
    )


def choices(key):
    pair = "rounding_row" in dict(key.options)
    return [((key.name, pair), choice) for choice in [("dtype", key.dtype), *key.options]]


def test_cases_have_every_choice_of_every_kernel():
    """And every architecture has every kernel."""
    keys = [key_of(case) for case in CASES.values()]
    assert [key.name for key in keys] == [case.kernel for case in CASES.values()]
    wanted = {choice for key in own_kernels.every_key() for choice in choices(key)}
    assert not wanted - {choice for key in keys for choice in choices(key)}
    names = {key.name for key in own_kernels.every_key()} - {"dequantize_blocks"}
    for arch in ARCHS:
        assert names <= {case.kernel for case in CASES.values() if arch in case.archs}


def label(key):
    return "-".join([key.name, key.dtype, *(str(value) for _, value in key.options)])


@slow
@pytest.mark.parametrize(
    ("key", "arch"),
    [
        pytest.param(key, arch, id=f"{label(key)}-{arch}")
        for key, arch in itertools.product(own_kernels.every_key(), ARCHS)
        if has(arch, dict(key.options).values())
    ],
)
def test_self_test_of_every_kernel(key, arch):
    """As in a process on a GPU that first uses it."""
    op, entry = own_kernels.every_key()[key]
    own_kernels.host.cache_clear()
    assert Device(arch).disagreement(op, entry, key) == ""


@slow
@pytest.mark.parametrize("name", vectors.goldens())
def test_bits_of_the_published_reference(name):
    """Made on a CPU, see ../shared/goldens."""
    case = vectors.goldens()[name]
    options = vectors.quantize_options(case.options)
    found = Device("sm_90a").call("quantize", case.x, case.amax, None, **options)
    assert equal(found, (case.values, case.scales))


# Numbers that are hard ----------------------------------------------------------------------------

SMALL = (20, 72)
HARD = [
    ("filtered", "sm_90a", ()),
    ("filtered", "sm_100a", ()),
    ("tiles, pair", "sm_90a", ()),
    ("blocks, realized", "sm_90a", ()),
    ("blocks, mxfp4, rotated columns", "sm_100a", ()),
    ("columns", "sm_90a", slow),
    ("pair", "sm_90a", slow),
    ("pair", "sm_120a", slow),
    ("pair, rotated dice", "sm_100a", slow),
    ("tiles, pair", "sm_100a", slow),
    ("tiles, realized", "sm_100a", slow),
    ("blocks, unbiased", "sm_90a", slow),
    ("blocks", "sm_100a", slow),
]


def arguments(case, x, amax):
    """Of a quantizer, with an amax of its own or a given one."""
    amax = x.abs().max().float() if amax is None else torch.as_tensor(amax)
    return (x, *[amax] * (1 + (case.op == "quantize_pair")), torch.tensor([-7]))


def check(case, arch, x, amax):
    given, keywords = arguments(case, x, amax), case.keywords()
    expected = OPS[case.op][0].reference(*given, **keywords)
    expected = expected if isinstance(expected, tuple) else (expected,)
    return equal(Device(arch).call(case.op, *given, **keywords), expected)


@pytest.mark.parametrize(
    ("name", "arch"), [pytest.param(name, arch, marks=marks) for name, arch, marks in HARD]
)
def test_special_numbers(name, arch):
    """Zeros of both signs, NaN, infinities, subnormals, ties; every kind of amax."""
    case = dataclasses.replace(CASES[name], shape=SMALL, view=own_kernels.ROWS)
    x = case.inputs()[0]
    wrong = [
        special for special, (make, amax) in SPECIAL.items() if not check(case, arch, make(x), amax)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("name", "arch"),
    [("filtered", "sm_90a"), ("pair", "sm_100a"), pytest.param("pair", "sm_90a", marks=slow)],
)
def test_blocks_that_are_hard_to_decide(name, arch):
    """Near ties of codes and of scales, by the families that the filters are tested with."""
    generator = torch.Generator().manual_seed(0)
    families = [make(generator)[:40].reshape(-1, 128) for make in filter_blocks.DATA]
    x = torch.cat(families).bfloat16()
    most = float(x[5:].abs().max())
    for amax in (most, 1536.0, most / 3):
        assert check(CASES[name], arch, x, amax), amax


# Orders of events ---------------------------------------------------------------------------------

SETTINGS = [
    Settings(mode="late"),
    Settings(mode="eager", schedule="random", seed=1),
    Settings(mode="late", schedule="random", seed=2),
    Settings(mode="random", schedule="random", seed=3),
    Settings(mode="random", schedule="random", seed=4),
]


@pytest.mark.parametrize("name", ["filtered, narrow slice", "pair, rotated dice", "tiles, columns"])
def test_any_order_of_events(name):
    """Kernels that wait for copies and for each other's warps; races are looked for."""
    for settings in SETTINGS:
        found = CASES[name].run(Device("sm_90a", settings))
        assert equal(found, CASES[name].expected()), settings


# Mutants ------------------------------------------------------------------------------------------


def change(pattern, replacement, which=0):
    """An edit of the match number `which` of a pattern."""

    def edit(text):
        found = list(re.finditer(pattern, text))
        assert len(found) > which, f"{len(found)} of {pattern}"
        start, end = found[which].span()
        return text[:start] + found[which].expand(replacement) + text[end:]

    return edit


BARRIER = r"bar\.sync\s+0;"
PAIR = dataclasses.replace(CASES["pair"], shape=(40, 88))
MUTANTS = {
    "quantized before the tile is there": (PAIR, change(BARRIER, ""), "uninitialised"),
    "finished before all are queued": (PAIR, change(BARRIER, "", 1), "race"),
    "scales written before they are there": (PAIR, change(BARRIER, "", 2), "race"),
    "copies not waited for": (PAIR, change(r"cp\.async\.wait_all;", ""), "race"),
    "a column too many": (
        PAIR, change(r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;)", r"setp.le.s32\1"),
        "out of bounds",
    ),
    "rows that do not exist are read": (
        PAIR, change(r"selp\.b32 n, 16, 0, p; cp", "mov.b32 n, 16; cp", 4), "out of bounds",
    ),
    "a swizzle of the copy": (
        PAIR, change(r"(xor\.b32\s+%r\d+, %r\d+), 64;", r"\1, 32;", 1), "bits",
    ),
    "a swizzle of the columns": (
        PAIR, change(r"(xor\.b32\s+%r\d+, %r\d+), 48;", r"\1, 16;"), "bits",
    ),
    "the queue's length not counted": (
        PAIR, change(r"atom\.shared\.add\.u32 (\S+) (\S+), \S+;", r"ld.shared.u32 \1 \2;"), "race",
    ),
    "a word of the dice": (CASES["rows"], change("0xd2511f53", "0xd2511f51", 5), "bits"),
    "4/6 of another number": (PAIR, change("1069547520", "1067450368"), "bits"),
    "a warp's copies not waited for": (
        CASES["tiles, columns"], change(r"cp\.async\.wait_all;", ""), "race",
    ),
    "columns not transposed": (
        CASES["tiles, columns"], change(r"m8n8\.x4\.trans", "m8n8.x4"), "bits",
    ),
    "undecided blocks before they are queued": (
        CASES["filtered, rounds"], change(BARRIER, ""), "race",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    """In round robin, eager, where least goes wrong: by their bits or by a check."""
    case, edit, caught = MUTANTS[mutant]
    try:
        found = case.run(Device("sm_90a", edit=edit))
    except Fault as fault:
        assert fault.check == caught
    else:
        assert caught == "bits" and not equal(found, case.expected())


# A GPU --------------------------------------------------------------------------------------------


def test_bits_of_a_gpu():
    """sm_90a in the emulator and on the GPU that RECORD names: digests of the same bytes."""
    recorded = json.loads(own_kernels.RECORD.read_text())
    assert recorded["arch"] == "sm_90a"
    names = [name for name, case in CASES.items() if has("sm_90a", case.options.values())]
    assert set(names) == set(recorded["cases"])
    for name in names:
        known = recorded["cases"][name]
        assert own_kernels.digest(CASES[name].inputs()) == known["inputs"], name
        found, _ = outputs(name, "sm_90a")
        assert own_kernels.digest(found) == known["outputs"], name
