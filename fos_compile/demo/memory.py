"""Two measurements of memory: what a forward pass keeps for its backward, what weights weigh."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fos_compile.passes.report import Report

_BLOCK = 16
_COLUMN_MULTIPLE = 64
_SCALE_ROWS = 128


class SavedTensors:
    """Adds up the storage that autograd keeps between a forward pass and its backward pass.

    Hooks on saved tensors would change what AOTAutograd compiles, and do not see the tensors it
    saves without a version check, so the autograd graph is walked instead: call `observe(loss)`
    between forward and backward. Only the first call after `arm` does anything.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._known: set[int] | None = None

    def arm(self, model: torch.nn.Module, inputs: Iterable[torch.Tensor] = ()) -> None:
        """Make the next `observe` measure, leaving out parameters, buffers and `inputs`."""
        tensors = [*model.parameters(), *model.buffers(), *inputs]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    @torch.compiler.disable
    def observe(self, loss: torch.Tensor) -> None:
        """Measure what the graph behind `loss` holds, if armed."""
        if self._known is None:
            return
        sizes = {}
        for tensor in _saved_tensors(loss.grad_fn):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                sizes[storage.data_ptr()] = storage.nbytes()
        self.num_bytes = sum(sizes.values())
        self._known = None


def _saved_tensors(root: torch.autograd.graph.Node | None) -> Iterator[torch.Tensor]:
    """Yield every tensor saved by `root` and the nodes behind it, compiled or eager."""
    seen = {None}
    todo: list[Any] = [root]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo.extend(behind for behind, _ in node.next_functions)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())
        # AOTAutograd keeps the tensors that it never checks for mutation in this attribute.
        saved += getattr(node, "_tensors_no_vc_check", ())
        for value in saved:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in values if isinstance(item, torch.Tensor))


def weight_bytes(model: torch.nn.Module, quantized: Iterable[str] = ()) -> int:
    """Return the bytes of all parameters as the matmuls of a forward pass read them.

    A parameter counts 2 bytes an element (bf16), a weight matrix of a module named in `quantized`
    its packed codes, block scales and amax.
    """
    packed = {f"{name}.weight" for name in quantized}
    return sum(
        _packed_bytes(*parameter.shape) if name in packed else 2 * parameter.numel()
        for name, parameter in model.named_parameters()
    )


def _packed_bytes(rows: int, cols: int) -> int:
    padded = math.ceil(cols / _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    scale_rows = math.ceil(rows / _SCALE_ROWS) * _SCALE_ROWS
    return rows * padded // 2 + scale_rows * padded // _BLOCK + 4


def quantized_modules(report: Report | None) -> set[str]:
    """Return the paths of the modules whose forward matmul was quantized."""
    if report is None:
        return set()
    return {site.path for site in report.quantized if site.role == "fprop"}
