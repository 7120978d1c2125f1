"""What host code asked for: one launch of a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Grid, block and cluster in CTAs or threads; `params` one by one, sized as PTX declares."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    params: tuple[bytes, ...]
    cooperative: bool = False
