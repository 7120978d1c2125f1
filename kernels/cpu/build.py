"""Build ``quantize.cpp`` once per machine and source, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from fos_compile.kernels.op import Status
from fos_compile.kernels.target import cache_dir, processor

SOURCE = Path(__file__).with_name("quantize.cpp")
# No fast-math, and no contraction: every operation rounds as docs/contract.md says.
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-pthread",
)  # fmt: skip
# Tried in order: not every compiler knows the name of the machine.
_EXTRAS = (("-march=native",), ())
_OFF = ("0", "false", "no", "off")


@functools.cache
def library() -> ctypes.CDLL | Status:
    """The loaded library, or why there is none. Builds in about two seconds, once."""
    switch = os.environ.get("FOS_CPU_KERNEL", "")
    if switch.lower() in _OFF:
        return Status(f"cpu kernel switched off by FOS_CPU_KERNEL={switch}")
    found = compiler()
    if found is None:
        return Status("no C++ compiler (set CXX, or install g++ or clang++)")
    try:
        path = _cache() / f"quantize-{_key(found)}.so"
        try:
            return _load(path)
        except (OSError, AttributeError):  # absent, truncated or foreign
            problem = _build(found, path)
            return Status(f"{found} failed: {problem}") if problem else _load(path)
    except Exception as error:  # whatever is wrong with this machine, the reference serves
        return Status(f"cpu kernel: {type(error).__name__}: {error}")


def loaded() -> ctypes.CDLL:
    """The library, for callers that asked :func:`status` first."""
    found = library()
    assert not isinstance(found, Status), found.reason
    return found


def status() -> Status:
    """Truthy if the CPU kernel serves; falsy with the reason if not."""
    found = library()
    return found if isinstance(found, Status) else Status()


def compiler() -> str | None:
    """Path of the C++ compiler: that of ``CXX``, or the first of the usual ones."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def _cache() -> Path:
    return cache_dir("cpu")


def _key(compiler: str) -> str:
    """Source, flags, compiler and processor."""
    version = _run(compiler, "--version").stdout
    parts = (SOURCE.read_text(), *FLAGS, str(_EXTRAS), version, processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _load(path: Path) -> ctypes.CDLL:
    """The library in ``path`` if it is what was built: a truncated one would kill the process."""
    if _digest(path) != _digest_file(path).read_text():
        raise OSError(f"{path} is not what was built")
    built = ctypes.CDLL(str(path))
    for name in ("fos_quantize", "fos_amax", "fos_unscaled"):
        getattr(built, name)
    built.fos_amax.restype = ctypes.c_float
    return built


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _build(compiler: str, path: Path) -> str:
    """Compile to ``path`` by atomic renames; returns the compiler's complaint, or nothing."""
    complaint = ""
    path.parent.mkdir(parents=True, exist_ok=True)
    for extra in _EXTRAS:
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        try:
            done = _run(compiler, *FLAGS, *extra, "-o", name, str(SOURCE))
            if done.returncode == 0:
                _digest_file(scratch).write_text(_digest(scratch))
                _digest_file(scratch).replace(_digest_file(path))
                scratch.replace(path)
                return ""
        finally:
            scratch.unlink(missing_ok=True)
            _digest_file(scratch).unlink(missing_ok=True)
        lines = done.stderr.strip().splitlines()
        complaint = lines[-1] if lines else f"exit {done.returncode}"
    return complaint
