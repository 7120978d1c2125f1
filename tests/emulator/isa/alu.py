"""Steps of instructions that only compute: sources to one destination, lane by lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator.machine.registers import bits_of
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp

Function = Callable[..., np.ndarray]


def compute(function: Function, destination: int, sources: Sequence[int]) -> Step:
    """``destination = function(*sources)`` on raw bits."""
    if len(sources) == 1:
        (a,) = sources

        def one(warp: Warp) -> None:
            warp.put(destination, function(warp.r[a]), warp.d[a])

        return one
    if len(sources) == 2:
        a, b = sources

        def two(warp: Warp) -> None:
            r, d = warp.r, warp.d
            warp.put(destination, function(r[a], r[b]), d[a] & d[b])

        return two
    if len(sources) == 3:
        a, b, c = sources

        def three(warp: Warp) -> None:
            r, d = warp.r, warp.d
            warp.put(destination, function(r[a], r[b], r[c]), d[a] & d[b] & d[c])

        return three

    def many(warp: Warp) -> None:
        defined = -1
        for slot in sources:
            defined &= warp.d[slot]
        warp.put(destination, function(*(warp.r[slot] for slot in sources)), defined)

    return many


def compare(function: Function, destination: int, sources: Sequence[int]) -> Step:
    """A predicate from a function that gives [32] bool."""

    def step(warp: Warp) -> None:
        defined = -1
        for slot in sources:
            defined &= warp.d[slot]
        value = bits_of(function(*(warp.r[slot] for slot in sources)))
        warp.put_predicate(destination, value, defined)

    return step


def viewed(function: Function, dtype: Any, result: Any) -> Function:
    """A function of numbers as one of raw bits."""

    def raw(*values: np.ndarray) -> np.ndarray:
        return function(*(value.view(dtype) for value in values)).view(result)

    return raw


def narrow(value: np.ndarray, dtype: Any) -> np.ndarray:
    """The low bits of raw bits, as a narrower unsigned type."""
    return value if value.dtype == dtype else value.astype(dtype)
