"""Small, safe edits of FX graphs: nodes that carry the metadata their neighbours need."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.node import map_arg

from fos_compile.kernels.op import LIBRARY, REGISTRY

# What an inserted node takes over from the node it serves: the partitioner, activation
# checkpointing, profilers and error messages all look for these.
_INHERITED = (
    "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "seq_nr", "source_fn_stack",
    "partitioner_tag", "recompute", "ac_graph_id", "autograd_backward", "memory_budget", "custom",
)  # fmt: skip


def value(node: fx.Node) -> Any:
    """The fake tensor (or SymInt, or tuple) that tracing recorded for ``node``."""
    return node.meta["val"]


def argument(node: fx.Node, index: int) -> Any:
    """``node.args[index]``; FX types it as a union of everything that an argument may be."""
    return node.args[index]


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """Insert ``target(*args)`` at the graph's insertion point.

    ``meta["val"]`` comes from running the target on the arguments' fake values; the other
    metadata from ``like``, the node on whose behalf this one exists.
    """
    node = graph.call_function(target, args, kwargs or {})
    inherit(node, like)
    fake_args, fake_kwargs = map_arg((args, kwargs or {}), value)
    if target is operator.getitem:
        node.meta["val"] = target(*fake_args)
        return node
    first = fake_args[0] if fake_args else None
    if getattr(target, "namespace", "") == LIBRARY and isinstance(first, FakeTensor):
        node.meta["val"] = _fake_result(target, fake_args, fake_kwargs, like=first)
        return node
    mode = detect_fake_mode([fake_args, fake_kwargs]) or detect_fake_mode(value(like))
    with mode if mode is not None else contextlib.nullcontext():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def _fake_result(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, like: FakeTensor
) -> Any:
    """What ``target``, an operator of ours, returns for fake tensors.

    Its fake runs on meta tensors: through the fake mode's dispatcher every call takes a
    millisecond, and a joint graph of twelve layers has a thousand.
    """
    op = REGISTRY[target._schema.name.removeprefix(f"{LIBRARY}::")]
    with unset_fake_temporarily():
        made = op.fake(*map(_meta, args), **kwargs)
        wrap = functools.partial(FakeTensor, like.fake_mode, device=like.device)
        return wrap(made) if isinstance(made, torch.Tensor) else tuple(map(wrap, made))


def _meta(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device="meta"
    )


def inherit(node: fx.Node, like: fx.Node) -> None:
    """Copy the metadata that neighbours look for, except the value."""
    for key in _INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]


def size(graph: fx.Graph, node: fx.Node, dim: int, *, before: fx.Node) -> int | fx.Node:
    """Size of ``node`` along ``dim``, for use at ``before``: an int if static, else a ``sym_size``.

    Reuses an existing ``sym_size`` node of the same tensor; never guards.
    """
    extent = value(node).shape[dim]
    if isinstance(extent, int):
        return extent
    positive = dim % value(node).ndim
    for user in node.users:
        if user.target is torch.ops.aten.sym_size.int and user.args[1] == positive:
            if user < before:
                return user
    with graph.inserting_before(behind(node)):
        return call(graph, torch.ops.aten.sym_size.int, (node, positive), like=node)


def behind(node: fx.Node) -> fx.Node:
    """The node to insert before, so that new nodes follow ``node``, placeholders and seeds."""
    following = node.next
    while following.op == "placeholder" or following.target is torch.ops.fos.seed.default:
        following = following.next
    return following


def unpack(graph: fx.Graph, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """``operator.getitem`` nodes for the first ``count`` elements of a tuple-valued node."""
    return tuple(call(graph, operator.getitem, (node, index), like=node) for index in range(count))
