"""Lanes that run one after the other from one collective instruction to the next: see `simt`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

LANES = 32


class Stopped(Exception):
    """Another lane failed."""


class Warp:
    """Runs one function on 32 lanes in turn; on more, those of a CTA that has only barriers."""

    def __init__(self, order: Sequence[int] = range(LANES)) -> None:
        self.order = order
        self.lanes = len(order)
        self.epoch = 0
        self._here = threading.local()
        self._go = [threading.Semaphore(0) for _ in order]
        self._back = threading.Semaphore(0)
        self._given: dict[int, tuple[str, Any]] = {}
        self._taken: dict[int, Any] = {}
        self._running: set[int] = set()
        self._error: BaseException | None = None

    @property
    def lane(self) -> int:
        """The lane that runs."""
        return self._here.lane

    def run(self, function: Callable[[int], None]) -> None:
        """Call `function(lane)` on every lane to its end."""
        self._running = set(self.order)
        threads = [
            threading.Thread(target=self._start, args=(lane, function), daemon=True)
            for lane in self.order
        ]
        for thread in threads:
            thread.start()
        ready = self._running
        while self._running:
            for lane in [lane for lane in self.order if lane in ready]:
                self._go[lane].release()
                self._back.acquire()
            ready = self._running
            if self._error is None and self._running:
                ready = self._compute() or self._exchange()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _start(self, lane: int, function: Callable[[int], None]) -> None:
        self._here.lane = lane
        self._go[lane].acquire()
        try:
            with np.errstate(all="ignore"):
                function(lane)
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._running.discard(lane)
        self._back.release()

    def _exchange(self) -> set[int]:
        kinds = {kind for kind, _ in self._given.values()}
        if len(self._given) != self.lanes or len(kinds) != 1:
            self._error = AssertionError(f"lanes do not meet: {sorted(kinds)}, {self._running}")
            return self._running
        self._taken = {lane: value for lane, (_, value) in self._given.items()}
        self._given = {}
        self.epoch += kinds == {"barrier"}
        return self._running

    def _compute(self) -> set[int]:
        """Do what one lane waits for, for all that wait for the same: which those are."""
        calls = {lane: value for lane, (kind, value) in self._given.items() if kind == "together"}
        for function, form, _ in calls.values():
            lanes = [lane for lane in calls if calls[lane][:2] == (function, form)]
            columns = zip(*(calls[lane][2] for lane in lanes), strict=True)
            try:
                with np.errstate(all="ignore"):
                    result = function(*_assembled(form, map(_stacked, columns)))
            except BaseException as error:
                self._error = error
                return self._running
            numbers: list[Any] = []
            form = _form(result, numbers)
            numbers = [np.broadcast_to(number, len(lanes)) for number in numbers]
            for i, lane in enumerate(lanes):
                self._taken[lane] = _assembled(form, (number[i] for number in numbers))
                del self._given[lane]
            return set(lanes)
        return set()

    def together(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which touches no memory, done at once for all lanes that wait for it.

        Numbers become arrays with an entry a lane; everything else they must have in common.
        """

        def called(*given: Any) -> Any:
            numbers: list[Any] = []
            form = _form(given, numbers)
            return self.collect("together", (function, form, numbers))[self.lane]

        return called

    def collect(self, kind: str, value: Any = None) -> dict[int, Any]:
        """What every lane gives to the same instruction."""
        self._given[self.lane] = kind, value
        self._back.release()
        self._go[self.lane].acquire()
        if self._error is not None:
            raise Stopped
        return self._taken


def _form(value: Any, numbers: list[Any]) -> Any:
    """What of a value is no number; the numbers go to a list."""
    if isinstance(value, list | tuple):
        return type(value), tuple(_form(each, numbers) for each in value)
    if value is None or isinstance(value, bool | str):
        return None, value
    numbers.append(value)
    return None


def _assembled(form: Any, numbers: Iterator[Any]) -> Any:
    if form is None:
        return next(numbers)
    kind, parts = form
    if kind is None:
        return parts
    return getattr(kind, "_make", kind)([_assembled(part, numbers) for part in parts])


def _stacked(column: Sequence[Any]) -> np.ndarray:
    entries = np.array([np.asarray(entry).item() for entry in column])
    return entries.astype(np.float32 if entries.dtype.kind == "f" else np.uint32)
