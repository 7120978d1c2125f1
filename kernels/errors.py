"""Errors that say which argument, what it must be, what it was, and how to fix it."""

from __future__ import annotations


class FosError(Exception):
    """Base of every error that this package raises on purpose.

    Its arguments are operator, argument, requirement, actual value and, if there is one, the fix.
    They become a sentence when it is read: an ``__init__`` of our own would be what Dynamo refuses
    to trace under ``fullgraph=True``, in place of what is wrong.
    """

    def __str__(self) -> str:
        if len(self.args) < 4:  # torch sometimes raises the type again with a text of its own
            return super().__str__()
        op, arg, requirement, actual, *fix = self.args
        return "; ".join([f"{op}: {arg} must be {requirement}, got {actual}", *filter(None, fix)])


class InvalidArgument(FosError, ValueError):
    """An argument that no implementation could accept."""


class UnsupportedArgument(FosError, NotImplementedError):
    """A meaningful argument that this operator does not implement."""
