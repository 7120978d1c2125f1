"""Counting in machine code: on a program written by hand, on a kernel, and in the kept results."""

from __future__ import annotations

import csv
import dataclasses

import pytest

import harness
import issue_model
import matmul_static as static
import sass

TEXT = """
.L_x_0:
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR1], R0 ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   BRA.U UP1, `(.L_x_2) ;
        /*0030*/                   UTCCP.T.S.4x32dp128bit tmem[UR1], gdesc[UR2] ;
        /*0040*/                   UTCOMMA.4X gdesc[UR4], gdesc[UR6], tmem[UR8], UP2 ;
        /*0050*/                   UMOV UR4, UR5 ;
        /*0060*/                   UTCOMMA.4X gdesc[UR4], gdesc[UR6], tmem[UR8], UPT ;
.L_x_2:
        /*0070*/                   UTCBAR [UR5], URZ ;
        /*0080*/                   BRA.U UP0, `(.L_x_0) ;
        /*0090*/                   BRA.U UP3, `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   NANOSLEEP.SYNCS 0x989680 ;
        /*00c0*/                   BRA `(.L_x_1) ;
"""
PROGRAM = sass.parse(TEXT)
ROW = static.Row(
    tile="t", kernel="ours", mma_loop=5, per_mma=2.5, issue=0.5, mma_syncs=2, load_loop=9,
    load_syncs=2, stages=4, in_flight=100, registers=40, epilogue=2.0, scaling=0.5,
    box_barriers=0.0,
)  # fmt: skip


def test_the_way_comes_by_every_mma():
    """The shortest way would skip them; the slow path of the wait is not on it."""
    way = static.once_through(PROGRAM, "UTCOMMA")
    names = [each.name for each in way]
    assert names == [
        "SYNCS", "BRA", "BRA", "UTCCP", "UTCOMMA", "UMOV", "UTCOMMA", "UTCBAR", "BRA"
    ]  # fmt: skip
    assert static.count(way, static.SYNC) == 2
    assert static.count(way, "UTCOMMA") == 2


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="no loop with LDTM"):
        static.once_through(PROGRAM, "LDTM")
    torn = sass.parse(TEXT.replace("UMOV UR4, UR5", "BRA `(.L_x_2)"))
    with pytest.raises(ValueError, match="every UTCOMMA"):
        static.once_through(torn, "UTCOMMA")


def test_worse():
    assert static.worse(ROW, ROW) == []
    for name in static.LOWER:
        more = dataclasses.replace(ROW, **{name: getattr(ROW, name) + 1})
        assert static.worse(more, ROW) == [name] and not static.worse(ROW, more)
    less = dataclasses.replace(ROW, stages=3, in_flight=99)
    assert static.worse(less, ROW) == ["stages", "in_flight"] and not static.worse(ROW, less)


def test_registers():
    text = "EIATTR_REGCOUNT\n .word index@(k)\n .word 0x0000002d\n EIATTR_X\n .word a\n .word 0x1\n"
    assert static.registers(text) == 45
    with pytest.raises(ValueError, match="REGCOUNT"):
        static.registers("nothing")


def test_a_kernel_of_ours():
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
    try:
        issue_model.disassembler()
    except SystemExit as missing:
        pytest.skip(str(missing))
    tile = static.TILES[1]
    found = static.row(tile, "ours", static.ours(tile))
    assert found.mma_loop == 4 * found.per_mma, "four MMAs a stage"
    assert found.mma_syncs == found.load_syncs == 2
    assert found.box_barriers == 0
    assert found.scaling == 0.5, "two numbers at a time"
    assert found.issue < 1


def kept():
    with (harness.RESULTS / "matmul_static.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: each[name] if name in ("tile", "kernel") else float(each[name]) for name in each}
        for each in rows
    ]


def test_the_kept_results():
    """Not worse where it could cost time, and worse elsewhere only as the report explains."""
    rows = kept()
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert len(pairs) == len(static.TILES)
    for ours, theirs in pairs:
        assert (ours["kernel"], theirs["kernel"]) == ("ours", "NVIDIA")
        assert ours["tile"] == theirs["tile"]
        assert ours["stages"] >= theirs["stages"] and ours["in_flight"] >= theirs["in_flight"]
        for name in ("mma_syncs", "load_loop", "load_syncs", "box_barriers"):
            assert ours[name] <= theirs[name], name
        assert ours["mma_loop"] <= theirs["mma_loop"] + 6 and ours["issue"] < 1
        assert ours["registers"] < 65536 // 192
        assert theirs["scaling"] == 0 < ours["scaling"]
        if int(ours["tile"].split()[0].split("x")[1]) > 128:  # a loop over boxes, nothing else
            assert ours["epilogue"] - ours["scaling"] <= theirs["epilogue"]


def test_the_script_over_the_command():
    """benchmarks/matmul.py keeps results beside the others unless told where."""
    import matmul

    found = matmul.arguments(["--quick", "--md=here.md"])
    assert found[:4] == ["bench", "matmul", "--quick", "--md=here.md"]
    assert found[4:] == ["--csv", str(harness.RESULTS / "matmul.csv")]
