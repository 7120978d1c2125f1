"""Real text that every machine with Python has: the standard library's own source.

A token is a byte, so that cross-entropy in bits is bits per byte. Files are split into train and
held-out by a checksum of their name: the split does not depend on the order of a directory or on
which optional modules a distribution ships.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 256
HELDOUT_ONE_IN = 16
# Third-party packages differ between machines; test data holds deliberately broken text.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
_SMALLEST_CORPUS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Bytes of the standard library, split by file.

    Attributes:
        train: [bytes] uint8 on the CPU.
        heldout: [bytes] uint8 on the CPU; no file of it is in `train`.
        num_files: number of files in both parts together.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    num_files: int


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every Python source file under `root` (default: the standard library), in name order.

    Raises:
        RuntimeError: if less than 1 MiB of source is found, as in a zipped standard library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, path in _sources(root):
        is_heldout = zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0
        parts[is_heldout].append(path.read_bytes())
    num_bytes = sum(len(part) for part in parts[False])
    if num_bytes < _SMALLEST_CORPUS or not parts[True]:
        raise RuntimeError(
            f"demo: {root} must hold at least {_SMALLEST_CORPUS} bytes of Python source, got "
            f"{num_bytes}; install a Python with an unpacked standard library"
        )
    return Corpus(
        train=_as_tensor(parts[False]),
        heldout=_as_tensor(parts[True]),
        num_files=len(parts[False]) + len(parts[True]),
    )


def _sources(root: Path) -> list[tuple[str, Path]]:
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            found.append((relative.as_posix(), path))
    return sorted(found)


def _as_tensor(parts: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def train_batches(
    text: torch.Tensor, *, batch: int, seq: int, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of [batch, seq] int64 windows, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq)
    for _ in range(steps):
        starts = torch.randint(0, text.numel() - seq, (batch, 1), generator=generator)
        yield text[starts + offsets].long()


def heldout_batches(
    text: torch.Tensor, *, batch: int, seq: int, num_batches: int
) -> Iterator[torch.Tensor]:
    """Yield `num_batches` batches of [batch, seq] int64 windows, evenly spread over `text`."""
    starts = torch.linspace(0, text.numel() - seq, batch * num_batches, dtype=torch.float64)
    offsets = torch.arange(seq)
    for chunk in starts.long().view(num_batches, batch, 1):
        yield text[chunk + offsets].long()
