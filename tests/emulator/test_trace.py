"""The trace: lanes and values of each instruction, the faulting one, and the command line."""

from __future__ import annotations

import contextvars
import io
import runpy
import sys

import pytest

from tests.emulator import trace
from tests.emulator.errors import ArgumentsError, Fault
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import execute

SCRIPT = """
from tests.emulator.emulate import DEFAULTS
from tests.emulator.snippets import execute
execute("mov.b32 r1, 5; trap;", threads=64, settings=DEFAULTS.get())
"""


def _traced(body, *words, **options):
    out = io.StringIO()
    tracer = trace.Tracer(trace.parse(list(words)), out)
    try:
        execute(body, settings=Settings(trace=tracer), **options)
    finally:
        tracer.flush()
        lines = out.getvalue().splitlines()
    return lines


def test_lanes_and_values_are_those_of_the_instruction():
    body = """
        mov.u32 r0, %laneid; setp.lt.u32 p1, r0, 4;
        @p1 bra $LOW;
        mov.b32 r1, 7;
        bra $END;
        $LOW: mov.b32 r2, 9;
        $END:
    """
    lines = _traced(body)
    (low,) = [line for line in lines if "mov.b32 r2" in line]
    (high,) = [line for line in lines if "mov.b32 r1" in line]
    assert "warp 0 0000000f " in low and low.endswith("r2=0x9")
    assert "warp 0 fffffff0 " in high and high.endswith("r1=0x7")
    assert "ret;" in lines[-1], "the last instruction is shown"


def test_the_faulting_instruction_is_shown():
    out = io.StringIO()
    tracer = trace.Tracer(trace.Choice(), out)
    with pytest.raises(Fault, match="trap"):
        execute("mov.b32 r1, 5;\ntrap;", settings=Settings(trace=tracer))
    tracer.flush()
    assert out.getvalue().splitlines()[-1].endswith("trap;")


def test_each_cluster_is_shown_when_it_ends():
    lines = _traced("mov.b32 r1, 5;", ctas=2)
    assert [line.partition(" warp")[0] for line in lines if line.endswith("ret;")] == [
        "CTA (0, 0, 0)", "CTA (1, 0, 0)",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["warp=1", "lines=3-5"], ["warp=1,lines=3-5"]])
def test_choices(words):
    assert trace.parse(words) == trace.Choice(warp=1, lines=range(3, 6))


@pytest.mark.parametrize("word", ["RUN.py", "warp=x", "speed=3"])
def test_choices_that_are_wrong(word):
    with pytest.raises(ArgumentsError, match="--trace"):
        trace.parse(["warp=0", word])


def _main(monkeypatch, *arguments):
    """Exit code of ``python -m tests.emulator``."""
    monkeypatch.setattr(sys, "argv", ["tests.emulator", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        contextvars.copy_context().run(runpy.run_module, "tests.emulator", run_name="__main__")
    return caught.value.code


def test_the_command_line(tmp_path, monkeypatch, capsys):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    for arguments in (
        [script, "--mode", "random", "--seed", 3, "--trace", "warp=0", "lines=1-400"],
        ["--mode", "random", "--trace", "warp=0", "lines=1-400", script],
        ["--trace", "warp=0,lines=1-400", "--seed", 3, script],
    ):
        assert _main(monkeypatch, *arguments) == 1
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines and all("warp 0" in line for line in lines)
        assert lines[-1].startswith("CTA (0, 0, 0) warp 0") and "trap;" in lines[-1]
        assert err.startswith("Fault: trap:") and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which script?"),
        (["--trace", "warp=0"], "which script?"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["--trace", "warp=0", "nowhere.py"], "there is no script nowhere.py"),
    ],
)
def test_without_a_script(arguments, message, monkeypatch, capsys):
    assert _main(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
