"""Loads, stores, atomics, fences, barriers, copies and matrix moves, from PTX by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.errors import Deadlock, Fault
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import execute

# Lane i's own word of each global array: rd10 in g0, rd11 in g1.
PLACE = """
    mov.u32 r0, %tid.x; mov.u32 r9, %ctaid.x; mov.u32 r8, %ntid.x; mad.lo.u32 r0, r9, r8, r0;
    mul.wide.u32 rd9, r0, 4; add.s64 rd10, g0, rd9;
"""
PLACES = PLACE + "add.s64 rd11, g1, rd9;"
BOTH = [Settings(mode=mode, schedule="random", seed=4) for mode in MODES]


def _words(n=32, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)


def _fault(check, body, *arrays, match=None, **options):
    with pytest.raises(Fault, match=match) as caught:
        execute(body, *arrays, **options)
    assert caught.value.check == check, caught.value
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16), ("b32", np.uint32)],
)
def test_narrow_loads_are_extended(kind, dtype):
    x = _words(32).astype(dtype)
    y = np.zeros(32, np.uint32)
    body = f"""
        {PLACES} mul.wide.u32 rd1, r0, {x.itemsize}; add.s64 rd1, g0, rd1;
        ld.global.{kind} r1, [rd1]; st.global.b32 [rd11], r1;
    """
    execute(body, x, y, outputs=1)
    assert (y == x.astype(np.int64).astype(np.uint32)).all()


def test_vectors_offsets_and_sinks():
    x, y = _words(128), np.zeros(128, np.uint32)
    body = f"""
        {PLACE} shl.b64 rd1, rd9, 2; add.s64 rd2, g0, rd1; add.s64 rd3, g1, rd1;
        ld.global.nc.L1::no_allocate.v4.b32 {{r1, r2, r3, r4}}, [rd2];
        ldu.global.v2.b32 {{_, r5}}, [rd2+8];
        st.global.v2.b32 [rd3], {{r4, r3}};
        st.global.v2.b16 [rd3+8], {{h1, h2}}; mov.b32 {{h3, h4}}, r5;
        st.global.v2.b16 [rd3+8], {{h3, h4}};
        mov.b64 rd5, rd3; add.s64 rd5, rd5, 16; st.global.b32 [rd5+-4], r1;
    """
    execute(body, x, y, outputs=1)
    a = x.reshape(32, 4)
    assert (y.reshape(32, 4) == np.stack([a[:, 3], a[:, 2], a[:, 3], a[:, 0]], 1)).all()


def test_local_and_parameter_memory():
    x, y = _words(), np.zeros(32, np.uint32)
    body = f"""
        .local .align 8 .b8 depot[16]; .reg .b64 sp; {PLACES}
        mov.u64 sp, depot; cvta.local.u64 rd1, sp;
        ld.global.b32 r1, [rd10]; st.local.b32 [depot+4], r1; st.b32 [rd1+8], r0;
        ld.local.b32 r2, [sp+4]; ld.b32 r3, [rd1+8]; add.u32 r2, r2, r3;
        st.global.b32 [rd11], r2;
    """
    execute(body, x, y, outputs=1)
    assert (y == x + np.arange(32, dtype=np.uint32)).all()


def test_generic_addresses():
    x, y = _words(), np.zeros(32, np.uint32)
    body = f"""
        .shared .align 4 .b8 tile[128]; {PLACES}
        mov.u64 rd1, tile; add.s64 rd1, rd1, rd9; cvta.shared.u64 rd2, rd1;
        cvta.to.shared.u64 rd3, rd2; cvt.u32.u64 r3, rd3; cvta.global.u64 rd4, rd10;
        cvta.to.global.u64 rd4, rd4;
        ld.b32 r1, [rd4]; st.b32 [rd2], r1; ld.shared.b32 r2, [r3]; st.b32 [rd11], r2;
    """
    execute(body, x, y, outputs=1)
    assert (y == x).all()


def test_undefined_memory_spreads_until_it_decides():
    body = """.shared .align 4 .b8 tile[256]; mov.u32 r1, %tid.x; mov.u32 r2, tile;
              {} ld.shared.b32 r3, [r2]; add.u32 r3, r3, 1; {}"""
    execute(body.format("", ""))
    text = _fault("uninitialised", body.format("", "setp.eq.u32 p1, r3, 0; @p1 bra $X; $X:"),
                  match="the guard predicate is undefined in lane 0")  # fmt: skip
    assert "`.shared" in text or "bra $X" in text
    _fault("uninitialised", body.format("", "ld.shared.b32 r4, [r3];"), match="an address")
    execute(body.format("st.shared.b32 [r2], 5;", "setp.eq.u32 p1, r3, 0; @p1 bra $X; $X:"))


@pytest.mark.parametrize(
    ("body", "check", "match"),
    [
        ("ld.global.b32 r1, [g0+124];", "out of bounds", "load of 4 bytes at 0 bytes past the end"),
        ("ld.global.b32 r1, [g0+-4];", "out of bounds", "load of 4 bytes at 4 bytes before"),
        (
            "ld.global.v2.b32 {r1, r2}, [g0+120];",
            "out of bounds",
            "bytes 120 to 128 of g0",
        ),
        ("ld.global.b64 rd1, [g0+4];", "misaligned", "load of 8 bytes at"),
        ("st.shared.b32 [0], 1;", "out of bounds", "store of shared bytes -1024 to -1020"),
        ("mov.u32 r1, %tid.x; st.global.b32 [g0], r1;", "race", "two lanes of one store write"),
        ("ld.param.b64 rd1, [a0+8];", "out of bounds", "parameter bytes 8"),
    ],
)
def test_bad_addresses(body, check, match):
    _fault(check, body, np.zeros(31, np.uint32), match=match)


# Atomics --------------------------------------------------


def _wrapping(old, b):
    return 0 if old >= b else old + 1


def _falling(old, b):
    return b if old == 0 or old > b else old - 1


_S32 = lambda v: v - 2**32 if v >> 31 else v  # noqa: E731
_ATOMICS = {
    "add.u32": lambda a, b: a + b, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b, "min.u32": min, "max.u32": max, "inc.u32": _wrapping,
    "dec.u32": _falling, "exch.b32": lambda a, b: b,
    "min.s32": lambda a, b: min(_S32(a), _S32(b)), "max.s32": lambda a, b: max(_S32(a), _S32(b)),
}  # fmt: skip


@pytest.mark.parametrize("name", _ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(name, space):
    """Four lanes a word, one after the other: whatever the order, each sees the one before."""
    x, start = _words(32, 1), _words(8, 2)
    x[::3] = np.arange(11)
    out, final = np.zeros(32, np.uint32), start.copy()
    copy = "ld.global.b32 r5, [rd3]; st.shared.b32 [r3], r5; bar.sync 0;"
    back = "ld.shared.b32 r7, [r3]; st.global.b32 [rd3], r7;"
    place = "r3" if space == "shared" else "rd3"
    body = f"""
        .shared .align 4 .b8 tile[32]; {PLACES}
        and.b32 r1, r0, 7; mul.wide.u32 rd3, r1, 4; add.s64 rd3, g2, rd3;
        mov.u32 r3, tile; mad.lo.u32 r3, r1, 4, r3; {copy if space == "shared" else ""}
        ld.global.b32 r4, [rd10]; atom.{space}.{name} r6, [{place}], r4;
        st.global.b32 [rd11], r6; bar.sync 0; {back if space == "shared" else ""}
    """
    execute(body, x, out, final)
    for word in range(8):
        value = int(start[word])
        for lane in range(word, 32, 8):
            assert out[lane] == value
            value = int(_ATOMICS[name](value, int(x[lane]))) % 2**32
        assert final[word] == value


def test_compare_and_swap_and_reductions():
    total, seen = np.zeros(2, np.uint64), np.zeros(1, np.float32)
    body = f"""
        {PLACE} mov.b64 rd1, 1; red.global.add.u64 [g0], rd1;
        $TRY: ld.relaxed.gpu.global.b64 rd2, [g0+8]; add.s64 rd3, rd2, 3;
        atom.global.cas.b64 rd4, [g0+8], rd2, rd3; setp.ne.s64 p1, rd4, rd2; @p1 bra $TRY;
        red.global.add.f32 [g1], 0f3F000000;
    """
    execute(body, total, seen)
    assert total.tolist() == [32, 96]
    assert seen[0] == 16


# Order --------------------------------------------------

HANDOFF = """
    .shared .align 4 .b8 tile[8]; mov.u32 r1, %tid.x; mov.u32 r2, tile; setp.ge.u32 p1, r1, 32;
    setp.eq.u32 p2, r1, 0; @p2 st.shared.b32 [r2+4], 0; bar.sync 0;
    @p1 bra $READ;
    st.shared.b32 [r2], 42; {write}
    bra.uni $END;
    $READ: {read} setp.eq.u32 p3, r3, 0; @p3 bra $READ; {after}
    ld.shared.b32 r4, [r2]; st.global.b32 [g0], r4;
    $END:
"""


@pytest.mark.parametrize(
    ("write", "read", "after"),
    [
        ("st.release.cta.shared.b32 [r2+4], 1;", "ld.acquire.cta.shared.b32 r3, [r2+4];", ""),
        ("fence.acq_rel.cta; st.relaxed.cta.shared.b32 [r2+4], 1;",
         "ld.relaxed.cta.shared.b32 r3, [r2+4];", "fence.acq_rel.cta;"),
        ("membar.cta; st.volatile.shared.b32 [r2+4], 1;",
         "ld.volatile.shared.b32 r3, [r2+4];", "membar.cta;"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["round_robin", "random"])
def test_flags_order_accesses(write, read, after, schedule):
    out = np.zeros(1, np.uint32)
    body = HANDOFF.format(write=write, read=read, after=after)
    execute(body, out, threads=64, settings=Settings(schedule=schedule))
    assert out[0] == 42


def test_a_flag_without_order_is_a_race():
    out = np.zeros(1, np.uint32)
    relaxed = HANDOFF.format(
        write="st.relaxed.cta.shared.b32 [r2+4], 1;",
        read="ld.relaxed.cta.shared.b32 r3, [r2+4];",
        after="",
    )
    text = _fault("race", relaxed, out, threads=64, match="read after write at byte 0 of CTA")
    assert "nothing orders the two" in text


# Barriers --------------------------------------------------


@pytest.mark.parametrize("schedule", ["round_robin", "random"])
def test_named_barriers_and_reductions_over_a_cta(schedule):
    out = np.zeros(384, np.uint32)
    body = f"""
        {PLACE} setp.lt.u32 p1, r0, 40;
        bar.red.popc.u32 r1, 0, p1; barrier.cta.red.and.pred p2, 1, 128, p1;
        bar.red.or.pred p3, 2, p1;
        setp.lt.u32 p4, r0, 64; @p4 bar.arrive 3, 128; @!p4 bar.sync 3, 128; barrier.sync 0;
        selp.u32 r2, 10000, 0, p2; selp.u32 r3, 1000, 0, p3; add.u32 r1, r1, r2;
        add.u32 r1, r1, r3; st.global.b32 [rd10], r1;
    """
    execute(body, out[:128], outputs=1, threads=128, settings=Settings(schedule=schedule))
    assert set(out[:128].tolist()) == {1040}


@pytest.mark.parametrize(
    ("body", "check", "match"),
    [
        ("bar.sync 16;", "barrier", "barrier 16: there are 16"),
        ("bar.sync 0, 33;", "barrier", "33"),
        ("barrier.cluster.wait;", "barrier", "wait without an arrive"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "barrier", "arrive twice"),
    ],
)
def test_barriers_that_are_wrong(body, check, match):
    _fault(check, PLACE + body, np.zeros(32, np.uint32), match=match)


def test_a_barrier_that_nobody_else_reaches_is_a_deadlock():
    with pytest.raises(Deadlock, match=r"warp 0 at line \d+ `bar.sync 1, 64;`: bar 1: 32 of 64"):
        execute("bar.sync 1, 64;")


MBARRIER = """.shared .align 8 .b8 bar[16]; mov.u32 r1, %tid.x; mov.u32 r2, bar;
    setp.eq.u32 p1, r1, 0; @p1 mbarrier.init.shared.b64 [r2], {count}; bar.sync 0;
"""


@pytest.mark.parametrize("settings", BOTH)
def test_mbarrier_phases(settings):
    """Arrivals with counts, states, parities, and one that is dropped."""
    out = np.zeros(64, np.uint32)
    wait = "{0}: mbarrier.{1}.shared.b64 p2, [r2], {2}; @!p2 bra {0};".format
    body = MBARRIER.format(count=64) + PLACE + f"""
        mbarrier.arrive.shared.b64 rd1, [r2]; {wait("$A", "try_wait", "rd1")}
        mbarrier.test_wait.parity.shared.b64 p3, [r2], 0; {wait("$B", "try_wait.parity", "0")}
        bar.sync 0; @p1 mbarrier.arrive.release.cta.shared.b64 _, [r2], 64;
        {wait("$C", "try_wait.parity.acquire.cta", "1")}
        bar.sync 0; setp.lt.u32 p4, r1, 32; @p4 mbarrier.arrive_drop.shared.b64 _, [r2];
        @!p4 mbarrier.arrive.shared.b64 _, [r2]; {wait("$D", "test_wait.parity", "0")}
        bar.sync 0; @!p4 mbarrier.arrive.shared.b64 _, [r2]; {wait("$E", "try_wait.parity", "1")}
        bar.sync 0; @p1 mbarrier.inval.shared.b64 [r2]; bar.sync 0;
        @p1 mbarrier.init.shared.b64 [r2], 1;
        selp.u32 r3, 5, 6, p3; st.global.b32 [rd10], r3;
    """  # fmt: skip
    execute(body, out, outputs=1, threads=64, settings=settings)
    assert set(out.tolist()) == {5}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("mbarrier.arrive.shared.b64 _, [r2];", r"32 arrivals at the mbarrier .* expects 4 more"),
        ("@p1 mbarrier.init.shared.b64 [r2], 4;", "mbarrier.init of the live one"),
        # Two of four are dropped, one phase of two follows, and half of another.
        (
            "@p1 mbarrier.arrive_drop.shared.b64 _, [r2], 2;"
            + "".join(f"@p1 mbarrier.arrive.shared.b64 _, [r2], {n};" for n in (2, 2, 1)),
            r"half done: .* phase 2 .* 1 of 2 arrivals",
        ),
        ("@p1 mbarrier.init.shared.b64 [r2+8], 0;", "count 0 of mbarrier.init"),
        ("@p1 mbarrier.arrive.shared.b64 _, [r2+8];", "no mbarrier was made there"),
        ("@p1 ld.shared.b32 r5, [r2+4];", "load touches the mbarrier at byte 4"),
        ("@p1 st.shared.b32 [r2], 1;", "store touches the mbarrier at byte 0"),
        ("@p1 mbarrier.try_wait.parity.shared.b64 p2, [r2], 2;", "parity 2: 0 or 1"),
        ("@p1 mbarrier.arrive.shared.b64 _, [r2], 0;", "count 0"),
        ("@p1 mbarrier.arrive.shared.b64 _, [r2];", r"exits with a phase half done: .* 3 of 4"),
        ("@p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [r2], 48;", "exits with bytes pending"),
    ],
)
def test_mbarriers_that_are_wrong(body, match):
    _fault("barrier", MBARRIER.format(count=4) + body, match=match)


def test_distributed_shared_memory():
    out = np.zeros(64, np.uint32)
    body = f"""
        .shared .align 4 .b8 tile[128]; {PLACE} mov.u32 r1, %laneid; mov.u32 r2, %cluster_ctarank;
        mov.u32 r3, tile; mad.lo.u32 r3, r1, 4, r3; xor.b32 r4, r2, 1;
        mapa.shared::cluster.u32 r5, r3, r4; getctarank.shared::cluster.u32 r6, r5;
        barrier.cluster.arrive; barrier.cluster.wait;
        mad.lo.u32 r7, r2, 100, r1; st.shared::cluster.b32 [r5], r7;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        ld.shared.b32 r8, [r3]; mad.lo.u32 r8, r6, 1000, r8; st.global.b32 [rd10], r8;
    """
    execute(body, out, outputs=1, ctas=2, cluster=2)
    lane = np.arange(32)
    assert out.tolist() == [*(1100 + lane), *lane]
