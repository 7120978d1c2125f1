"""Failures of a pass, with the pass and the node that they happened at, and warnings."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator

from torch import fx

_NOT_THE_USER = {"contextlib", "fos_compile", "functools", "functorch", "torch"}


class FosCompileWarning(UserWarning):
    """Something was left in high precision that the user may have expected in four bits."""


def stack() -> list[types.FrameType]:
    """The frames of the caller, of its caller and so on."""
    frames = [sys._getframe(1)]
    while (caller := frames[-1].f_back) is not None:
        frames.append(caller)
    return frames


def is_users(frame: types.FrameType) -> bool:
    """False for a frame of torch, of this package, or of the library between them."""
    return frame.f_globals.get("__name__", "").split(".")[0] not in _NOT_THE_USER


def warn(message: str) -> None:
    """Warn at the line of the user's code that made torch compile."""
    depth = next((depth for depth, frame in enumerate(stack()) if is_users(frame)), 1)
    warnings.warn(message, FosCompileWarning, stacklevel=depth + 1)


class PassError(RuntimeError):
    """A graph pass failed: our fault or an unforeseen graph, never the user's model."""

    def __init__(self, pass_name: str, node: str, cause: BaseException) -> None:
        self.pass_name = pass_name
        self.node = node
        where = f"pass '{pass_name}'" + (f" at node '{node}'" if node else "")
        first_line = str(cause).strip().split("\n", 1)[0]  # lint appends the whole graph
        self.summary = f"{where} failed: {type(cause).__name__}: {first_line}"
        """What happened, without the ways out."""
        super().__init__(
            f"{self.summary}; compile with options={{'strict': False}} to run "
            "the untouched graph instead, or skip the module with options={'skip': [...]}"
        )


class _NodeError(Exception):
    """Carries the node from where a pass works on it to the runner, which knows the pass."""

    def __init__(self, node: fx.Node) -> None:
        self.node = f"{node.name} ({node.target})"


@contextlib.contextmanager
def working_on(node: fx.Node) -> Iterator[None]:
    """Name ``node`` in the error if the block raises."""
    try:
        yield
    except _NodeError:
        raise
    except Exception as cause:
        raise _NodeError(node) from cause


@contextlib.contextmanager
def running(pass_name: str) -> Iterator[None]:
    """Turn any exception of the block into a :class:`PassError` of this pass."""
    try:
        yield
    except _NodeError as error:
        assert error.__cause__ is not None
        raise PassError(pass_name, error.node, error.__cause__) from error.__cause__
    except Exception as cause:
        raise PassError(pass_name, "", cause) from cause
