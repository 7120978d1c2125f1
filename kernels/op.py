"""What an operator of the library ``fos`` consists of, and the registry of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LIBRARY = "fos"
REGISTRY: dict[str, Op] = {}
"""Every operator by name, in order of definition."""

Example = tuple[tuple[Any, ...], dict[str, Any]]


class Cost(NamedTuple):
    """What one call moves and computes; symbolic where the shapes are."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Status:
    """A truth value that explains itself: falsy exactly when there is a reason against."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or "yes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operator. All callables take exactly the operator's own arguments."""

    name: str
    """Without the library: ``quantize``."""
    schema: str
    """Arguments and returns, as in docs/contract.md."""
    reference: Callable[..., Any]
    """Plain torch; the definition, the CPU implementation and what is traced and inlined."""
    fake: Callable[..., Any]
    """Output metadata from input metadata, symbolic sizes included."""
    supports: Callable[..., Status]
    """Whether a device kernel serves a call with these (possibly fake) arguments."""
    cost: Callable[..., Cost]
    """Bytes moved and operations done by one call."""
    example_inputs: Callable[[], list[Example]]
    """CPU arguments that cover the options."""
    inlinable: bool = True
    """False where inlining would change the meaning (random draws)."""
    tags: tuple[torch.Tag, ...] = ()

    @property
    def overload(self) -> torch._ops.OpOverload:
        """``torch.ops.fos.<name>.default``."""
        return getattr(getattr(torch.ops, LIBRARY), self.name).default


def define_op(op: Op) -> Op:
    """Register schema, implementation for every device, and fake of `op`; returns it."""
    qualified = f"{LIBRARY}::{op.name}"
    tags = (torch.Tag.pt2_compliant_tag, *op.tags)
    torch.library.define(qualified, op.schema, tags=tags)
    torch.library.impl(qualified, "CompositeExplicitAutograd", op.reference)
    torch.library.register_fake(qualified, op.fake)
    REGISTRY[op.name] = op
    return op


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with ambient autocast off: it would round the float32 products of a matmul."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return guarded


def no_kernel(op: str, device: torch.device) -> Status:
    """The answer of `supports` for a device: the CPU kernel if it can be built, else a reason."""
    if device.type == "cpu":
        from fos_compile.kernels.cpu.build import status

        return status()
    reason = f"no device kernel for {device.type}"
    if device.type == "cuda":
        from fos_compile.kernels import target

        reason = target.status(device).reason or reason
    return Status(f"{op}: {reason}; the decomposition serves")


def cute_kernel(op: str, x: torch.Tensor, options: dict[str, Any]) -> Status:
    """The answer of `supports` for a call on CUDA: what the implementation itself will do."""
    from fos_compile.kernels import target

    reason = target.status(x.device).reason
    if not reason:
        from fos_compile.kernels.cute import launch

        reason = launch.reason(op, x, options)
    return Status(reason and f"{op}: {reason}; the decomposition serves")
