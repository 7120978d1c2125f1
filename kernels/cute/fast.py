"""A block of 16 bf16 through the filter of its rules: what the fast 1D kernels have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass

from fos_compile.kernels.cute import (
    contract,
    filtered,
    filtered_stochastic,
    hadamard,
    ptx,
    random_bits,
    tiles,
)


class Block(NamedTuple):
    """Codes (two words of nibbles), scale byte, and 1 where only `contract` can tell."""

    low: Any
    high: Any
    scale: Any
    near: Any


def ready(words: list[Any], rules: contract.Rules, rht: bool) -> list[Any]:
    """16 bf16 in pairs, after the transform if there is one, as `block` needs them."""
    words = rotated(words) if rht else words
    if rules.rounding == "nearest":
        return filtered.without_negative_zeros(words)
    return [ptx.clear_negative_zeros_bf16x2(word) for word in words]


def block(
    words: list[Any],
    tensor: contract.Tensor,
    rules: contract.Rules,
    dice: list[Any] | None,
    half_exponents: Any,
) -> Block:
    """Quantize a block.

    Args:
        words: of `ready`.
        tensor: of `contract.tensor_of`.
        rules: mse or static_6; nearest, stochastic or stochastic_unbiased; 1d.
        dice: the four words of `random_bits.philox`; None for nearest.
        half_exponents: see `filtered.adaptive`.
    """
    mags = filtered.magnitudes(words)
    if dice is not None:
        choice = filtered_stochastic.choose(mags, tensor, rules, half_exponents)
        low, high = filtered_stochastic.codes(words, choice.inverse, dice)
    else:
        if rules.adaptive:
            choice = filtered.adaptive(mags, tensor, half_exponents)
        else:
            choice = filtered.single(mags, tensor)
        low, high = filtered.codes(words, choice.inverse)
    low = ptx.where_nonzero(choice.scale, low, 0)
    high = ptx.where_nonzero(choice.scale, high, 0)
    return Block(low, high, choice.scale, choice.near)


def exact(
    words: list[Any],
    tensor: contract.Tensor,
    rules: contract.Rules,
    throw: Callable[[], Any] | None,
    outside: Any,
) -> tuple[list[Any], Any]:
    """The same operation by operation: two words of nibbles and the scale byte.

    The dice are thrown once the scale is chosen: before, 16 registers more would be occupied.
    """
    given = [value for word in words for value in tiles.unpack(word, cutlass.BFloat16)]
    dice = None if throw is None else lambda: random_bits.offsets(throw())
    return contract.quantize_either(given, tensor, rules, dice, outside)


def rotated(words: list[Any]) -> list[Any]:
    """16 bf16 in pairs after the random Hadamard transform."""
    given = [value for word in words for value in tiles.unpack(word, cutlass.BFloat16)]
    return tiles.packed(hadamard.rotate(given, lambda value: value), cutlass.BFloat16)
