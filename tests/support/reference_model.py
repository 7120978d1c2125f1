"""What the passes promise, written by hand: a model run in eager mode with FP4 products.

:class:`Quantized` intercepts every matmul that eager autograd runs, forward and backward, and calls
``fos::quantize`` and ``fos::scaled_mm`` in its place. It tells weights, activations and gradients
apart by the storages that it has seen, and knows nothing of graphs: where it agrees bit for bit
with a rewritten graph, the passes found the same operands, roles, seeds and streams.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fos_compile.passes.recipe import OperandSpec, Recipe

aten = torch.ops.aten
_LEFT = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
_BATCHED = (aten.bmm, aten.baddbmm)
_TRANSPOSES = (aten.t, aten.transpose, aten.permute)
Specs = tuple[OperandSpec, OperandSpec]


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), tuple(x.stride())


class Quantized(TorchDispatchMode):
    """Run what happens inside with the matmuls quantized as ``recipe`` says.

    Set ``backward`` between the forward and the backward of the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backward = False
        self.products = 0
        self.kinds = {p.untyped_storage().data_ptr(): "weight" for p in model.parameters()}
        self.transposed: dict[tuple[Any, ...], tuple[Tensor, bool]] = {}
        self.indices: dict[tuple[Any, ...], int] = {}
        self.sites: dict[int, tuple[Tensor, tuple[str, str]]] = {}
        self.seed: Tensor | None = None
        # A freed storage would lend its address to the next tensor.
        self.alive: list[Tensor] = []

    def kind(self, x: Tensor) -> str:
        return self.kinds.get(
            x.untyped_storage().data_ptr(), "gradient" if self.backward else "activation"
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        out = (
            self._product(packet, args, kwargs or {})
            if packet in _LEFT
            else func(*args, **(kwargs or {}))
        )
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kinds = {self.kind(x) for x in tensors}
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and tensors:
                self.alive.append(result)
                if "gradient" in kinds:
                    kind = "gradient"
                else:
                    kind = "weight" if kinds == {"weight"} else "activation"
                self.kinds.setdefault(result.untyped_storage().data_ptr(), kind)
        if packet in _TRANSPOSES and out.ndim >= 2 and _key(out) == _key(args[0].mT):
            source, swapped = self._source(args[0])
            if _key(out) != _key(source):
                self.transposed.setdefault(_key(out), (source, not swapped))
        return out

    def _source(self, x: Tensor) -> tuple[Tensor, bool]:
        return self.transposed.get(_key(x), (x, False))

    def _product(self, packet: Any, args: Any, kwargs: Any) -> Tensor:
        first = _LEFT[packet]
        a, b = args[first], args[first + 1]
        bias = args[0] if first else None
        specs = self._backward_specs(a, b) if self.backward else self._forward_specs(packet, a, b)
        if specs is None:
            return packet(*args, **kwargs)
        self.products += 1
        left = self._quantize(a, specs[0], transpose=False)
        right = self._quantize(b, specs[1], transpose=True)
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        plain = bias is None or (bias.shape == b.shape[-1:] and alpha == beta == 1)
        out = torch.ops.fos.scaled_mm(
            *left,
            *right,
            bias if plain else None,
            m=a.shape[-2],
            n=b.shape[-1],
            k=a.shape[-1],
            out_dtype=a.dtype if plain else torch.float32,
        )
        return out if plain else (out * alpha + bias.float() * beta).to(a.dtype)

    def _forward_specs(self, packet: Any, a: Tensor, b: Tensor) -> Specs | None:
        kinds = self.kind(a), self.kind(b)
        if packet in _BATCHED and "weight" not in kinds:
            return None
        # Autograd numbers an operation before it runs; one that needs no gradient has no number.
        self.sites.setdefault(torch.autograd._get_sequence_nr() - 1, (b, kinds))
        token, weight = self.recipe.operands("fprop")
        if kinds == ("weight", "activation"):
            return _fit(weight, kinds[0]), _fit(token, kinds[1])
        return _fit(token, kinds[0]), _fit(weight, kinds[1])

    def _backward_specs(self, a: Tensor, b: Tensor) -> Specs | None:
        site = self.sites.get(torch._C._current_autograd_node()._sequence_nr())
        if site is None:
            return None
        kinds = self.kind(a), self.kind(b)
        on_left = kinds[0] == "gradient"
        other, kind = (b, kinds[1]) if on_left else (a, kinds[0])
        if site[1].count("weight") == 1:
            role = "dgrad" if kind == "weight" else "wgrad"
        else:
            right = site[0].untyped_storage().data_ptr()
            role = "dgrad" if other.untyped_storage().data_ptr() == right else "wgrad"
        gradient, saved = self.recipe.operands(role)
        if gradient is None or saved is None:
            return None
        saved = _fit(saved, kind)
        return (gradient, saved) if on_left else (saved, gradient)

    def _quantize(
        self, x: Tensor, spec: OperandSpec, *, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        source, swapped = self._source(x)
        transpose ^= swapped
        index = self.indices.setdefault(_key(source), len(self.indices))
        if spec.stochastic and self.seed is None:
            self.seed = torch.ops.fos.seed(device=x.device)
        amax = torch.ops.fos.amax(source, spec.rht, transpose and spec.rht)
        values, scales = torch.ops.fos.quantize(
            source,
            amax,
            self.seed if spec.stochastic else None,
            format=spec.format,
            scale_rule=spec.scale_rule,
            rounding=spec.rounding,
            block=spec.block,
            rht=spec.rht,
            transpose=transpose,
            stream=2 * index + transpose,
        )
        return values, scales, amax, spec.qs


def _fit(spec: OperandSpec, kind: str) -> OperandSpec:
    return spec if kind == "weight" else dataclasses.replace(spec, block="1d")
