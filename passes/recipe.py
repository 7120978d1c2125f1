"""What to quantize and how: operand specs and recipes, as frozen data."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.formats import qs_of

Role = Literal["fprop", "dgrad", "wgrad"]
Kind = Literal["activation", "weight", "gradient"]
Format = Literal["nvfp4", "mxfp4"]
ScaleRule = Literal["mse", "mae", "abs_max", "static_6", "static_4"]
Rounding = Literal[
    "nearest",
    "stochastic",
    "stochastic_realized",
    "stochastic_unbiased",
    "stochastic_hardware",
]
Block = Literal["1d", "2d"]
Lowering = Literal["outline", "inline", "opaque"]
"""outline: the reference, compiled once per signature and shared (kernels/outlined.py);
inline: the reference's nodes in the user's graph, which Inductor fuses with the producer; opaque:
the eager reference, op by op."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(Format),
    "scale_rule": get_args(ScaleRule),
    "rounding": get_args(Rounding),
    "block": get_args(Block),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OperandSpec:
    """How one operand of a matmul is quantized (the options of ``fos::quantize``)."""

    format: Format = "nvfp4"
    """Element and scale format; both operands of a matmul share it."""
    scale_rule: ScaleRule = "mse"
    """How a block picks between the 4 and 6 candidates; static rules do not pick."""
    rounding: Rounding = "nearest"
    """Stochastic rounding keeps gradients unbiased and needs a seed every step."""
    block: Block = "1d"
    """2d gives a tensor and its transpose the same scales; weights only."""
    rht: bool = False
    """Random Hadamard transform along K; cancels only if both operands have it."""

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise InvalidArgument(
                    "recipe", name, f"one of {', '.join(valid)}", getattr(self, name)
                )
        if self.format == "mxfp4" and (
            not self.scale_rule.startswith("static_") or self.block != "1d"
        ):
            raise InvalidArgument(
                "recipe", "format='mxfp4'", "used with scale_rule static_6, static_4 and block 1d",
                f"scale_rule={self.scale_rule}, block={self.block}",
                "pass scale_rule='static_6' or use format='nvfp4'",
            )  # fmt: skip

    @property
    def qs(self) -> float:
        """Q*S, the divisor of amax in the tensor scale (docs/contract.md)."""
        return qs_of(self.format, self.scale_rule, self.rounding)

    @property
    def stochastic(self) -> bool:
        """True if the rounding draws random numbers."""
        return self.rounding != "nearest"

    def __str__(self) -> str:
        parts: list[str] = [self.format, self.block, self.scale_rule]
        if self.stochastic:
            parts.append({"stochastic": "sr"}.get(self.rounding, self.rounding))
        if self.rht:
            parts.append("rht")
        return " ".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Which operand of which product is quantized, and how. ``None`` keeps high precision.

    The three products of a linear layer ``y = x @ w.T``: fprop ``x @ w.T``, dgrad ``dy @ w``,
    wgrad ``dy.T @ x``. A product with both operands quantized runs as an FP4 matmul; with one,
    that operand is dequantized again (weight-only).
    """

    name: str
    """Shown in reports and errors."""
    fprop_activation: OperandSpec | None = None
    fprop_weight: OperandSpec | None = None
    dgrad_gradient: OperandSpec | None = None
    dgrad_weight: OperandSpec | None = None
    wgrad_gradient: OperandSpec | None = None
    wgrad_activation: OperandSpec | None = None

    def __post_init__(self) -> None:
        for name in ("fprop_activation", "dgrad_gradient", "wgrad_gradient", "wgrad_activation"):
            spec: OperandSpec | None = getattr(self, name)
            if spec is not None and spec.block == "2d":
                raise InvalidArgument(
                    "recipe", f"{name} block", "1d", f"2d in recipe {self.name!r}",
                    "2d is for fprop_weight and dgrad_weight, which read one tensor both ways",
                )  # fmt: skip
        for role in get_args(Role):
            a, b = self.operands(role)
            if a is None or b is None:
                lonely = a or b
                if lonely is not None and lonely.rht:
                    raise InvalidArgument(
                        "recipe", f"{role} rht", "set on both operands or on none",
                        f"one quantized operand with rht in recipe {self.name!r}",
                    )  # fmt: skip
                continue
            for field in ("format", "rht"):
                if getattr(a, field) != getattr(b, field):
                    raise InvalidArgument(
                        "recipe", f"{role} {field}", "the same for both operands",
                        f"{getattr(a, field)!r} and {getattr(b, field)!r} in recipe {self.name!r}",
                    )  # fmt: skip

    def operands(self, role: Role) -> tuple[OperandSpec | None, OperandSpec | None]:
        """Specs of the (token or gradient side, other side) of one product."""
        if role == "fprop":
            return self.fprop_activation, self.fprop_weight
        if role == "dgrad":
            return self.dgrad_gradient, self.dgrad_weight
        return self.wgrad_gradient, self.wgrad_activation

    def with_options(self, **changes: object) -> Recipe:
        """The recipe with fields of :class:`OperandSpec` replaced in every quantized operand.

        ``recipe.with_options(scale_rule="static_6")`` is the same recipe without 4/6.
        """
        unknown = set(changes) - {f.name for f in dataclasses.fields(OperandSpec)}
        if unknown:
            valid = ", ".join(f.name for f in dataclasses.fields(OperandSpec))
            raise InvalidArgument(
                "recipe", "with_options", f"given fields of OperandSpec ({valid})", sorted(unknown)
            )
        specs = {
            f.name: dataclasses.replace(spec, **changes)  # type: ignore[arg-type]
            for f in dataclasses.fields(self)
            if isinstance(spec := getattr(self, f.name), OperandSpec)
        }
        suffix = ",".join(f"{k}={v}" for k, v in changes.items())
        return dataclasses.replace(self, name=f"{self.name}[{suffix}]", **specs)

    @property
    def quantizes(self) -> bool:
        """False for a recipe that leaves every product alone."""
        return any(isinstance(getattr(self, f.name), OperandSpec) for f in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PassConfig:
    """Everything the passes read. Hashable; its ``repr`` is part of the compile-cache key."""

    recipe: Recipe
    """What to do where no override matches."""
    overrides: tuple[tuple[str, Recipe], ...] = ()
    """(glob on the module path, recipe); the first match wins. As in ``skip``, a glob that matches
    a module covers what is inside it."""
    skip: tuple[str, ...] = ("lm_head", "*router*", "gate", "shared_expert_gate")
    """Globs of modules left in high precision: output heads and MoE routers by default."""
    min_weight_dim: int = 64
    """Weights with N or K below this are left alone; token dimensions never decide."""
    save_packed_weights: bool = False
    """Keep W.T packed between forward and backward instead of quantizing W again there.
    Saves one read of W a step, costs 0.28x of its bf16 bytes until the backward."""
    lowering: Lowering = "outline"
    """What becomes of an operator that no device kernel serves, after partitioning."""
    given_weights: bool = True
    """Whether a tensor that a graph is given, and that is no parameter, may be a weight. Not in the
    part of a training step behind its backward, where optimizers do their arithmetic."""
    strict: bool = False
    """Raise when a pass fails, instead of warning and keeping the untouched graph."""
