"""What is ordered and what is not: programs that PTX allows, and ones that it forbids, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.errors import ArgumentsError, Fault
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import execute

# p0: warp 0; p9: thread 0; r0: thread, r1: warp, r8: CTA.
START = """
    mov.u32 r0, %tid.x; shr.u32 r1, r0, 5; setp.eq.u32 p0, r1, 0; setp.eq.u32 p9, r0, 0;
    mov.u32 r8, %ctaid.x; setp.eq.u32 p8, r8, 0;
"""
# A tile at r3, an mbarrier of one arrival at r2 and a flag, 0.
TILE = """
    .shared .align 128 .b8 tile[256]; .shared .align 8 .b8 bar[8]; .shared .align 4 .b32 flag;
    mov.u32 r3, tile; mov.u32 r2, bar;
    @p9 mbarrier.init.shared.b64 [r2], 1; @p9 st.shared.b32 [flag], 0; bar.sync 0;
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 p2, [r2], 0; @!p2 bra WAIT;"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"
# Thread i's word of the tile at r4, written and fenced.
FILLED = f"""
    {TILE} mad.lo.u32 r4, r0, 4, r3; st.shared.b32 [r4], r0; fence.proxy.async.shared::cta;
    bar.warp.sync -1;
"""
# Thread i's word of the tile at r4 and of g0 at rd1.
WORDS = f"{TILE} mad.lo.u32 r4, r0, 4, r3; mul.wide.u32 rd0, r0, 4; add.u64 rd1, g0, rd0;"

WRONG = {
    "two loads to one place": ("race", f"""
        {TILE} @!p9 bra WAIT; mbarrier.arrive.expect_tx.shared.b64 _, [r2], 256;
        {LOAD} [r3], [g0], 128, [r2]; {LOAD} [r3], [g0+128], 128, [r2]; {WAIT}""", {}),
    "two stores to one place": ("race", f"""
        {FILLED} @!p9 bra END; {STORE} [g0], [r3], 64; {STORE} [g0], [r3+64], 64;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:""", {}),
    "what a store wrote, once it has read": ("race", f"""
        {FILLED} @!p9 bra END; {STORE} [g0], [r3], 128; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0; ld.global.b32 r5, [g0]; END:""", {}),
    "another lane commits": ("bulk copy", f"""
        {FILLED} setp.eq.u32 p1, r0, 1; @p9 {STORE} [g0], [r3], 128;
        @p1 cp.async.bulk.commit_group; @p1 cp.async.bulk.wait_group 0;""", {}),
    "a fence after the load was started": ("missing proxy fence", f"""
        {TILE} @!p9 bra END; st.global.b32 [g0], 1;
        mbarrier.arrive.expect_tx.shared.b64 _, [r2], 128; {LOAD} [r3], [g0], 128, [r2];
        fence.proxy.async; {WAIT} END:""", {}),
    "two copies to one place": ("race", f"""
        {WORDS} cp.async.ca.shared.global [r4], [rd1], 4;
        cp.async.ca.shared.global [r4], [rd1+128], 4; cp.async.wait_all;""", {}),
    "one lane waits for the copies of all": ("race", f"""
        {WORDS} cp.async.ca.shared.global [r4], [rd1], 4; @p9 cp.async.wait_all;
        bar.warp.sync -1; ld.shared.b32 r5, [r4];""", {}),
    "the source of a copy under way": ("race", f"""
        {WORDS} cp.async.ca.shared.global [r4], [rd1], 4; st.global.b32 [rd1], 7;
        cp.async.wait_all;""", {}),
    "a plain store where another warp polls": ("race", f"""
        {TILE} @p9 ld.volatile.shared.b32 r5, [flag]; setp.eq.u32 p3, r0, 32;
        @p3 st.shared.b32 [flag], 3;""", {"threads": 64}),
    "one CTA reads what the next writes": ("race", """
        @!p9 exit; @p8 ld.global.b32 r5, [g0]; @!p8 st.global.b32 [g0], 3;""", {"ctas": 2}),
    "one CTA adds where the next reads": ("race", """
        @!p9 exit; @p8 red.global.add.u32 [g0], 3; @!p8 ld.global.b32 r5, [g0];""", {"ctas": 2}),
    "a shared address of another CTA": ("address", f"""
        {TILE} xor.b32 r8, r8, 1; mapa.shared::cluster.u32 r5, r3, r8;
        @p9 st.shared.b32 [r5], 1;""", {"ctas": 2, "cluster": 2}),
    "commit for CTAs that there are not": ("multicast", f"""
        {TILE} mov.b16 h1, 0xFF01; @p9 tcgen05.commit.cta_group::1.mbarrier::arrive::one
        .shared::cluster.multicast::cluster.b64 [r2], h1;""".replace("one\n        .", "one."), {}),
    "two warps allocate": ("tensor memory", f"""
        {TILE} mad.lo.u32 r4, r1, 4, r3; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32
        [r4], 32;""", {"threads": 64}),
    "bar.red meets bar.sync": ("barrier", """
        @p0 bra RED; bar.sync 0; bra END; RED: bar.red.popc.u32 r5, 0, p9; END:""",
        {"threads": 64}),
    "barrier.sync by half a warp": ("divergence", """
        and.b32 r5, r0, 31; setp.lt.u32 p1, r5, 16; @p1 bra OTHER; barrier.sync 0; bra END;
        OTHER: barrier.sync 0; END:""", {"threads": 64}),
    "local memory that there is not": ("out of bounds", """
        .local .align 4 .b8 mine[8]; mov.u64 rd0, mine; ld.local.b32 r5, [rd0+-4];""", {}),
}  # fmt: skip

RIGHT = {
    "a warp exits before the others meet": ("""
        setp.eq.u32 p1, r1, 1; @p1 exit; bar.sync 0;""", {"threads": 96}),
    "a lock of relaxed atomics and fences": ("""
        @!p9 exit; LOCK: atom.global.cas.b32 r5, [g0], 0, 1; setp.ne.u32 p1, r5, 0; @p1 bra LOCK;
        membar.gl; ld.global.b32 r6, [g0+4]; add.u32 r6, r6, 1; st.global.b32 [g0+4], r6;
        membar.gl; atom.global.exch.b32 r7, [g0], 0;""", {"ctas": 4, "cluster": 4}),
    "a flag for what a load brought": (f"""
        {TILE} @!p0 bra POLL; @!p9 bra END; mbarrier.arrive.expect_tx.shared.b64 _, [r2], 128;
        {LOAD} [r3], [g0], 128, [r2]; {WAIT} st.release.cta.shared.b32 [flag], 1; bra END;
        POLL: ld.acquire.cta.shared.b32 r5, [flag]; setp.eq.u32 p4, r5, 0; @p4 bra POLL;
        ld.shared.b32 r6, [r3]; END:""", {"threads": 64}),
    "a lane polls for another of its warp": ("""
        setp.ne.u32 p1, r0, 0; @p1 bra SET; POLL: ld.volatile.global.b32 r5, [g0];
        setp.eq.u32 p2, r5, 0; @p2 bra POLL; bra END; SET: st.volatile.global.b32 [g0], 1;
        END:""", {}),
    "a flag a lane": (f"""
        {TILE} and.b32 r5, r0, 31; mad.lo.u32 r4, r5, 4, r3; @p0 st.shared.b32 [r4], 0;
        bar.sync 0; @!p0 bra POLL; st.shared.b32 [r4+128], r0; st.release.cta.shared.b32 [r4], 1;
        bra END; POLL: ld.acquire.cta.shared.b32 r6, [r4]; setp.eq.u32 p1, r6, 0; @p1 bra POLL;
        ld.shared.b32 r7, [r4+128]; END:""", {"threads": 64}),
    "a relaxed arrival between fences": (f"""
        {TILE} @!p0 bra POLL; @!p9 bra END; st.shared.b32 [flag], 7; fence.acq_rel.cta;
        mbarrier.arrive.relaxed.cta.shared.b64 _, [r2]; bra END;
        POLL: mbarrier.try_wait.parity.relaxed.cta.shared.b64 p2, [r2], 0; @!p2 bra POLL;
        fence.acq_rel.cta; ld.shared.b32 r6, [flag]; END:""", {"threads": 64}),
    "an arrival at the cluster's barrier, and an exit": (f"""
        {TILE} setp.eq.u32 p3, r1, 1; @p3 bra LEAVE; @p9 st.shared.b32 [flag], 4;
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ld.shared.b32 r4, [flag];
        bra END; LEAVE: barrier.cluster.arrive.aligned; END:""", {"threads": 96}),
    "an mbarrier made again and again": ("""
        .shared .align 8 .b8 bar[8]; @!p9 exit; mov.u32 r3, 0; AGAIN:
        mbarrier.init.shared.b64 [bar], 1; mbarrier.arrive.shared.b64 _, [bar];
        mbarrier.test_wait.parity.shared.b64 p1, [bar], 0; @!p1 trap;
        mbarrier.inval.shared.b64 [bar]; add.u32 r3, r3, 1; setp.lt.u32 p2, r3, 400;
        @p2 bra AGAIN;""", {}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_forbidden_is_found_in_every_mode(name, mode):
    check, body, options = WRONG[name]
    with pytest.raises(Fault) as caught:
        execute(START + body, np.zeros(64, np.uint32), settings=Settings(mode=mode), **options)
    assert caught.value.check == check, caught.value


@pytest.mark.parametrize("schedule", ["round_robin", "random"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_allowed_runs(name, mode, schedule):
    body, options = RIGHT[name]
    settings = Settings(mode=mode, schedule=schedule, seed=1, max_instructions=300_000)
    execute(START + body, np.zeros(64, np.uint32), settings=settings, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 2048}, "2048 threads a block, at most 1024"),
        ({"ctas": 32, "cluster": 32}, "32 CTAs a cluster, at most 16"),
        ({"shared": 1 << 20}, "bytes of shared memory, at most 232448"),
    ],
)
def test_launches_that_no_device_makes(options, message):
    with pytest.raises(ArgumentsError, match=message):
        execute("", top=".extern .shared .align 16 .b8 more[];", **options)
