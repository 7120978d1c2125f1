"""Lanes together: votes, shuffles, matches, reductions; divergence, loops and ends of threads."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.emulator.errors import Deadlock, Fault, UnsupportedError
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import by_lane, by_lane_defined, execute

LANES = np.arange(32, dtype=np.uint32)
FULL = 0xFFFFFFFF
MASKS = (FULL, 0x0000FFFF, 0x80000001, 0x00000010, 0x5A5A5A5A)
RANDOM = [Settings(), *(Settings(schedule="random", seed=seed) for seed in range(3))]


def _in_mask(code, mask):
    """Code that only the lanes of a mask execute; d0 and d1 are 7 in the others."""
    return f"""
        mov.b32 d0, 7; mov.u32 r0, %laneid; mov.b32 r1, {mask:#x};
        shr.b32 r2, r1, r0; and.b32 r2, r2, 1; setp.eq.u32 p0, r2, 0;
        @p0 bra $OUT;
        {code}
        $OUT:
    """


def _ours(mask):
    return [lane for lane in range(32) if mask >> lane & 1]


@pytest.mark.parametrize("mask", MASKS)
def test_votes(mask):
    ours = _ours(mask)
    for case in range(4):
        held = np.random.default_rng(case).random(32) < (0, 0.5, 0.9, 1)[case]
        there = [bool(held[lane]) for lane in ours]
        wanted = {
            "all.pred": all(there),
            "any.pred": any(there),
            "uni.pred": len(set(there)) == 1,
            "ballot.b32": sum(bool(held[lane]) << lane for lane in ours),
        }
        for name, value in wanted.items():
            if name.endswith("pred"):
                code = f"vote.sync.{name} p1, x0, r1; selp.u32 d0, 1, 0, p1;"
            else:
                code = f"vote.sync.{name} d0, x0, r1;"
            (got,) = by_lane(_in_mask(code, mask), [held], [np.uint32])
            assert got.tolist() == [int(value) if mask >> i & 1 else 7 for i in range(32)], name
        code = "vote.sync.ballot.b32 d0, !x0, r1;"
        (got,) = by_lane(_in_mask(code, mask), [held], [np.uint32])
        assert got[ours[0]] == mask & ~wanted["ballot.b32"]


def _shuffled(mode, lane, b, c):
    """Source lane and whether it is in range (PTX ISA, shfl.sync)."""
    segment, clamp = c >> 8 & 31, c & 31
    b &= 31
    most, least = lane & segment | clamp & ~segment, lane & segment
    if mode == "up":
        return (lane - b, True) if lane - b >= most else (lane, False)
    source = {"down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
    return (source, True) if source <= most else (lane, False)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    values = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
    for width in (32, 16, 8, 2):
        c = 32 - width << 8 | (0 if mode == "up" else 31)
        for b in (0, 1, 3, 5, 16, 31, 33):
            code = f"shfl.sync.{mode}.b32 d0|p1, x0, {b}, {c}, -1; selp.u32 d1, 1, 0, p1;"
            got, valid = by_lane(code, [values], [np.uint32] * 2)
            wanted = [_shuffled(mode, lane, b, c) for lane in range(32)]
            assert got.tolist() == [values[source] for source, _ in wanted]
            assert valid.tolist() == [ok for _, ok in wanted]


def test_shuffle_by_a_lane_of_ones_own():
    sources = np.random.default_rng(2).permutation(32).astype(np.uint32)
    (got,) = by_lane("shfl.sync.idx.b32 d0, x0, x1, 31, -1;", [LANES, sources], [np.uint32])
    assert got.tolist() == sources.tolist()


def test_shuffle_carries_what_is_undefined():
    code = "setp.ne.u32 p1, x0, 3; @p1 mov.b32 r1, x0; shfl.sync.bfly.b32 d0, r1, 1, 31, -1;"
    _, (known,) = by_lane_defined(code, [LANES], [np.uint32])
    assert known.tolist() == [lane != 2 for lane in range(32)]


def test_shuffle_from_a_lane_that_is_not_here():
    code = _in_mask("shfl.sync.bfly.b32 d0, x0, 1, 31, r1;", 0x80000001)
    with pytest.raises(Fault, match="shuffle: lane 0 reads a lane that is not here"):
        by_lane(code, [LANES], [np.uint32])


@pytest.mark.parametrize("mask", MASKS)
def test_matches(mask):
    ours = _ours(mask)
    values = np.random.default_rng(3).integers(0, 4, 32).astype(np.uint64) << np.uint64(40)
    (got,) = by_lane(_in_mask("match.any.sync.b64 d0, x0, r1;", mask), [values], [np.uint32])
    for lane in ours:
        assert got[lane] == sum(1 << other for other in ours if values[other] == values[lane])
    code = _in_mask("match.all.sync.b64 d0|p1, x0, r1; selp.u32 d1, 1, 0, p1;", mask)
    code = "mov.b32 d1, 7;" + code
    equal = len({int(values[lane]) for lane in ours}) == 1
    for operand, same in ((values, equal), (np.full(32, 9, np.uint64), True)):
        masks, flags = by_lane(code, [operand], [np.uint32] * 2)
        assert {int(masks[lane]) for lane in ours} == {mask if same else 0}
        assert {int(flags[lane]) for lane in ours} == {int(same)}


_REDUCTIONS = {
    "add.u32": sum, "add.s32": sum, "min.u32": min, "max.u32": max,
    "and.b32": lambda v: np.bitwise_and.reduce(v), "or.b32": lambda v: np.bitwise_or.reduce(v),
    "xor.b32": lambda v: np.bitwise_xor.reduce(v),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_reductions_of_integers(mask):
    values = np.random.default_rng(4).integers(0, 2**32, 32, dtype=np.uint32)
    there = [int(values[lane]) for lane in _ours(mask)]
    wanted = {name: int(function(there)) % 2**32 for name, function in _REDUCTIONS.items()}
    number = [v - 2**32 if v >> 31 else v for v in there]
    wanted |= {"min.s32": min(number) % 2**32, "max.s32": max(number) % 2**32}
    for name, value in wanted.items():
        code = _in_mask(f"redux.sync.{name} d0, x0, r1;", mask)
        (got,) = by_lane(code, [values], [np.uint32])
        assert got.tolist() == [value if mask >> lane & 1 else 7 for lane in range(32)], name


def test_reductions_of_f32():
    """NaN is left out, unless .NaN; -0 is less than 0; .abs comes first (sm_100a)."""
    values = np.array([1.5, -3.0, np.nan, 0.0] * 8, np.float32)
    cases = {
        "min": -3.0, "max": 1.5, "min.NaN": np.nan, "max.NaN": np.nan,
        "min.abs": 0.0, "max.abs": 3.0,
    }  # fmt: skip
    for name, wanted in cases.items():
        code = f"redux.sync.{name}.f32 d0, x0, -1;"
        (got,) = by_lane(code, [values.view(np.uint32)], [np.uint32])
        expected = 0x7FFFFFFF if np.isnan(wanted) else np.float32(wanted).view(np.uint32)
        assert set(got.tolist()) == {int(expected)}, name
    for first in (0, 1):
        zeros = np.roll(np.array([0.0, -0.0] * 16, np.float32), first).view(np.uint32)
        (low,) = by_lane("redux.sync.min.f32 d0, x0, -1;", [zeros], [np.uint32])
        (high,) = by_lane("redux.sync.max.f32 d0, x0, -1;", [zeros], [np.uint32])
        assert (low[0], high[0]) == (0x80000000, 0)
    nan = np.full(32, np.nan, np.float32).view(np.uint32)
    (got,) = by_lane("redux.sync.min.f32 d0, x0, -1;", [nan], [np.uint32])
    assert got[0] == 0x7FFFFFFF


@pytest.mark.parametrize("mask", MASKS)
def test_one_lane_is_elected(mask):
    code = _in_mask("elect.sync r3|p1, r1; selp.u32 d0, 1, 0, p1; mov.b32 d1, r3;", mask)
    elected, leader = by_lane("mov.b32 d1, 7;" + code, [LANES], [np.uint32] * 2)
    first = _ours(mask)[0]
    wanted = [int(lane == first) if mask >> lane & 1 else 7 for lane in range(32)]
    assert elected.tolist() == wanted
    assert {int(leader[lane]) for lane in _ours(mask)} == {first}


def test_member_masks_must_fit():
    for code, message in (
        (_in_mask("vote.sync.any.pred p1, p0, 2;", 1), "an executing lane is not in mask"),
        ("vote.sync.any.pred p1, p1, x0;", "lanes name different member masks"),
    ):
        with pytest.raises(Fault, match=f"member mask: {message}"):
            by_lane(f"{code} mov.b32 d0, 0;", [LANES], [np.uint32])


# Divergence --------------------------------------------------


def test_active_lanes_under_divergence():
    code = """
        setp.lt.u32 p1, x0, 12; setp.lt.u32 p2, x0, 5;
        @!p1 bra $ELSE;
        @p2 activemask.b32 d0;
        @p2 bra $JOIN;
        activemask.b32 d0;
        bra.uni $JOIN;
        $ELSE: activemask.b32 d0;
        $JOIN: activemask.b32 d1;
    """
    inside, after = by_lane(code, [LANES], [np.uint32] * 2)
    wanted = [0x1F if i < 5 else 0xFE0 if i < 12 else FULL ^ 0xFFF for i in range(32)]
    assert inside.tolist() == wanted
    assert set(after.tolist()) == {FULL}, "lanes meet again"


@pytest.mark.parametrize("settings", RANDOM)
def test_nested_loops_of_each_lanes_own_length(settings):
    code = """
        mov.b32 d0, 0; mov.b32 r1, x0;
        $OUTER:
        setp.eq.u32 p1, r1, 0; @p1 bra $DONE;
        mov.b32 r2, r1;
        $INNER:
        add.u32 d0, d0, r2; sub.u32 r2, r2, 1;
        setp.gt.u32 p2, r2, 0; @p2 bra $INNER;
        sub.u32 r1, r1, 1;
        bra $OUTER;
        $DONE:
        bar.warp.sync -1;
        vote.sync.ballot.b32 d1, p1, -1;
    """
    counts = np.array([random.Random(i).randrange(9) for i in range(64)], np.uint32)
    sums, met = by_lane(code, [counts], [np.uint32] * 2, settings=settings)
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    assert sums.tolist() == [sum(map(triangle, range(n + 1))) for n in counts.tolist()]
    assert set(met.tolist()) == {FULL}


@pytest.mark.parametrize("settings", RANDOM)
@pytest.mark.parametrize("end", ["ret", "exit", "ret.uni"])
def test_lanes_that_end_early(end, settings):
    """The rest vote without them, and their output stays as it was."""
    out = np.zeros(32, np.uint32)
    body = f"""
        mov.u32 r0, %tid.x; mul.wide.u32 rd0, r0, 4; add.s64 rd0, g0, rd0;
        setp.gt.u32 p1, r0, 19; @p1 {end};
        setp.lt.u32 p2, r0, 100; vote.sync.ballot.b32 r1, p2, -1;
        st.global.b32 [rd0], r1;
    """
    execute(body, out, settings=settings)
    assert out.tolist() == [0xFFFFF] * 20 + [0] * 12


def test_what_a_false_guard_hides_does_not_happen():
    out = np.zeros(32, np.uint32)
    body = """
        mov.u32 r0, %tid.x; mul.wide.u32 rd0, r0, 4; add.s64 rd0, g0, rd0;
        setp.lt.u32 p1, r0, 8; setp.ge.u32 p2, r0, 8; @p2 mov.b64 rd0, 3;
        mov.b32 r1, 5;
        @p1 ld.global.b32 r1, [rd0];
        @p1 st.global.b32 [rd0], 9;
        @!p2 add.u32 r1, r1, 1;
        setp.gt.u32 p3, r0, 99; @p3 trap; @p3 brkpt; @p3 bra $NOWHERE; @p3 exit;
        $NOWHERE:
    """
    execute(body, out)
    assert out.tolist() == [9] * 8 + [0] * 24


def test_the_guard_itself_must_be_defined():
    with pytest.raises(Fault, match="uninitialised: the guard predicate is undefined in lane 4"):
        by_lane("setp.lt.u32 p2, x0, 4; @p2 setp.eq.u32 p1, x0, x0; @p1 mov.b32 d0, 1;",
                [LANES], [np.uint32])  # fmt: skip


def test_trap():
    with pytest.raises(Fault, match="trap: the kernel stopped itself") as caught:
        execute("setp.eq.u32 p1, 0, 0; @p1 trap;")
    assert "in CTA (0, 0, 0) warp 0 at line" in str(caught.value)


def test_endless_loops_end():
    with pytest.raises(Deadlock, match=r"instructions and no end \(max_instructions\)") as caught:
        execute("$AGAIN: bra $AGAIN;", settings=Settings(max_instructions=20_000))
    assert "`$AGAIN: bra $AGAIN;`: can run" in str(caught.value)


def test_hints_and_timing_do_nothing():
    out = np.zeros(32, np.uint32)
    body = """
        nanosleep.u32 100; prefetch.global.L2 [g0]; prefetchu.L1 [g0];
        applypriority.global.L2::evict_normal [g0], 128; griddepcontrol.wait;
        griddepcontrol.launch_dependents; setmaxnreg.inc.sync.aligned.u32 64;
        createpolicy.fractional.L2::evict_last.b64 rd1, 1.0;
        mov.u32 r0, %tid.x; mul.wide.u32 rd0, r0, 4; add.s64 rd0, g0, rd0;
        st.global.L2::cache_hint.b32 [rd0], r0, rd1;
    """
    execute(body, out, outputs=1)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    "code",
    [
        "discard.global.L2 [g0], 128;",  # destroys what memory holds
        "prefetch.foo [g0];",
        "prefetch.shared.L1 [g0];",
        "prefetchu.L2 [g0];",
        "nanosleep.f32 100;",
        "applypriority.global.L2::evict_last [g0], 128;",
        "createpolicy.L2::evict_last.b64 rd1, 1.0;",
        "createpolicy.fractional.L2::evict_first.L2::evict_last.b64 rd1, 1.0;",
        "shfl.sync.b32 r1, r0, 1, 31, -1;",
        "vote.sync.pred p1, p1, -1;",
        "vote.sync.any.b32 r1, p1, -1;",
        "match.sync.b32 r1, r0, -1;",
        "redux.sync.add.abs.s32 r1, r0, -1;",
        "redux.sync.min.NaN.u32 r1, r0, -1;",
        "redux.sync.and.u32 r1, r0, -1;",
        "redux.sync.add.f32 r1, r0, -1;",
    ],
)
def test_forms_that_ptx_lacks_are_refused(code):
    with pytest.raises(UnsupportedError, match=rf"{code.split('.')[0]}.* is not emulated"):
        execute(code, np.zeros(32, np.uint32))


def test_the_clamp_of_a_shuffle_must_be_defined():
    with pytest.raises(Fault, match="the clamp operand of a shuffle is undefined"):
        by_lane("shfl.sync.idx.b32 d0, x0, 0, r9, -1;", [LANES], [np.uint32])


def test_special_registers():
    names = ["%tid.x", "%laneid", "%warpid", "%ntid.x", "%ctaid.x", "%nctaid.x", "%lanemask_lt",
             "%lanemask_ge", "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x"]  # fmt: skip
    code = "".join(f"mov.u32 d{i}, {name};" for i, name in enumerate(names))
    x = np.zeros(1024, np.uint32)
    got = dict(zip(names, by_lane(code, [x], [np.uint32] * len(names), cluster=2), strict=True))
    n = np.arange(1024)
    lane, cta = n % 32, n // 256
    wanted = {
        "%tid.x": n % 256, "%laneid": lane, "%warpid": n % 256 // 32, "%ntid.x": 256 + 0 * n,
        "%ctaid.x": cta, "%nctaid.x": 4 + 0 * n, "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_ge": 2**32 - (1 << lane), "%cluster_ctarank": cta % 2,
        "%cluster_nctarank": 2 + 0 * n, "%clusterid.x": cta // 2,
    }  # fmt: skip
    for name in names:
        assert (got[name] == wanted[name]).all(), name
