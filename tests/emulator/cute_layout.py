"""A CuTe layout, evaluated: what CUTLASS writes as Layout<Shape<...>, Stride<...>>.

Tests transcribe CUTLASS layouts with it and compare them with the emulator's own formulas.
"""

from __future__ import annotations

import numpy as np

Nested = int | tuple["Nested", ...]


def _flat(nested: Nested) -> list[int]:
    if isinstance(nested, int):
        return [nested]
    return [value for part in nested for value in _flat(part)]


def offset(shape: Nested, stride: Nested, index: np.ndarray | int) -> np.ndarray:
    """Offset of the colexicographic `index` (first mode fastest) in the layout shape:stride."""
    index, total = np.asarray(index), 0
    for size, step in zip(_flat(shape), _flat(stride), strict=True):
        total = total + index % size * step
        index = index // size
    return total


def size(shape: Nested) -> int:
    """Number of indices."""
    return int(np.prod(_flat(shape)))


def table(shape: tuple[Nested, Nested], stride: tuple[Nested, Nested]) -> np.ndarray:
    """Offsets of a rank-2 layout: (size of mode 0, size of mode 1)."""
    first = offset(shape[0], stride[0], np.arange(size(shape[0])))
    second = offset(shape[1], stride[1], np.arange(size(shape[1])))
    return first[:, None] + second[None, :]
