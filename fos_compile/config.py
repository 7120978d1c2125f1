"""Options of the backend, parsed and validated into frozen data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.outlined import exact_numerics
from fos_compile.passes.recipe import Lowering, PassConfig, Recipe, ScaleRule
from fos_compile.recipes import INFERENCE, RECIPES, TRAINING, recipe_named

Compiler = Literal["inductor", "eager"]
_PASS_DEFAULTS = PassConfig(recipe=INFERENCE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BackendConfig:
    """What ``torch.compile(..., backend="fouroversix", options={...})`` was asked for.

    Field names are the option names; every field has a default, so ``{}`` is valid.
    """

    recipe: Recipe | None = None
    """A name or a :class:`Recipe`. None picks per graph: ``training`` if it has a backward, else
    ``inference``."""
    scale_rule: ScaleRule | None = None
    """Replaces the scale rule of every quantized operand (``static_6`` switches 4/6 off)."""
    skip: tuple[str, ...] = ()
    """Globs of module paths to leave alone with all that is inside, besides ``default_skip``."""
    default_skip: tuple[str, ...] = _PASS_DEFAULTS.skip
    """Output heads and MoE routers; pass ``()`` to quantize them too."""
    overrides: tuple[tuple[str, Recipe], ...] = ()
    """``{glob: recipe}`` for modules that want another recipe; the first match wins."""
    min_weight_dim: int = _PASS_DEFAULTS.min_weight_dim
    """Weights with N or K below this stay in high precision."""
    save_packed_weights: bool = _PASS_DEFAULTS.save_packed_weights
    """Keep W.T packed for the backward instead of quantizing W again there."""
    compiler: Compiler = "inductor"
    """``eager`` runs the rewritten graph op by op: for debugging, or without a C++ compiler."""
    mode: str | None = None
    """Inductor mode: ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``."""
    lowering: Lowering = "outline"
    """Without a device kernel a quantizer's reference is compiled once and shared (``outline``),
    compiled into the user's graph (``inline``: fuses, but seconds of compile time a matmul) or run
    op by op (``opaque``). The bits are the same."""
    exact: bool = True
    """Compile the whole graph so that fusion cannot change the bits that a quantizer reads: round
    to bf16 between fused operators, divide with correct rounding, keep subnormals. False is faster
    and quantizes values that never were rounded (benchmarks/exactness.py)."""
    inductor: tuple[tuple[str, Any], ...] = ()
    """Further ``torch._inductor.config`` entries for this compile, as a dict."""
    strict: bool = False
    """Raise when a pass fails, instead of warning and compiling the untouched graph."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("compiler", Compiler),
            ("lowering", Lowering),
            ("scale_rule", ScaleRule),
        ):
            given, valid = getattr(self, name), get_args(choices)
            if given not in valid and not (given is None and name == "scale_rule"):
                raise InvalidArgument("fouroversix", name, f"one of {', '.join(valid)}", given)
        for name, type_ in (
            ("min_weight_dim", int),
            ("save_packed_weights", bool),
            ("exact", bool),
            ("strict", bool),
        ):
            if type(given := getattr(self, name)) is not type_:
                raise InvalidArgument("fouroversix", name, f"of type {type_.__name__}", repr(given))
        if self.min_weight_dim < 0:
            raise InvalidArgument("fouroversix", "min_weight_dim", "0 or more", self.min_weight_dim)
        if self.mode is not None:
            self._check_mode(self.mode)
        if self.inductor:
            self._check_inductor()

    def _check_inductor(self) -> None:
        import torch._inductor.config

        known = torch._inductor.config.get_config_copy()
        if unknown := [name for name, _ in self.inductor if name not in known]:
            raise InvalidArgument(
                "fouroversix", "inductor", "a dict of entries of torch._inductor.config",
                ", ".join(map(repr, unknown)), "see torch._inductor.list_options()",
            )  # fmt: skip

    def _check_mode(self, mode: str) -> None:
        import torch._inductor

        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise InvalidArgument("fouroversix", "mode", f"one of {', '.join(modes)}", mode)
        if self.compiler != "inductor" and mode != "default":
            raise InvalidArgument(
                "fouroversix",
                "mode",
                "used with compiler='inductor'",
                f"mode={mode!r}, compiler={self.compiler!r}",
            )

    def pass_config(self, *, training: bool, given_weights: bool = True) -> PassConfig:
        """What the passes read for a graph with (training) or without a backward."""
        recipe = self.recipe or (TRAINING if training else INFERENCE)
        return PassConfig(
            recipe=self._with_rule(recipe),
            overrides=tuple((glob, self._with_rule(each)) for glob, each in self.overrides),
            skip=(*self.default_skip, *self.skip),
            min_weight_dim=self.min_weight_dim,
            save_packed_weights=self.save_packed_weights,
            lowering=self.lowering if self.compiler == "inductor" else "opaque",
            given_weights=given_weights,
            strict=self.strict,
        )

    def replaced(self, **changes: Any) -> BackendConfig:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def _with_rule(self, recipe: Recipe) -> Recipe:
        if self.scale_rule is None or not recipe.quantizes:
            return recipe
        return recipe.with_options(scale_rule=self.scale_rule)

    def inductor_patches(self) -> dict[str, Any]:
        """Entries of ``torch._inductor.config`` for this compile, most specific last."""
        import torch._inductor

        patches: dict[str, Any] = {}
        if self.exact:
            patches |= exact_numerics()
        if self.mode is not None:
            patches |= torch._inductor.list_mode_options(self.mode)
        return patches | dict(self.inductor)


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> BackendConfig:
    """Read the ``options=`` dict and the ``mode=`` of ``torch.compile``.

    Raises:
        InvalidArgument: unknown option, recipe, rule, mode or compiler; the message lists the
            valid ones.
    """
    if options is not None and not isinstance(options, Mapping):
        raise InvalidArgument("fouroversix", "options", "a dict", repr(options))
    given = dict(options or {})
    valid = [field.name for field in dataclasses.fields(BackendConfig)]
    if unknown := [str(name) for name in given if name not in valid]:
        raise InvalidArgument(
            "fouroversix", "options", f"named {', '.join(valid)}", ", ".join(sorted(unknown))
        )
    if mode is not None:
        given["mode"] = mode
    if "recipe" not in given and (name := os.environ.get("FOS_RECIPE")):
        if name not in RECIPES:
            names = f"one of {', '.join(RECIPES)}"
            raise InvalidArgument("fouroversix", "FOS_RECIPE", names, repr(name), "or unset it")
        given["recipe"] = name
    if given.get("recipe") is not None:
        given["recipe"] = recipe_named(given["recipe"])
    for name in ("skip", "default_skip"):
        if name in given:
            given[name] = _globs(name, given[name])
    given["overrides"] = tuple(
        (g, recipe_named(r)) for g, r in _pairs("overrides", given.get("overrides", {}))
    )
    given["inductor"] = tuple(_pairs("inductor", given.get("inductor", {})))
    return BackendConfig(**given)


def _globs(name: str, globs: Iterable[str]) -> tuple[str, ...]:
    listed = isinstance(globs, Iterable) and not isinstance(globs, (str, Mapping))
    read = tuple(globs) if listed else ()  # once: it may be a generator
    if not listed or not all(isinstance(glob, str) for glob in read):
        raise InvalidArgument("fouroversix", name, "a list of module-path globs", repr(globs))
    return read


def _pairs(name: str, mapping: Any) -> list[tuple[str, Any]]:
    """Entries of a dict, or of the tuple of pairs that a BackendConfig holds."""
    entries = mapping.items() if isinstance(mapping, Mapping) else mapping
    pairs = isinstance(mapping, (Mapping, tuple)) and all(
        isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in entries
    )
    if not pairs:
        raise InvalidArgument("fouroversix", name, "a dict with text as keys", repr(mapping))
    return list(entries)
