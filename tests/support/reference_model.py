"""What the passes promise, written by hand: a model run in eager mode with FP4 products.

:class:`Quantized` intercepts every matmul that eager autograd runs, forward and backward, and calls
``fos::quantize`` and ``fos::scaled_mm`` in its place. It tells weights, activations and gradients
apart by the storages that it has seen, and knows nothing of graphs: where it agrees bit for bit
with a rewritten graph, the passes found the same operands, roles, seeds and streams.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
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
Specs = tuple[OperandSpec | None, OperandSpec | None]


@dataclasses.dataclass(frozen=True)
class _Site:
    """A forward product: its right operand, the kinds of both, and what its module wants."""

    right: Tensor
    kinds: tuple[str, str]
    recipe: Recipe


class Quantized(TorchDispatchMode):
    """Run what happens inside with the matmuls quantized as ``recipe`` says.

    ``overrides`` are recipes of modules, by their names. Set ``backward`` between the forward and
    the backward of the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, overrides: dict[str, Recipe]) -> None:
        super().__init__()
        self.recipes = [recipe]
        """Of the modules that are running, innermost last."""
        self.overrides = {model.get_submodule(name): own for name, own in overrides.items()}
        self.hooks: list[Any] = []
        self.backward = False
        self.products = 0
        weights = (*model.parameters(), *model.buffers())
        self.kinds = {w.untyped_storage().data_ptr(): "weight" for w in weights}
        self.transposed: dict[tuple[Any, ...], tuple[Tensor, bool]] = {}
        self.indices: dict[tuple[Any, ...], int] = {}
        self.sites: dict[int, _Site] = {}
        self.writes: Counter[int] = Counter()
        self.seed: Tensor | None = None
        # A freed storage would lend its address to the next tensor.
        self.alive: list[Tensor] = []

    def __enter__(self) -> Quantized:
        for module, own in self.overrides.items():
            self.hooks += [
                module.register_forward_pre_hook(lambda *_, own=own: self.recipes.append(own)),
                module.register_forward_hook(lambda *_: self._leave()),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _leave(self) -> None:
        self.recipes.pop()

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
        if func._schema.is_mutable:
            self.writes[args[0].untyped_storage().data_ptr()] += 1
        kinds = {self.kind(x) for x in tensors}
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and tensors:
                self.alive.append(result)
                if "gradient" in kinds:
                    kind = "gradient"
                else:
                    kind = "weight" if kinds == {"weight"} else "activation"
                self.kinds.setdefault(result.untyped_storage().data_ptr(), kind)
        if packet in _TRANSPOSES and out.ndim >= 2 and self._key(out) == self._key(args[0].mT):
            source, swapped = self._source(args[0])
            if self._key(out) != self._key(source):
                self.transposed.setdefault(self._key(out), (source, not swapped))
        return out

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """What is equal for views of the same elements, unless they were overwritten between."""
        storage = x.untyped_storage().data_ptr()
        shape = (x.storage_offset(), tuple(x.shape), tuple(x.stride()))
        return (storage, self.writes[storage], *shape)

    def _source(self, x: Tensor) -> tuple[Tensor, bool]:
        return self.transposed.get(self._key(x), (x, False))

    def _product(self, packet: Any, args: Any, kwargs: Any) -> Tensor:
        first = _LEFT[packet]
        a, b = args[first], args[first + 1]
        specs = self._backward_specs(a, b) if self.backward else self._forward_specs(packet, a, b)
        if specs == (None, None):
            return packet(*args, **kwargs)
        self.products += 1
        left = specs[0] and self._quantize(a, specs[0], transpose=False)
        right = specs[1] and self._quantize(b, specs[1], transpose=True)
        if left is None or right is None:
            dense = [left and _dense(left, a), right and _dense(right, b.mT).mT]
            sides = [a if dense[0] is None else dense[0], b if dense[1] is None else dense[1]]
            return packet(*args[:first], *sides, **kwargs)
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        bias = args[0] if first and beta != 0 else None
        plain = alpha == 1 and (bias is None or (bias.shape == b.shape[-1:] and beta == 1))
        out = torch.ops.fos.scaled_mm(
            *left,
            *right,
            bias if plain else None,
            m=a.shape[-2],
            n=b.shape[-1],
            k=a.shape[-1],
            out_dtype=a.dtype if plain else torch.float32,
        )
        if plain:
            return out
        return (out * alpha if bias is None else out * alpha + bias.float() * beta).to(a.dtype)

    def _forward_specs(self, packet: Any, a: Tensor, b: Tensor) -> Specs:
        kinds = self.kind(a), self.kind(b)
        if "weight" not in kinds:
            return None, None
        # Autograd numbers an operation before it runs; one that needs no gradient has no number.
        site = _Site(b, kinds, self.recipes[-1])
        self.sites.setdefault(torch.autograd._get_sequence_nr() - 1, site)
        token, weight = site.recipe.operands("fprop")
        if kinds == ("weight", "activation"):
            return _fit(weight, kinds[0]), _fit(token, kinds[1])
        return _fit(token, kinds[0]), _fit(weight, kinds[1])

    def _backward_specs(self, a: Tensor, b: Tensor) -> Specs:
        site = self.sites.get(torch._C._current_autograd_node()._sequence_nr())
        if site is None:
            return None, None
        kinds = self.kind(a), self.kind(b)
        on_left = kinds[0] == "gradient"
        other, kind = (b, kinds[1]) if on_left else (a, kinds[0])
        if site.kinds.count("weight") == 1:
            role = "dgrad" if kind == "weight" else "wgrad"
        else:
            right = site.right.untyped_storage().data_ptr()
            role = "dgrad" if other.untyped_storage().data_ptr() == right else "wgrad"
        gradient, saved = site.recipe.operands(role)
        saved = _fit(saved, kind)
        return (gradient, saved) if on_left else (saved, gradient)

    def _quantize(
        self, x: Tensor, spec: OperandSpec, *, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        source, swapped = self._source(x)
        transpose ^= swapped
        index = self.indices.setdefault(self._key(source), len(self.indices))
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


def _dense(quantized: tuple[Tensor, Tensor, Tensor, float], like: Tensor) -> Tensor:
    values, scales, amax, qs = quantized
    rows, cols = like.shape[-2:]
    return torch.ops.fos.dequantize(values, scales, amax, rows, cols, qs=qs, dtype=like.dtype)


def _fit(spec: OperandSpec | None, kind: str) -> OperandSpec | None:
    if spec is None or kind == "weight":
        return spec
    return dataclasses.replace(spec, block="1d")
