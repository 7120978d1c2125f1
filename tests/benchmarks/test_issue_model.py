"""The model of issue slots, on machine code short enough to count by hand."""

from __future__ import annotations

from collections import Counter

import pytest

import issue_model
import sass

TEXT = """
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.RCP R2, R1 ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LOP3.LUT R4, R4, 0x7fff7fff, RZ, 0xc0, !PT ;
        /*0040*/                   HFMA2.MMA R5, R4, R4, -RZ ;
        /*0050*/                   FMUL2 R6, R4.F32x2.HI_LO, R8.F32 ;
        /*0060*/                   IMAD.WIDE R8, R4, 0x2, R2 ;
        /*0070*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/                   F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R7, R6, R5, RZ ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   FADD R5, R5, R6 ;
        /*00b0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32) ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00d0*/                   F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R7, R6, R5, RZ ;
        /*00e0*/              @!P1 FADD R5, R5, R6 ;
        /*00f0*/                   FSETP.GEU.AND P0, PT, R5, R6, PT ;
.L_x_3:
        /*0100*/              @!P0 BRA `(.L_x_0) ;
        /*0110*/                   EXIT ;
.L_x_1:
        /*0120*/                   BRA `(.L_x_1);
"""
ROUND = """LDG LOP3 HFMA2 FMUL2 IMAD UIADD3 F2FP BRA F2FP FADD FSETP BRA""".split()
H100, *_, B200 = issue_model.DEVICES
CASE = issue_model.CASES[1]


def test_reads_instructions_and_finds_the_loop():
    program = sass.parse(TEXT)
    assert len(program.instructions) == 19
    assert program.instructions[-3].name == "BRA" and program.instructions[-3].is_predicated
    (loop,) = sass.loops(program)
    assert (loop.first, loop.last) == (2, 16)


def test_the_shortest_way_has_no_calls():
    program = sass.parse(TEXT)
    (loop,) = sass.loops(program)
    assert [each.name for each in sass.shortest_round(program, loop)] == ROUND


def test_a_loop_that_always_calls_is_an_error():
    program = sass.parse(TEXT.replace("@P0 BRA `(.L_x_2)", "NOP"))
    with pytest.raises(ValueError, match="without a call"):
        sass.shortest_round(program, sass.loops(program)[0])


def test_every_instruction_has_a_pipe():
    program = sass.parse(TEXT)
    way = sass.shortest_round(program, sass.loops(program)[0])
    assert sass.count(way) == {
        "lsu": 1,
        "alu": 2,
        "fma": 2,
        "fma_pair": 1,
        "imad": 1,
        "uniform": 1,
        "convert": 2,
        "control": 2,
    }


def test_a_round_is_divided_by_its_blocks():
    (counts,) = issue_model.rounds_of(sass.parse(TEXT))
    assert counts["lsu"] == 1 / 2 and counts["alu"] == 1


def test_a_loop_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="got 0"):
        issue_model.rounds_of(sass.parse(TEXT.replace("E4M3", "E5M2")))


def test_cycles():
    counts = dict.fromkeys(sass.PIPES, 0.0) | {
        "fma": 8.0,
        "fma_pair": 4.0,
        "imad": 2.0,
        "alu": 10.0,
    }
    needed = issue_model.cycles(counts, issue_model.RATES)
    assert needed["issue"] == 24 / 4
    assert needed["fma"] == (8 + 2 * 4 + 2 * 2) / 4
    assert needed["alu"] == 10 / 2
    limit, by = issue_model.bound(H100, needed)
    elements_per_second = 132 * 1.98e9 * 512 / 6
    assert by == "issue" and limit == pytest.approx(elements_per_second * 2.5625 / 2.97e12)


def test_undecided_blocks_count_by_their_share():
    main, exact = Counter(alu=10), Counter(alu=100, fma=50)
    found = issue_model.weighted([main, exact], 0.02)
    assert found["alu"] == 12 and found["fma"] == 1 and found["xu"] == 0


def test_estimates_stay_below_the_bound_and_the_roof():
    limits = [0.1, 0.5, 1.0, 2.0, 10.0]
    found = [issue_model.estimate(limit) for limit in limits]
    assert found == sorted(found)
    assert all(
        low < min(limit, issue_model.SHARE) for low, limit in zip(found, limits, strict=True)
    )


def test_a_row_of_the_table():
    row = issue_model.row(CASE, B200, sass.parse(TEXT), 0.5)
    assert row.instructions == pytest.approx(6 / 16)
    assert row.other == pytest.approx((0.5 + 0.5 + 1) / 16)
    assert row.measured == 0.5 and row.slow_convert < row.bound


def test_measurements_that_cases_name_exist():
    known = issue_model.measurements()
    assert all(each.measured in known for each in issue_model.CASES if each.measured)
