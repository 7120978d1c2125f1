"""Compiled kernels are found again, and only whole and by whom they were made for."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import threading
import time

import pytest

from fos_compile.kernels.cute import cache
from fos_compile.kernels.cute.cache import KernelCache, KernelKey

KEY = KernelKey(name="kernel", dtype="bfloat16", options=(("scale_rule", "mse"),), alignment=16)
ARCH = "sm_90a"


class Compiler:
    """Counts what it compiles and loads; its code says what it is."""

    def __init__(self, folder, environment="made here"):
        self.compiled, self.loaded = [], []
        self.cache = KernelCache(
            compile=self.compile,
            load=self.load,
            folder=lambda: folder,
            environment=lambda: environment,
        )

    def compile(self, key, arch):
        self.compiled.append((key, arch))
        return f"code of {key.name} {dict(key.options)} for {arch}".encode() * 1000

    def load(self, key, code):
        self.loaded.append(code)
        assert code.startswith(b"code of ") and len(code) % 1000 == 0
        return code.decode

    def get(self, key=KEY, arch=ARCH):
        return self.cache.get(key, arch)

    def path(self, key=KEY, arch=ARCH):
        return self.cache.path(key, arch)


def test_compiled_once_a_process(tmp_path):
    compiler = Compiler(tmp_path)
    assert compiler.get() is compiler.get()
    assert compiler.compiled == [(KEY, ARCH)] and len(compiler.loaded) == 1


def test_found_by_the_next_process(tmp_path):
    first, second = Compiler(tmp_path), Compiler(tmp_path)
    first.get(), second.get()
    assert not second.compiled and second.loaded == first.loaded


OTHERS = {
    "name": {"name": "other"},
    "dtype": {"dtype": "float16"},
    "options": {"options": (("scale_rule", "static_6"),)},
    "alignment": {"alignment": 2},
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(KernelKey)])
def test_every_field_of_the_key_counts(tmp_path, field):
    compiler = Compiler(tmp_path)
    compiler.get()
    other = dataclasses.replace(KEY, **OTHERS[field])
    compiler.get(other)
    assert compiler.compiled == [(KEY, ARCH), (other, ARCH)]
    assert compiler.path(other) != compiler.path()


def test_architecture_and_environment_count(tmp_path):
    compiler, elsewhere = Compiler(tmp_path), Compiler(tmp_path, "made elsewhere")
    compiler.get(), compiler.get(arch="sm_100a"), elsewhere.get()
    assert len(compiler.compiled) == 2 and len(elsewhere.compiled) == 1


def _flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def _cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def _older(path):
    path.write_bytes(path.read_bytes().replace(b"fos-cute 1\n", b"fos-cute 0\n"))


DAMAGE = {
    "a bit of the code": _flip(-1),
    "a bit of the digest": _flip(20),
    "the version": _older,
    "empty": _cut(0),
    "cut in the head": _cut(15),
    "cut in the code": _cut(-1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "something else": lambda path: path.write_bytes(b"\x7fELF"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_and_written_again(tmp_path, damage):
    Compiler(tmp_path).get()
    DAMAGE[damage](Compiler(tmp_path).path())
    second, third = Compiler(tmp_path), Compiler(tmp_path)
    second.get(), third.get()
    assert len(second.compiled) == 1 and not third.compiled


def test_an_entry_of_another_kernel_is_a_miss(tmp_path):
    """Even where someone renamed it."""
    compiler = Compiler(tmp_path)
    other = dataclasses.replace(KEY, dtype="float16")
    compiler.get(other)
    compiler.path(other).rename(compiler.path())
    compiler.get()
    assert compiler.compiled[-1] == (KEY, ARCH)


def test_whole_code_that_does_not_load_is_compiled_again(tmp_path, monkeypatch, caplog):
    Compiler(tmp_path).get()
    second = Compiler(tmp_path)
    load, failures = second.load, [OSError("no such symbol")]

    def once(key, code):
        if failures:
            raise failures.pop()
        return load(key, code)

    monkeypatch.setattr(second.cache, "_load", once)
    second.get()
    assert len(second.compiled) == 1 and "no such symbol" in caplog.text


@pytest.mark.parametrize("blocked", ["a folder is in its place", "no folder can be made"])
def test_a_folder_that_cannot_be_written(tmp_path, caplog, blocked):
    compiler = Compiler(tmp_path / "cute")
    if blocked == "a folder is in its place":
        compiler.path().mkdir(parents=True)
    else:
        (tmp_path / "cute").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert compiler.get() is compiler.get()
    assert len(compiler.compiled) == 1 and "not kept" in caplog.text
    assert not list(tmp_path.glob("cute/.*")), "scratch files are taken away"


def test_a_failing_compiler_is_asked_again(tmp_path, monkeypatch):
    compiler = Compiler(tmp_path)
    monkeypatch.setattr(compiler.cache, "_compile", lambda key, arch: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            compiler.get()
    assert not list(tmp_path.iterdir())


def test_threads_compile_once(tmp_path):
    compiler = Compiler(tmp_path)
    quick = compiler.compile

    def slow(key, arch):
        time.sleep(0.05)
        return quick(key, arch)

    compiler.cache._compile = slow
    threads = [threading.Thread(target=compiler.get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.compiled) == 1


WRITER = """
import importlib.util, sys
from pathlib import Path
from fos_compile.kernels.cute import cache

path, identity = Path(sys.argv[1]), b"the same kernel"
code = sys.argv[2].encode() * 200_000
for _ in range(300):
    cache.write_entry(path, identity, code)
    found = cache.read_entry(path, identity)
    assert found is not None and len(set(found)) == 1 and len(found) == 200_000
"""


def test_two_processes_write_at_once(tmp_path):
    """Every read sees one entry, whole."""
    path = tmp_path / "entry"
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", WRITER, str(path), letter], stderr=subprocess.PIPE
        )
        for letter in "ab"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert list(tmp_path.iterdir()) == [path]


def test_environment_follows_the_sources(tmp_path, monkeypatch):
    """An edit of any device source makes every entry a miss."""
    sources = tmp_path / "cute"
    sources.mkdir()
    (sources / "kernel.py").write_text("a = 1\n")
    monkeypatch.setattr(cache, "__file__", str(sources / "cache.py"))
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
    before = cache.environment.__wrapped__()
    (sources / "kernel.py").write_text("a = 2\n")
    after = cache.environment.__wrapped__()
    (sources / "other.py").write_text("")
    assert len({before, after, cache.environment.__wrapped__()}) == 3
    assert "nvidia-cutlass-dsl 4." in before and "apache-tvm-ffi 0.1." in before
