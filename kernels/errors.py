"""Errors that say which argument, what it must be, what it was, and how to fix it."""

from __future__ import annotations


class FosError(Exception):
    """Base of every error that this package raises on purpose."""


def _message(op: str, arg: str, requirement: str, actual: object, fix: str) -> str:
    text = f"{op}: {arg} must be {requirement}, got {actual}"
    return f"{text}; {fix}" if fix else text


class InvalidArgument(FosError, ValueError):
    """An argument that no implementation could accept."""

    def __init__(self, op: str, arg: str, requirement: str, actual: object, fix: str = "") -> None:
        super().__init__(_message(op, arg, requirement, actual, fix))


class UnsupportedArgument(FosError, NotImplementedError):
    """A meaningful argument that this operator does not implement."""

    def __init__(self, op: str, arg: str, requirement: str, actual: object, fix: str = "") -> None:
        super().__init__(_message(op, arg, requirement, actual, fix))
