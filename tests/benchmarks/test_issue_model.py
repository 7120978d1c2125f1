"""The model of issue slots, on machine code short enough to count by hand."""

from __future__ import annotations

import dataclasses

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

SCALE = "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R7, R6, R5, RZ"
MAIN = ["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R5, R5, R6", SCALE, "STG.E.64 [R2], R4"]
EXACT = ["FRND R5, R5", SCALE, "FMUL R5, R5, R5", "FMUL R5, R5, R5"]


def assemble(*lines):
    """Text of a kernel: a line ending in a colon is a label."""
    return "\n".join(
        f".{each}" if each.endswith(":") else f"        /*{16 * i:04x}*/    {each} ;"
        for i, each in enumerate(lines)
    )


def loop(label, body):
    return [f"L_x_{label}:", *body, f"@P0 BRA `(.L_x_{label})"]


def program_of(*lines):
    return sass.parse(assemble(*lines))


def case(**changes):
    """Four blocks a thread; a quarter of them undecided."""
    work = issue_model.Work(elements=64, marks=4, inner=(2, 0, 3))
    made = dataclasses.replace(issue_model.CASES[0], name="kernel", work=work, undecided=(0.25,))
    return dataclasses.replace(made, **changes)


def turns_of(program, of):
    way = issue_model.likely(program, of.work.mark, "LDGSTS")
    return {(each.kind, each.marks, each.trips) for each in issue_model.turns_of(program, way, of)}


def test_reads_instructions_and_finds_the_loop():
    program = sass.parse(TEXT)
    assert len(program.instructions) == 19
    assert program.instructions[-3].name == "BRA" and program.instructions[-3].is_predicated
    (found,) = sass.loops(program)
    assert (found.first, found.last) == (2, 16)


def test_the_shortest_way_has_no_calls():
    program = sass.parse(TEXT)
    (found,) = sass.loops(program)
    assert [each.name for each in sass.shortest_round(program, found)] == ROUND


def test_a_loop_that_always_calls_is_an_error():
    program = sass.parse(TEXT.replace("@P0 BRA `(.L_x_2)", "NOP"))
    with pytest.raises(ValueError, match="without a call"):
        sass.shortest_round(program, sass.loops(program)[0])
    with pytest.raises(ValueError, match="no way without a call"):
        issue_model.likely(program, "F2FP", "LDGSTS")


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


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("FADD R1, R1, R1", {"fma": 1}),
        ("HADD2.F32 R1, -RZ, R1.H0_H0", {"half": 1}),
        ("IMAD.WIDE R8, R4, 0x2, R2", {"fma": 2}),
        ("FFMA2 R6, R4.F32x2.HI_LO, R8.F32, R6", {"fma": 2}),
        ("F2FP.F16.E4M3.UNPACK_B R1, R1", {"unpack": 1}),
        ("F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C R1, R1, R2, RZ", {"pack": 1}),
        ("LDS.128 R4, [R1]", {"lsu": 4}),
        ("STG.E.64 desc[UR4][R2.64], R4", {"lsu": 2}),
        ("STS.U8 [R1], R2", {"lsu": 1}),
        ("VIMNMX3 R1, R2, R3, R4, !PT", {"alu": 1}),
        ("MUFU.RCP R1, R1", {"xu": 1}),
    ],
)
def test_slots(text, taken):
    (instruction,) = program_of(text).instructions
    assert issue_model.slots(instruction) == taken


def test_the_likely_way_prefers_blocks_then_wide_accesses_then_brevity():
    program = program_of(
        "@P0 BRA `(.L_skip)",  # over the block
        SCALE,
        "L_skip:",
        "@P1 BRA `(.L_narrow)",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "MOV R1, R2",
        "MOV R1, R2",
        "L_narrow:",
        "@P2 BRA `(.L_short)",
        "MOV R1, R2",
        "L_short:",
        "@P3 EXIT",
        "EXIT",
    )
    ways = [issue_model.likely(program, "F2FP", wide) for wide in ("LDGSTS", "STG")]
    assert ways == [[0, 1, 2, 3, 4, 5, 6, 8, 9], [0, 1, 2, 6, 8, 9]]


def test_main_and_exact_loops_and_their_trips():
    program = program_of(*loop(0, MAIN), *loop(1, EXACT), "EXIT")
    # Of the 4 * 4 blocks of each lane of four warps 4 are undecided: a turn for every warp.
    assert turns_of(program, case()) == {("main", 1, 4), ("exact", 1, 1)}
    # One turn of one warp has room for all: a quarter of a turn each.
    assert turns_of(program, case(undecided=(0.001,))) == {("main", 1, 4), ("exact", 1, 0.25)}
    assert turns_of(program, case(undecided=(0.0,))) == {("main", 1, 4), ("exact", 1, 0)}


@pytest.mark.parametrize(
    "mark",
    [
        ["FRND R5, R5"],
        ["FCHK P1, R5, R6"],
        ["@P1 BRA `(.L_past)", "CALL.REL.NOINC `($__internal_0_$__div)", "L_past:"],
    ],
)
def test_what_filters_avoid_makes_a_loop_exact(mark):
    program = program_of(*loop(0, MAIN), *loop(1, [*mark, SCALE]), "EXIT")
    assert turns_of(program, case()) == {("main", 1, 4), ("exact", 1, 1)}
    with pytest.raises(ValueError, match="other exact paths"):
        turns_of(program_of(*loop(0, MAIN), *loop(1, [SCALE]), "EXIT"), case())


def test_undecided_tiles_are_taken_one_by_one():
    work = issue_model.Work(elements=256, marks=4, warps=0)
    program = program_of(*loop(0, MAIN), *loop(1, EXACT), "EXIT")
    around = program_of(*loop(2, [*loop(0, MAIN), *loop(1, EXACT)]), "EXIT")
    tiles = case(work=work, undecided=(0.02,))
    assert turns_of(program, tiles) == {("main", 1, 4), ("exact", 1, 0.64)}
    assert turns_of(around, tiles) == {("main", 1, 4), ("exact", 1, 0.64), ("once", 2, 1)}


def test_inner_loops_of_main_loops():
    columns = ["LDS R1, [R2]", *loop(3, MAIN)]
    program = program_of(*loop(0, columns), *loop(1, EXACT), "EXIT")
    assert turns_of(program, case()) == {("main", 2, 2), ("inner", 1, 2), ("exact", 1, 1)}
    rows = [*loop(3, ["FADD R5, R5, R6"]), *MAIN]
    program = program_of(*loop(0, rows), *loop(1, EXACT), "EXIT")
    assert turns_of(program, case()) == {("main", 1, 4), ("inner", 0, 3), ("exact", 1, 1)}
    stores = [*loop(3, ["STG.E.64 [R2], R4"]), *MAIN]
    with pytest.raises(ValueError, match="unknown loop inside a main loop"):
        turns_of(program_of(*loop(0, stores), *loop(1, EXACT), "EXIT"), case())


def test_unrolled_sides_and_remainders():
    both = case(sides=2)
    program = program_of(*MAIN * 4, *loop(0, MAIN), *loop(1, EXACT), "EXIT")
    assert turns_of(program, both) == {("main", 1, 4), ("exact", 1, 1)}
    program = program_of(*loop(0, MAIN), *loop(2, MAIN * 2), *loop(1, EXACT), "EXIT")
    assert turns_of(program, case()) == {("main", 2, 2), ("main", 1, 0), ("exact", 1, 1)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*loop(0, MAIN), "EXIT"], "other exact paths than the 1"),
        ([*loop(0, MAIN), *loop(1, EXACT), *loop(2, EXACT), "EXIT"], "other exact paths"),
        ([*loop(0, MAIN * 3), *loop(1, EXACT), "EXIT"], "unexplained"),
        ([*MAIN, *loop(1, EXACT), "EXIT"], "leave 3 of its blocks unexplained"),
        ([*MAIN * 5, *loop(1, EXACT), "EXIT"], "leave -1 of its blocks unexplained"),
        ([*loop(1, EXACT), "EXIT"], "leave 4 of its blocks unexplained"),
    ],
)
def test_a_kernel_that_is_not_understood_is_an_error(lines, message):
    with pytest.raises(ValueError, match=message):
        turns_of(program_of(*lines), case())


def test_count():
    program = program_of("MOV R1, R2", *loop(0, MAIN), *loop(1, EXACT), "EXIT")
    counts = issue_model.count(program, case())
    assert counts["main"] == {
        "issue": 1 + 4 * 5 + 1,
        "alu": 1,
        "lsu": 4 * (4 + 2),
        "fma": 4,
        "pack": 4,
        "control": 4 + 1,
    }
    assert counts["exact"] == {"issue": 5, "xu": 1, "pack": 1, "fma": 2, "control": 1}


def test_wide_accesses_by_turns_count_half():
    work = issue_model.Work(elements=64, marks=4, wide=("LDGSTS", "LDGSTS|STG"))
    body = [SCALE, "@P1 BRA `(.L_on)", "STG.E.128 [R2], R4", "L_on:"]
    program = program_of(*loop(0, body), *loop(1, EXACT), "EXIT")
    assert issue_model.count(program, case(work=work))["main"]["lsu"] == 4 * 4 / 2


def test_cycles():
    needed = issue_model.cycles(
        {"issue": 24, "fma": 8, "half": 4, "alu": 10, "pack": 2, "unpack": 4, "xu": 1, "lsu": 3}
    )
    assert needed == {"issue": 6, "fma": 3, "alu": 5, "xu": 2 + 2 + 2, "lsu": 3}


def test_a_row_of_the_table():
    counts = {"main": {"issue": 1600, "alu": 640}, "exact": {"issue": 320}}
    made = issue_model.row(case(bytes_=2.5), H100, counts)
    assert (made.main, made.exact, made.alu, made.by) == (25, 5, 10, "issue")
    # 30 instructions an element: four schedulers, 32 threads a warp.
    seconds = 30 / (132 * 1.98e9 * 4 * 32)
    bound = (2.5 / H100.copy) / seconds
    assert made.bound == pytest.approx(bound) == made.slots
    assert made.at_100 == pytest.approx(bound) and made.at_70 == pytest.approx(0.7 * bound)
    slow = issue_model.row(case(bytes_=2.5), B200, {**counts, "exact": {"alu": 640}})
    assert slow.by == "alu" and slow.bound < slow.slots
    fast = issue_model.row(case(bytes_=2.5), H100, {"main": {"issue": 64}, "exact": {}})
    assert fast.at_100 == fast.at_70 == 1 and fast.bound > 1


def test_every_case_is_measured_but_one():
    known = issue_model.measurements()
    missing = [it.name for it in issue_model.CASES if (it.name, it.shape) not in known]
    assert missing == ["static_6, 2D, both orientations"]


def test_without_a_disassembler_the_package_is_named(monkeypatch):
    def missing(name):
        raise issue_model.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(issue_model.importlib.metadata, "files", missing)
    monkeypatch.setattr(issue_model.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-nvdisasm"):
        issue_model.disassembler()
