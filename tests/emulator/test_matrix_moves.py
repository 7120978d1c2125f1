"""Copies without tensor maps (cp.async, cp.async.bulk), ldmatrix and stmatrix, from PTX."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.errors import Fault
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import execute

IN_MODES = [Settings(mode=mode, seed=1) for mode in MODES]
TILE = ".shared .align 128 .b8 tile[4096]; .shared .align 8 .b8 bar[8];"
PLACE = f"""
    {TILE} mov.u32 r0, %tid.x; mov.u32 r1, tile; mov.u32 r2, bar;
    mad.lo.u32 r3, r0, 16, r1; mul.wide.u32 rd1, r0, 16; add.s64 rd2, g0, rd1;
"""
BACK = """
    ld.shared.v4.b32 {r20, r21, r22, r23}, [r3]; add.s64 rd3, g1, rd1;
    st.global.v4.b32 [rd3], {r20, r21, r22, r23};
"""


def _words(n=128):
    return np.random.default_rng(n).integers(0, 2**32, n, dtype=np.uint32)


def _fault(check, body, *arrays, match=None, settings=None):
    with pytest.raises(Fault, match=match) as caught:
        execute(body, *arrays, settings=settings)
    assert caught.value.check == check, caught.value


@pytest.mark.parametrize("settings", IN_MODES, ids=MODES)
@pytest.mark.parametrize(
    ("copy", "kept"),
    [
        ("cp.async.cg.shared.global [r3], [rd2], 16;", 4),
        ("cp.async.ca.shared.global [r3], [rd2], 16, 8;", 2),
        ("cp.async.ca.shared.global [r3], [rd2], 8; cp.async.ca.shared.global [r3+8], [rd2], 8, 0;",
         2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wait", ["cp.async.commit_group; cp.async.wait_group 0;",
                                  "cp.async.wait_all;"])  # fmt: skip
def test_copies_of_lanes(copy, kept, wait, settings):
    x, y = _words(), np.zeros(128, np.uint32)
    execute(f"{PLACE} {copy} {wait} {BACK}", x, y, outputs=1, settings=settings)
    wanted = x.reshape(32, 4).copy()
    wanted[:, kept:] = 0
    assert (y.reshape(32, 4) == wanted).all()


@pytest.mark.parametrize("settings", IN_MODES, ids=MODES)
def test_groups_are_waited_for_in_order(settings):
    """The first of three groups is known to be done with two left; more than there are is fine."""
    x, y = _words(), np.zeros(128, np.uint32)
    other = "add.u32 r4, r3, {}; cp.async.cg.shared.global [r4], [rd2], 16; cp.async.commit_group;"
    body = f"""{PLACE} cp.async.cg.shared.global [r3], [rd2], 16; cp.async.commit_group;
        {other.format(512)} {other.format(1024)} cp.async.wait_group 5; cp.async.wait_group 2;
        {BACK}
        cp.async.wait_all;"""
    execute(body, x, y, outputs=1, settings=settings)
    assert (x == y).all()
    for left in (3, 5):
        bad = body.replace("wait_group 2", f"wait_group {left}")
        _fault("race", bad, x, y, settings=settings, match="read after write at byte 0")


def test_copies_that_are_wrong():
    x, y = _words(), np.zeros(128, np.uint32)
    _fault("race", f"{PLACE} cp.async.cg.shared.global [r3], [rd2], 16; {BACK}", x, y)
    _fault("misaligned", f"{PLACE} cp.async.cg.shared.global [r3], [rd2+8], 16;", x, y)
    copy = "cp.async.ca.shared.global [r3], [rd2], 8, 9;"
    _fault("cp.async", PLACE + copy, x, y, match="source size 9 of 8")


LOAD = f"""
    {PLACE} setp.eq.u32 p1, r0, 0;
    @p1 mbarrier.init.shared.b64 [r2], 1; bar.warp.sync -1; @!p1 bra $WAIT;
    mbarrier.arrive.expect_tx.shared.b64 _, [r2], {{bytes}};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [r1], [g0], {{size}}, [r2];
    $WAIT: mbarrier.try_wait.parity.shared.b64 p2, [r2], 0; @!p2 bra $WAIT;
"""
STORE = f"""
    {PLACE} ld.global.v4.b32 {{r20, r21, r22, r23}}, [rd2]; st.shared.v4.b32 [r3],
    {{r20, r21, r22, r23}}; fence.proxy.async.shared::cta; bar.warp.sync -1;
    setp.eq.u32 p1, r0, 0; @!p1 bra $END;
    cp.async.bulk.global.shared::cta.bulk_group [g1], [r1], 512;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    $END:
"""


@pytest.mark.parametrize("settings", IN_MODES, ids=MODES)
def test_bulk_copies(settings):
    for body in (LOAD.format(bytes=512, size=512) + BACK, STORE):
        x, y = _words(), np.zeros(128, np.uint32)
        execute(body, x, y, outputs=1, settings=settings)
        assert (x == y).all()


@pytest.mark.parametrize("settings", IN_MODES, ids=MODES)
def test_bulk_copies_that_are_wrong(settings):
    arrays = _words(), np.zeros(128, np.uint32)
    all_lanes = LOAD.format(bytes=512, size=512).replace("@!p1 bra $WAIT;", "")
    for body, check, match in (
        (LOAD.format(bytes=496, size=512), "deadlock", "0 of 1 arrivals and -16 bytes pending"),
        (LOAD.format(bytes=512, size=500), "bulk copy", "500 bytes: must be a multiple of 16"),
        (LOAD.format(bytes=528, size=528), "out of bounds", "bulk load of 528 bytes at"),
        (LOAD.format(bytes=512, size=512).replace("[r1]", "[r1+8]"), "misaligned", "bulk load"),
        (all_lanes, "barrier", "32 arrivals at .* which expects 1 more"),
        (all_lanes.replace("    mbarrier.arrive", "@p1 mbarrier.arrive"), "bulk copy", "32 lanes"),
        (STORE.replace("fence.proxy.async.shared::cta;", ""), "missing proxy fence", "read after"),
        (STORE.replace("cp.async.bulk.commit_group;", ""), "bulk copy", "never committed"),
        (STORE.replace("cp.async.bulk.wait_group 0;", ""), "bulk copy", "without waiting"),
    ):
        with pytest.raises(Fault, match=match) as caught:
            execute(body, *arrays, settings=settings)
        assert caught.value.check == check, caught.value
    execute(STORE.replace("wait_group 0", "wait_group.read 0"), *arrays, settings=settings)


def _matrix_lanes(count, trans):
    """Row and column of both halves of a lane's registers, by the figures of the PTX ISA."""
    for register in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                yield register, lane, half, *((column, row) if trans else (row, column))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_to_and_from_shared_memory(count, trans):
    x, y = _words(128), np.zeros(32 * count, np.uint32)
    z = np.zeros(128, np.uint32)
    registers = ", ".join(f"r{10 + i}" for i in range(count))
    stores = " ".join(f"st.global.b32 [rd4+{128 * i}], r{10 + i};" for i in range(count))
    body = f"""
        {PLACE} ld.global.v4.b32 {{r20, r21, r22, r23}}, [rd2]; xor.b32 r5, r0, 5;
        mad.lo.u32 r5, r5, 16, r1; st.shared.v4.b32 [r5], {{r20, r21, r22, r23}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [r5];
        mul.wide.u32 rd4, r0, 4; add.s64 rd4, g1, rd4; {stores}
        add.u32 r6, r5, 1024; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [r6],
        {{{registers}}}; bar.warp.sync -1; setp.ge.u32 p1, r0, {8 * count}; @p1 bra $END;
        ld.shared.v4.b32 {{r20, r21, r22, r23}}, [r6]; add.s64 rd3, g2, rd1;
        st.global.v4.b32 [rd3], {{r20, r21, r22, r23}}; $END:
    """
    execute(body, x, y, z)
    rows = x.view(np.uint16).reshape(32, 8)  # lane i names the row that it wrote
    got = y.view(np.uint16).reshape(count, 32, 2)
    for register, lane, half, row, column in _matrix_lanes(count, bool(trans)):
        assert got[register, lane, half] == rows[8 * register + row, column]
    assert (z[: 32 * count] == x[: 32 * count]).all(), "stmatrix undoes ldmatrix"


def test_generic_matrix_addresses_and_lanes_without_one():
    """Only the lanes that name rows need an address."""
    x, y = _words(32), np.zeros(32, np.uint32)
    body = f"""
        {PLACE} mul.wide.u32 rd5, r0, 4; add.s64 rd6, g0, rd5; ld.global.b32 r4, [rd6];
        setp.lt.u32 p1, r0, 8; @p1 cvt.u64.u32 rd7, r3; @p1 cvta.shared.u64 rd7, rd7;
        stmatrix.sync.aligned.m8n8.x1.b16 [rd7], {{r4}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.b16 {{r5}}, [rd7];
        add.s64 rd6, g1, rd5; st.global.b32 [rd6], r5;
    """
    execute(body, x, y, outputs=1)
    assert (x == y).all()
    _fault("uninitialised", body.replace("r0, 8;", "r0, 7;"), x, y, match="an address .* lane 7")
    bare = body.replace("@p1 cvta.shared.u64 rd7, rd7;", "")
    _fault("address", bare, x, y, match="no.* shared memory")


def test_matrix_rows_are_aligned():
    body = f"{PLACE} add.u32 r3, r3, 4; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{r5}}, [r3];"
    _fault("misaligned", body, _words(), match="a matrix row")


def test_mma_of_integers():
    """A 16 x 16 times 16 x 8 by ldmatrix and mma.sync, f16 to f32."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-4, 5, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    out = np.zeros((16, 8), np.float32)
    body = f"""
        {PLACE} ld.global.v4.b32 {{r20, r21, r22, r23}}, [rd2];
        st.shared.v4.b32 [r3], {{r20, r21, r22, r23}}; setp.lt.u32 p1, r0, 16;
        add.s64 rd3, g1, rd1; @p1 ld.global.v4.b32 {{r20, r21, r22, r23}}, [rd3];
        @p1 st.shared.v4.b32 [r3+1024], {{r20, r21, r22, r23}}; bar.warp.sync -1;
        and.b32 r4, r0, 15; shr.u32 r5, r0, 4; mad.lo.u32 r6, r4, 32, r1; mad.lo.u32 r6, r5, 16, r6;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{r10, r11, r12, r13}}, [r6];
        and.b32 r4, r0, 7; shr.u32 r5, r0, 3; and.b32 r5, r5, 1;
        mad.lo.u32 r7, r4, 32, r1; mad.lo.u32 r7, r5, 16, r7;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{r14, r15}}, [r7+1024];
        mov.b32 r16, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{r30, r31, r32, r33}},
            {{r10, r11, r12, r13}}, {{r14, r15}}, {{r16, r16, r16, r16}};
        shr.u32 r4, r0, 2; and.b32 r5, r0, 3; mad.lo.u32 r4, r4, 4, r5;
        mul.wide.u32 rd4, r4, 8; add.s64 rd4, g2, rd4;
        st.global.v2.b32 [rd4], {{r30, r31}}; st.global.v2.b32 [rd4+256], {{r32, r33}};
    """
    execute(body, a, b, out, outputs=1)
    assert (out == a.astype(np.float32) @ b.astype(np.float32).T).all()
