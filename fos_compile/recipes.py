"""Named recipes: ``options={"recipe": NAME}`` takes a name or a :class:`Recipe`."""

from __future__ import annotations

from fos_compile.kernels.errors import InvalidArgument
from fos_compile.passes.recipe import OperandSpec, Recipe

_ROW = OperandSpec()
_TILE = OperandSpec(block="2d")
_ROTATED = OperandSpec(rht=True)

INFERENCE = Recipe(name="inference", fprop_activation=_ROW, fprop_weight=_ROW)
"""Forward only: activations and weights in 1x16 blocks, 4/6 by mean squared error."""

TRAINING = Recipe(
    name="training",
    fprop_activation=_ROW,
    fprop_weight=_TILE,
    dgrad_gradient=OperandSpec(rounding="stochastic"),
    dgrad_weight=_TILE,
    wgrad_gradient=OperandSpec(rounding="stochastic", rht=True),
    wgrad_activation=_ROTATED,
)
"""Forward and backward with 4/6 (arXiv 2512.02010, training): weights in 16x16 tiles, so that W and
W.T round alike; gradients stochastic; the weight gradient under the random Hadamard transform."""

NVFP4 = TRAINING.with_options(scale_rule="static_6")
NVFP4 = Recipe(**{f: getattr(NVFP4, f) for f in NVFP4.__dataclass_fields__} | {"name": "nvfp4"})
"""TRAINING without 4/6: every block maps its maximum to 6. The baseline to compare with."""

WEIGHT_ONLY = Recipe(name="weight_only", fprop_weight=_ROW)
"""Forward only: weights in four bits, activations and products in high precision."""

BF16 = Recipe(name="bf16")
"""No quantization: the same compiler with every matmul left alone, as a baseline."""

RECIPES = {recipe.name: recipe for recipe in (INFERENCE, TRAINING, NVFP4, WEIGHT_ONLY, BF16)}


def recipe_named(recipe: str | Recipe) -> Recipe:
    """Look up a recipe by name; a :class:`Recipe` is returned as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InvalidArgument(
            "fouroversix", "recipe", f"a Recipe or one of {', '.join(RECIPES)}", recipe
        )
    return RECIPES[recipe]
