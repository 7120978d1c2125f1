"""A function on a code object of its own.

Dynamo keeps what it compiled, and counts its recompile limit, by code object; all functions that
one factory makes, or one function compiled twice, would share both.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function or method that shares its closure and globals, but not its code object.

    Any other callable (a module, a partial) is returned as it is.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__qualname__ = function.__qualname__
    copied.__dict__.update(function.__dict__)
    return copied
