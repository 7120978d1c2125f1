"""The PTX front end: scopes, operands, literals, storage, locations, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.emulator.errors import EmulatorError, Fault, PtxError, UnsupportedError
from tests.emulator.isa import decoder
from tests.emulator.isa.decoder import decode
from tests.emulator.machine.registers import RegisterFile
from tests.emulator.ptx.parser import parse
from tests.emulator.ptx.scope import DYNAMIC
from tests.emulator.ptx.syntax import (
    Address,
    Immediate,
    Label,
    Not,
    Pair,
    Register,
    Sink,
    Special,
    Variable,
    Vector,
)
from tests.emulator.snippets import by_lane, execute, module

LANES = np.arange(32, dtype=np.uint32)


def _entry(body, params=0, top=""):
    return parse(module(body, params, top=top)).entries["snippet"]


def _instructions(body, **options):
    return _entry(body, **options).instructions[:-1]  # without the return


def _operands(text):
    (instruction,) = _instructions(text)
    return instruction.operands


def _decoded(body):
    entry = _entry(body)
    return decode(entry, RegisterFile(entry), "sm_100a")


# Names --------------------------------------------------


def test_registers_and_labels_belong_to_their_block():
    body = """
        .reg .b32 %x; mov.b32 %x, 1;
        { .reg .b32 %x; .reg .pred P1; LOOP: mov.b32 %x, 2; setp.eq.u32 P1, %x, 2;
          @!P1 bra LOOP; { .reg .b32 %x; mov.b32 %x, 3; } mov.b32 r1, %x; }
        { .reg .pred P1; .reg .b64 %x; LOOP: setp.eq.u32 P1, r1, 2; @!P1 bra LOOP; }
        mov.b32 d0, %x; add.u32 d0, d0, r1;
    """
    (got,) = by_lane(body, [LANES], [np.uint32])
    assert set(got.tolist()) == {3}
    targets = [i.operands[0] for i in _instructions(body.replace("d0", "r0")) if i.opcode == "bra"]
    assert [label.index for label in targets] == [1, 6]
    slots = [i.operands[0].slot for i in _instructions(body.replace("d0", "r0"))[:2]]
    assert slots[0] != slots[1]


def test_a_label_of_an_outer_block_is_seen():
    body = "setp.eq.u32 p1, x0, x0; { @p1 bra OUT; mov.b32 d0, 1; } mov.b32 d0, 2; OUT:"
    (got,) = by_lane(f"mov.b32 d0, 9; {body}", [LANES], [np.uint32])
    assert set(got.tolist()) == {9}


def test_inline_assembly_as_the_dsl_emits_it():
    body = """
        // begin inline asm
        {
        .reg .b8 b0; .reg .b8 %t<3>; /* two
        lines */ cvt.rn.satfinite.e2m1x2.f32 b0, x0, 0f3F800000;
        mov.b32 d0, {b0, 0, 0, 0};
        }

        // end inline asm
    """
    (got,) = by_lane(body, [np.full(32, 0x40C00000, np.uint32)], [np.uint32])
    assert set(got.tolist()) == {0x72}


# Operands --------------------------------------------------


def test_operands():
    assert _operands("add.u32 r0, r1, -5;")[2] == Immediate(-5)
    assert isinstance(_operands("mov.u32 r0, %tid.x;")[1], Special)
    first, second = _operands("mov.b64 {r1, _}, rd0;")
    assert isinstance(first, Vector) and isinstance(first.items[1], Sink)
    assert isinstance(second, Register) and (second.name, second.bits) == ("rd0", 64)
    pair, _, _, negated = _operands("setp.lt.and.s32 p1|p2, r1, r2, !p3;")
    assert isinstance(pair, Pair) and pair.second.name == "p2"
    assert isinstance(negated, Not) and negated.operand.name == "p3"
    assert isinstance(_operands("X: bra X;")[0], Label)


@pytest.mark.parametrize(
    ("text", "offset"),
    [("[rd1]", 0), ("[rd1+16]", 16), ("[rd1+-16]", -16), ("[rd1-8]", -8), ("[rd1+0x10]", 16)],
)
def test_addresses(text, offset):
    address = _operands(f"ld.global.b32 r0, {text};")[1]
    assert isinstance(address, Address)
    assert (address.base.name, address.offset, address.coordinates) == ("rd1", offset, None)


def test_addresses_of_variables_numbers_and_maps():
    entry = _entry(".shared .b32 v[4]; ld.shared.b32 r0, [v+8]; ld.shared.b32 r0, [1024];"
                   "mov.u32 r1, v+4; prefetch.tensormap [rd1, {r2, r3}];")  # fmt: skip
    one, two, three, four = (i.operands for i in entry.instructions[:4])
    assert isinstance(one[1].base, Variable) and one[1].base.space == "shared"
    assert one[1].base.address + one[1].offset == DYNAMIC + 8
    assert two[1].base == Immediate(1024)
    assert three[1].address == DYNAMIC + 4
    assert [r.name for r in four[0].coordinates.items] == ["r2", "r3"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("12", 12), ("-1", 0xFFFFFFFF), ("0xFF", 255), ("0XfU", 15), ("7U", 7),
        ("0b101", 5), ("4294967295", 0xFFFFFFFF), ("-2147483648", 0x80000000),
        ("0f3F800000", 0x3F800000), ("0F3f800000", 0x3F800000), ("-0f3F800000", 0xBF800000),
    ],
)  # fmt: skip
def test_literals_of_32_bits(text, value):
    (got,) = by_lane(f"mov.b32 d0, {text};", [LANES], [np.uint32])
    assert set(got.tolist()) == {value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0d3FF0000000000000", 1.0), ("1.5", 1.5), ("-2.25e2", -225.0), ("1.e-1", 0.1)],
)
def test_literals_of_64_bits(text, value):
    (got,) = by_lane(f"mov.f64 d0, {text};", [LANES], [np.uint64])
    assert set(got.view(np.float64).tolist()) == {value}


# Storage --------------------------------------------------

EXTERN = ".extern .shared .align 1024 .b8 dynamic[];"


def _shared(entry):
    """Offsets of the shared variables that mov reads, by name."""
    values = [i.operands[1] for i in entry.instructions if i.opcode == "mov"]
    return {v.name: v.address - DYNAMIC for v in values if isinstance(v, Variable)}


def test_dynamic_shared_memory_comes_after_all_static_memory():
    """Also after what the body declares below its first use."""
    body = """
        mov.u32 r0, dynamic; mov.u32 r1, top;
        .shared .align 8 .b8 first[20];
        { .shared .align 16 .b8 second[2001]; mov.u32 r2, second; }
        mov.u32 r3, first; mov.u32 r4, dynamic;
    """
    entry = _entry(body, top=f"{EXTERN}\n.shared .b32 top[3];")
    assert _shared(entry) == {"top": 0, "first": 16, "second": 48, "dynamic": 3072}
    assert entry.dynamic_shared == 3072
    assert entry.static_shared == 2049
    # In memory: dynamic bytes are those of the launch, counted from there.
    store = "st.shared.b32 [r4+{}], 1;".format
    execute(body + store(12), shared=16, top=f"{EXTERN}\n.shared .b32 top[3];")
    with pytest.raises(Fault, match="which has 3088"):
        execute(body + store(16), shared=16, top=f"{EXTERN}\n.shared .b32 top[3];")


def test_dynamic_shared_memory_alone_and_none():
    entry = _entry("mov.u32 r0, dynamic;", top=EXTERN)
    assert (_shared(entry), entry.dynamic_shared) == ({"dynamic": 0}, 0)
    assert _entry("ret;").dynamic_shared is None


def test_entries_do_not_share_their_bodies_memory():
    one = module(".shared .b8 x[64]; mov.u32 r0, x;", top=EXTERN)
    two = ".visible .entry other() { .reg .b32 r<2>; .shared .b8 y[8]; mov.u32 r0, y; ret; }"
    entries = parse(one + two).entries
    assert _shared(entries["other"]) == {"y": 0}
    assert entries["snippet"].dynamic_shared == 1024
    assert entries["other"].static_shared == 8


def test_parameters_are_laid_out_by_their_alignment():
    text = module("").replace("snippet()", """snippet(
        .param .u8 a, .param .align 64 .b8 b[128], .param .u16 c,
        .param .u64 .ptr .global .align 16 d,
        .param .align 4 .b8 e[12], .param .f32 f)""")  # fmt: skip
    found = {p.name: (p.offset, p.size) for p in parse(text).entries["snippet"].parameters}
    assert found == {
        "a": (0, 1), "b": (64, 128), "c": (192, 2), "d": (208, 8), "e": (216, 12), "f": (228, 4),
    }  # fmt: skip


def test_directives_of_an_entry():
    text = module("").replace(
        "snippet()",
        """snippet()
        .reqntid 128, 1, 1 .minnctapersm 2 .explicitcluster .reqnctapercluster 2, 1, 1""",
    )
    assert parse(text).entries["snippet"].directives == {
        "reqntid": (128, 1, 1), "minnctapersm": (2,), "explicitcluster": (),
        "reqnctapercluster": (2, 1, 1),
    }  # fmt: skip


# Places --------------------------------------------------


def test_locations_of_instructions():
    body = ".loc 1 7 3\nmov.b32 r0, 1;\nmov.b32 r1, 1;\n.loc\t2 9 0\nmov.b32 r2, 1;"
    # The DSL puts the names behind the code.
    text = module(body) + '.file 1 "/a/kernel.py"\n.file 2 "/b/helper.py", 0, 0\n'
    parsed = parse(text)
    found = parsed.entries["snippet"].instructions
    assert [(i.location.file, i.location.line) for i in found[:3]] == [(1, 7), (1, 7), (2, 9)]
    assert parsed.files == {1: "/a/kernel.py", 2: "/b/helper.py"}
    lines = [parsed.lines[i.line - 1] for i in found[:3]]
    assert lines == ["mov.b32 r0, 1;", "mov.b32 r1, 1;", "mov.b32 r2, 1;"]


# Refusals --------------------------------------------------


def _line_of(text, word):
    return next(i for i, line in enumerate(text.splitlines(), 1) if word in line)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("bra NOWHERE;", PtxError, "NOWHERE is not declared"),
        ("mov.b32 r0, nothing;", PtxError, "nothing is not declared"),
        ("mov.b32 %undeclared5, 1;", PtxError, "cannot write"),
        ("{ INNER: } bra INNER;", PtxError, "INNER is not declared"),
        ("X: X: ret;", PtxError, "label X is defined twice"),
        (".reg .b32 q; .reg .b32 q;", PtxError, "register q is declared twice"),
        (".reg .b24 q;", PtxError, "register type .b24 is none of the known ones"),
        ("@r0 bra X; X:", PtxError, "r0 is no predicate"),
        ("add.u32 r0, !r1, r2;", PtxError, "only a predicate can be negated"),
        ("ld.global.b32 r0, [rd1, r2];", PtxError, "coordinates must be in braces"),
        ("ld.global.b32 r0, [rd1+];", PtxError, "']' is no number"),
        ("add.u32 r0, (, r2;", PtxError, r"an operand cannot start with '\('"),
        ("mov.b32 r0, #5;", PtxError, "'#5;' is not PTX"),
        (".maxfoo 3;", UnsupportedError, "directive .maxfoo is not known"),
    ],
)
def test_text_that_does_not_parse(body, kind, message):
    text = module(f"\n{body}\n")
    with pytest.raises(EmulatorError, match=message) as caught:
        _decoded(f"\n{body}\n")
    assert isinstance(caught.value, kind)
    number = re.match(r"line (\d+): ", str(caught.value))
    assert number and int(number[1]) == _line_of(text, body)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("frobnicate.u32 r0, r1;", UnsupportedError, "opcode frobnicate.u32 is not emulated"),
        ("add.fancy.u32 r0, r1, r2;", UnsupportedError, "modifier .fancy is not emulated"),
        ("add.u32.u32 r0, r1, r2;", UnsupportedError, "type u32.u32 is not emulated"),
        ("add.u32 r0, r1;", UnsupportedError, "a form with 2 operands is not emulated"),
        ("add.u32 r0, rd1, r2;", PtxError, "add.u32 reads rd1 of 64 bits as 32"),
        ("add.u32 rd0, r1, r2;", PtxError, "add.u32 writes 32 bits to rd0 of 64"),
        ("add.u32 5, r1, r2;", PtxError, "add.u32 cannot write"),
        ("mov.f32 r0, 0d3FF0000000000000;", PtxError, "a literal of 64 bits"),
        ("mov.u16 h0, %tid.x;", UnsupportedError, "%tid.x as 16 bits is not emulated"),
        ("prmt.b32.f4e r0, r1, r2, r3;", UnsupportedError, "mode .f4e is not emulated"),
        ("shfl.idx.b32 r0, r1, 0, 31;", UnsupportedError, "forms without .sync"),
        ("vote.ballot.b32 r0, p1;", UnsupportedError, "forms without .sync"),
        ("bra r1;", UnsupportedError, "a jump to"),
        ("mov.b32 r0, {h0, h1, h2};", UnsupportedError, "3 parts is not emulated"),
        ("mbarrier.pending_count.b64 r0, rd1;", UnsupportedError, "this action is not emulated"),
        ("fence.proxy.unknown;", UnsupportedError, "is not emulated"),
        ("ld.global.v3.b32 {r0, r1, r2}, [rd1];", UnsupportedError, "is not emulated"),
        ("add.rn.f64 rd0, r1, rd2;", PtxError, "add.rn.f64 reads r1 of 32 bits as 64"),
    ],
)
def test_forms_that_do_not_exist_are_named_with_their_line(body, kind, message):
    with pytest.raises(EmulatorError, match=message) as caught:
        _decoded(f"\n{body}\n")
    assert isinstance(caught.value, kind)
    assert str(caught.value).startswith(f"line {_line_of(module(f'{body}'), body) + 1}: ")


TARGET = ".version 8.8\n.target sm_100a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no .target directive: this is no PTX file"),
        ("ELF\x7f", "is not PTX"),
        (TARGET + ".visible .entry x() {", "the text ends in the middle"),
        (TARGET + ".visible .func f() { ret; }", r"line 3: functions \(.func\)"),
        (TARGET + ".tex .u64 t;", "line 3: directive .tex is not known"),
        (TARGET + ".extern .reg .b32 t;", "line 3: .reg cannot be declared"),
        (module("").replace("snippet()", "snippet() .maxfoo 3"), "directive .maxfoo is not known"),
        (module("", 1).replace(".u64 a0", ".const_like .u64 a0"), r"\.const_like of a parameter"),
    ],
)  # fmt: skip
def test_files_that_are_refused(text, message):
    with pytest.raises(EmulatorError, match=message):
        parse(text)


def test_unknown_special_registers_are_refused():
    with pytest.raises(Fault, match="special register: %pm0 is not emulated"):
        execute("mov.u32 r0, %pm0;")


# Targets ------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("tcgen05.wait::ld.sync.aligned;", "sm_90a", "needs sm_100a or sm_101a"),
        ("tcgen05.wait::ld.sync.aligned;", "sm_120a", "needs sm_100a"),
        ("cvt.rn.satfinite.e2m1x2.f32 b0, r0, r1;", "sm_90a", "needs sm_100a or newer"),
        ("cvt.rn.satfinite.e4m3x2.f32 h0, r0, r1;", "sm_80", "needs sm_89 or newer"),
        ("elect.sync r0|p0, r1;", "sm_89", "needs sm_90 or newer"),
        ("barrier.cluster.arrive;", "sm_80", "needs sm_90 or newer"),
        ("mov.b32 r0, 1;", "compute_90", "the emulator knows sm_80 and newer"),
        ("mov.b32 r0, 1;", "sm_75", "needs sm_80 or newer"),
    ],
)
def test_instructions_that_a_target_lacks(text, target, message):
    entry = _entry(text)
    with pytest.raises(PtxError, match=re.escape(message)):
        decode(entry, RegisterFile(entry), target)


@pytest.mark.parametrize("error", [KeyError, ValueError, AttributeError, IndexError, TypeError])
def test_what_a_decoder_does_not_foresee_is_refused(error, monkeypatch):
    def crash(decoder):
        raise error("x9")

    entry = _entry("mov.b32 r0, 1;")
    decode(entry, RegisterFile(entry), "sm_100a")
    monkeypatch.setitem(decoder._REGISTRY, "mov", crash)
    with pytest.raises(UnsupportedError, match=rf"line \d+: mov.b32: .*{error.__name__}.*x9"):
        decode(entry, RegisterFile(entry), "sm_100a")


@pytest.mark.parametrize(
    "code",
    ["ld.global.b128 rd0, [g0];", "mov.b128 rd0, {rd1, rd2};", "add.u32 r0, r1;", "setp.eq.u32;"],
)
def test_odd_forms_are_refused_by_name(code):
    entry = _entry(code, params=1)
    with pytest.raises(EmulatorError, match=rf"line \d+: {code.partition(' ')[0].strip(';')}"):
        decode(entry, RegisterFile(entry), "sm_100a")


@pytest.mark.parametrize(
    "code",
    [
        *(f"setp.{name} p1, r0, r0;" for name in ("lo.s32", "ls.s32", "hi.s32", "hs.s32",
            "lo.b32", "lo.f32", "lt.f16x2", "eq.bf16x2", "eq.ftz.u32")),
        "setp.eq.ftz.bf16 p1, h0, h0;", "slct.ftz.b32.s32 r0, r0, r0, r0;", "testp.f32 p1, r0;",
        "shf.wrap.b32 r0, r0, r0, 4;", "shf.l.b32 r0, r0, r0, 4;", "bmsk.b32 r0, r0, r0;",
        "szext.u32 r0, r0, r0;", "lop3.b32 r0, r0, r0, r0, 0x1FF;", "div.rn.sat.f32 r0, r0, r0;",
        "add.rn.sat.f32x2 rd0, rd0, rd0;", "fma.rn.sat.f32x2 rd0, rd0, rd0, rd0;",
        "cvt.f32.s32 r0, r0;", "cvt.s32.f32 r0, r0;", "cvt.f16.f32 h0, r0;",
    ],
)  # fmt: skip
def test_forms_that_ptx_lacks_are_refused(code):
    with pytest.raises(UnsupportedError, match=r"line \d+: \w+.* is not emulated"):
        execute(code)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mov.u32 r0, 08;", "'08' is no octal number"),
        (".reg .b128 q;", "registers of 128 bits"),
        ("atom.global.add.b32 r0, [rd0], 1;", "add of b32"),
        ("bar.arrive 0;", "a form with 1 operands"),
        ("cp.async.cg.shared.global [r0], [rd0], 4;", "4 bytes"),
    ],
)
def test_more_that_is_refused(text, message):
    with pytest.raises(EmulatorError, match=re.escape(message)):
        _decoded(text)


def test_octal_literals():
    assert _operands("mov.u32 r0, 010;")[1] == Immediate(8)
