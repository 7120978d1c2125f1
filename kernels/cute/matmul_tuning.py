"""Tiles that were the fastest on this device, kept on disk.

Nothing is tuned unless `tune` is called (``python -m fos_compile bench matmul --tune``); without
winners `matmul_tiles.choose` goes by the model. An entry is a file of `cache.write_entry`: written
beside its place and renamed, checked by its digest when read, so a broken one is no entry. Its
identity is the problem, the device, its driver, the compiler's versions and our device code:
after a change of any of them the model decides again.
"""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fos_compile.kernels import target
from fos_compile.kernels.cute import cache, matmul_tiles
from fos_compile.kernels.cute.matmul_tiles import Choice

FORMAT = 1
NEAR = 8
"""Choices that are timed, the best by the model."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a winner is the winner of."""

    m: int
    n: int
    k: int
    batch: int = 1
    format: str
    dtype: torch.dtype
    arch: str
    num_sms: int

    def best(self, count: int) -> tuple[Choice, ...]:
        """Choices by the model, the best first."""
        return matmul_tiles.best(
            self.m, self.n, self.k, self.batch,
            format=self.format, dtype=self.dtype, arch=self.arch, num_sms=self.num_sms,
            count=count,
        )  # fmt: skip

    def allows(self, choice: Choice) -> bool:
        """Whether a choice is among the candidates."""
        return choice in matmul_tiles.candidates(self.format, self.dtype, self.arch)


@dataclass(frozen=True, slots=True)
class Winner:
    """The fastest choice, and all that were timed: seconds, or why there are none."""

    choice: Choice
    seconds: float
    timed: tuple[tuple[Choice, float | str], ...]


def tune(
    problem: Problem, timer: Callable[[Choice], float], *, device: str, count: int = NEAR
) -> Winner:
    """Time the choices nearest to the model's best, keep the fastest, and return it.

    Args:
        problem: sizes, format, output.
        timer: seconds of a choice; raises, or returns what is not positive and finite, for one
            that does not work here, which is then passed over.
        device: from `device_name`.
        count: choices to time, at most.

    Raises:
        RuntimeError: none of them works.
    """
    timed: list[tuple[Choice, float | str]] = []
    for choice in problem.best(count):
        try:
            seconds = float(timer(choice))
        except Exception as error:  # of a compiler or a driver: another choice may work
            timed.append((choice, f"{type(error).__name__}: {error}"))
            continue
        works = math.isfinite(seconds) and seconds > 0
        timed.append((choice, seconds if works else f"its time is {seconds}"))
    working = [(each, choice) for choice, each in timed if isinstance(each, float)]
    if not working:
        reasons = "; ".join(f"{choice}: {reason}" for choice, reason in timed)
        raise RuntimeError(f"no choice works for {problem}: {reasons}")
    seconds, choice = min(working, key=lambda each: each[0])
    identity = _identity(problem, device)
    cache.write_entry(_path(identity), identity, json.dumps(asdict(choice)).encode())
    lookup.cache_clear()
    return Winner(choice, seconds, tuple(timed))


@functools.lru_cache(maxsize=4096)
def lookup(problem: Problem, device: str) -> Choice | None:
    """The winner that was kept for a problem on a device, if there is one that can be used.

    A process looks once: it does not see what another one tunes later.
    """
    if not device:
        return None
    identity = _identity(problem, device)
    found = cache.read_entry(_path(identity), identity)
    if found is None:
        return None
    try:
        raw = json.loads(found)
        choice = Choice(
            tuple(raw["tile"]), tuple(raw["cluster"]), bool(raw["swap"]), int(raw["split"])
        )
    except (ValueError, TypeError, KeyError) as error:
        _log.warning("a tuned tile cannot be read, the model decides: %s", error)
        return None
    return choice if problem.allows(choice) else None


def device_name(device: torch.device) -> str:
    """Of a GPU with its driver: what winners depend on besides the code. Nothing for others."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    return _device_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_name(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "-")()  # not in builds for CPUs
    size = found.total_memory >> 30
    return f"{found.name}, {found.major}.{found.minor}, {size} GiB, CUDA {driver}"


def _identity(problem: Problem, device: str) -> bytes:
    return repr((FORMAT, problem, device, torch.__version__, cache.environment())).encode()


def _path(identity: bytes) -> Path:
    digest = hashlib.sha256(identity).hexdigest()[:32]
    return target.cache_dir("tiles") / f"matmul-{digest}"
