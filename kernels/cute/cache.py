"""Compiled kernels by static key: once a process, and on disk for the next one.

An entry is one file: a line with the format's version, the SHA-256 of identity and code, the code
(an object file). It is written beside its place and renamed, so that readers and other writers see
a whole entry or none; whatever else is found there is a miss, and is compiled and written again.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fos_compile.kernels import formats, target

FORMAT = 1
_MAGIC = b"fos-cute %d\n" % FORMAT
_PACKAGES = (
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-cu12",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
)
_log = logging.getLogger(__name__)

Kernel = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelKey:
    """Everything that a kernel is specialized for; never a size that only a call knows."""

    name: str
    """Of the module that holds its host side."""
    dtype: str
    """Of the matrix: ``bfloat16``."""
    options: tuple[tuple[str, str | int | bool], ...]
    """Static options by name."""
    alignment: int
    """Bytes: every row of the matrix begins at a multiple."""


class KernelCache:
    """Compiles a kernel the first time that its key is asked for.

    Args:
        compile: object file of a kernel for an architecture.
        load: callable kernel of an object file.
        folder: where entries are kept; need not exist nor be writable.
        environment: what entries depend on besides key and architecture.
    """

    def __init__(
        self,
        *,
        compile: Callable[[KernelKey, str], bytes],
        load: Callable[[KernelKey, bytes], Kernel],
        folder: Callable[[], Path],
        environment: Callable[[], str],
    ) -> None:
        self._compile, self._load = compile, load
        self._folder, self._environment = folder, environment
        self._kernels: dict[tuple[KernelKey, str], Kernel] = {}
        # One for all keys: neither the DSL nor MLIR promises to compile from two threads.
        self._lock = threading.Lock()

    def get(self, key: KernelKey, arch: str) -> Kernel:
        """The kernel of `key` for `arch`."""
        found = self._kernels.get((key, arch))
        if found is not None:
            return found
        with self._lock:
            if (key, arch) not in self._kernels:
                self._kernels[key, arch] = self._find(key, arch)
            return self._kernels[key, arch]

    def path(self, key: KernelKey, arch: str) -> Path:
        """Where the entry of a kernel is."""
        digest = hashlib.sha256(self._identity(key, arch)).hexdigest()[:32]
        return self._folder() / f"{key.name}-{arch}-{digest}"

    def _identity(self, key: KernelKey, arch: str) -> bytes:
        return repr((FORMAT, key, arch, self._environment())).encode()

    def _find(self, key: KernelKey, arch: str) -> Kernel:
        path, identity = self.path(key, arch), self._identity(key, arch)
        code = read_entry(path, identity)
        if code is not None:
            try:
                return self._load(key, code)
            except Exception as error:  # whole, but not for this machine after all
                _log.warning("compiling %s again, its cached code fails: %s", key.name, error)
        code = self._compile(key, arch)
        write_entry(path, identity, code)
        return self._load(key, code)


def read_entry(path: Path, identity: bytes) -> bytes | None:
    """The code of an entry that was written whole for this identity, else None."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + hashlib.sha256().digest_size
    code = entry[head:]
    whole = entry[:head] == _MAGIC + _digest(identity, code)
    return code if whole else None


def write_entry(path: Path, identity: bytes, code: bytes) -> None:
    """Write by an atomic rename; a folder that cannot be written costs the next process time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + _digest(identity, code) + code)
            os.replace(scratch, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        _log.warning("compiled kernels are not kept: %s", error)


def _digest(identity: bytes, code: bytes) -> bytes:
    # The lengths keep (identity, code) and another split of the same bytes apart.
    return hashlib.sha256(b"%d " % len(identity) + identity + code).digest()


@functools.cache
def environment() -> str:
    """Our device code, the compiler's versions and the processor that host code is made for."""
    fingerprint = hashlib.sha256()
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(formats.__file__)):
        content = source.read_bytes()
        fingerprint.update(b"%s %d\n" % (source.name.encode(), len(content)) + content)
    versions = (f"{package} {_version(package)}" for package in _PACKAGES)
    return " ".join((fingerprint.hexdigest(), *versions, target.processor()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _compile(key: KernelKey, arch: str) -> bytes:
    from fos_compile.kernels.cute import build

    return build.object_file(key, arch)


def _load(key: KernelKey, code: bytes) -> Kernel:
    from fos_compile.kernels.cute import build

    return build.load(key, code)


KERNELS = KernelCache(
    compile=_compile,
    load=_load,
    folder=lambda: target.cache_dir("cute"),
    environment=environment,
)
"""Those of this process."""
