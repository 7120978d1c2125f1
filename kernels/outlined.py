"""Operators of ``fos`` compiled once per signature and shared: library ``fos_outlined``, and
``fos_outlined_dynamic`` for calls of which the graph knows that sizes will change.

Inlining a quantizer into the user's graph costs seconds of compile time for every call site, a
few hundred of them in a training graph of twelve layers. Here a call site stays a single
node, and the reference is compiled by Inductor the first time that a signature (operator, options,
dtypes, shapes) runs; equal layers share it, and Inductor's disk cache shares it between processes.
What is lost is fusion with the producer. The bits are those of the reference: the compilation runs
with ``EXACT_NUMERICS`` whatever the surrounding graph uses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from fos_compile.kernels.op import LIBRARY, REGISTRY, Op
from fos_compile.kernels.own_code import own_code

OUTLINED = f"{LIBRARY}_outlined"
OUTLINED_DYNAMIC = f"{LIBRARY}_outlined_dynamic"
"""One compilation with symbolic sizes, at once."""
MAX_STATIC_SHAPES = 8
"""More shapes than this of one call (a static graph recompiled for every batch) share one
compilation with symbolic sizes. A model has a handful of layer shapes, and static code is faster:
docs/design.md."""

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

EXACT_NUMERICS = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
}
"""Inductor options under which compiled code rounds as eager code does: round to bf16 between fused
operators and contract no multiply-add, divide with correct rounding, keep subnormals."""


def exact_numerics() -> dict[str, Any]:
    """:data:`EXACT_NUMERICS` without the entries that the installed torch lacks."""
    known = torch._inductor.config.get_config_copy()
    return {name: on for name, on in EXACT_NUMERICS.items() if name in known}


class _Compiled:
    """Compilations of one operator's reference, by signature."""

    def __init__(self, op: Op, max_static_shapes: int) -> None:
        self.op = op
        self.max_static_shapes = max_static_shapes
        self.functions: dict[Hashable, Callable[..., Any]] = {}
        self.shapes: dict[Hashable, int] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo guards on the type: a weight (Parameter) must not split the cache.
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        if "stream" in kwargs:
            kwargs = {**kwargs, "stream": _as_tensor(kwargs["stream"], args)}
        call, shape = _signature(args, kwargs)
        function = self.functions.get((call, shape)) or self.functions.get((call, None))
        if function is None:
            with self.lock:
                function = self._compile(call, shape)
        with _one_state():
            return function(*args, **kwargs)

    def _compile(self, call: Hashable, shape: Hashable) -> Callable[..., Any]:
        self.shapes[call] = self.shapes.get(call, 0) + 1
        dynamic = self.shapes[call] > self.max_static_shapes
        function = torch.compile(
            own_code(self.op.reference), fullgraph=True, dynamic=dynamic, options=exact_numerics()
        )
        self.functions[call, None if dynamic else shape] = function
        return function


@contextlib.contextmanager
def _one_state() -> Iterator[None]:
    """The caller's grad mode, autocast and dispatch state must neither reach the reference nor
    split the cache: Dynamo guards on them, and the first run of compiled code has a state of its
    own, so that every signature would be compiled twice."""
    with (
        torch.no_grad(),
        torch._C._DisableAutocast(),
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._ExcludeDispatchKeyGuard(_VIEWS),
    ):
        yield


def _as_tensor(stream: int, args: tuple[Any, ...]) -> Any:
    """The stream as data: every call site has its own, and sites share a compilation."""
    seed = args[-1]
    if isinstance(seed, torch.Tensor) and seed.dtype == torch.int64:
        return torch.full((), stream, dtype=torch.int64, device=seed.device)
    return 0


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, Hashable]:
    """(what every shape of a call site shares, the sizes and strides)."""
    leaves = [*args, *kwargs.values()]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    call = (
        tuple(_static(leaf) for leaf in leaves),
        tuple(kwargs),
        tuple((t.dtype, t.device, t.ndim) for t in tensors),
    )
    sizes = tuple(leaf for leaf in leaves if type(leaf) is int)
    return call, (sizes, tuple((tuple(t.shape), t.stride()) for t in tensors))


def _static(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return "tensor"
    return "int" if type(leaf) is int else leaf


def define_outlined() -> None:
    """Register the outlined twins of every operator that may be inlined."""
    for library, static in ((OUTLINED, MAX_STATIC_SHAPES), (OUTLINED_DYNAMIC, 0)):
        for op in REGISTRY.values():
            if op.inlinable:
                qualified = f"{library}::{op.name}"
                torch.library.define(qualified, op.schema, tags=(torch.Tag.pt2_compliant_tag,))
                torch.library.impl(qualified, "CompositeExplicitAutograd", _Compiled(op, static))
                torch.library.register_fake(qualified, op.fake)


def outlined(op: Op, *, dynamic: bool = False) -> torch._ops.OpOverload:
    """``torch.ops.fos_outlined.<name>.default``, or its twin with symbolic sizes."""
    library = OUTLINED_DYNAMIC if dynamic else OUTLINED
    return getattr(getattr(torch.ops, library), op.name).default
