"""Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Words are int64 tensors (or ints) in [0, 2^32). A 32x32 product is taken in two halves of 16 bits,
so that nothing exceeds 2^49 and no signed overflow can happen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Word = Any
"""A tensor or an int: the counter of a call is part one, part the other."""

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _high_low(multiplier: int, a: Word) -> tuple[Word, Word]:
    low = (a & 0xFFFF) * multiplier
    middle = (a >> 16) * multiplier + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Four random words per counter; words and key broadcast against each other.

    Args:
        counter: four words, int64 tensors or ints in [0, 2^32).
        key: two words, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(_M0, c0)
        high1, low1 = _high_low(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def dice(seed: Tensor, groups: Tensor, stream: int | Tensor) -> Tensor:
    """The offsets u of stochastic rounding: (byte + 0.5) / 256.

    Args:
        seed: int64 [1].
        groups: int64 [..], indices of groups of 16 elements.
        stream: which independent sequence; an int or int64 [].

    Returns:
        float32 [16, ..]. Source: docs/contract.md section 5.
    """
    words = _words(seed, groups, stream)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=seed.device)
    byte = (words.unsqueeze(1) >> shifts.view(4, *[1] * groups.dim())) & 0xFF
    return (byte.flatten(0, 1).to(torch.float32) + 0.5) * (1.0 / 256.0)


def hardware_dice(seed: Tensor, groups: Tensor, stream: int | Tensor) -> Tensor:
    """The offsets of `cvt.rs.satfinite.e2m1x4.f32`: 16 bits of a word for each of 4 elements.

    Arguments and result are those of `dice`; multiples of 2^-16.
    """
    words = _words(seed, groups, stream)
    near = ((words >> 8) & 0xFF00) | (words & 0xFF)
    far = ((words >> 16) & 0xFF00) | ((words >> 8) & 0xFF)
    bits = torch.stack([near, _reversed(near), far, _reversed(far)], 1)
    return bits.flatten(0, 1).to(torch.float32) * 2.0**-16


def _reversed(a: Tensor) -> Tensor:
    """The lowest 16 bits, which are all that `a` has, from back to front."""
    for distance, low in ((1, 0x5555), (2, 0x3333), (4, 0x0F0F), (8, 0x00FF)):
        a = ((a >> distance) & low) | ((a & low) << distance)
    return a


def _words(seed: Tensor, groups: Tensor, stream: int | Tensor) -> Tensor:
    """int32 [4, ..]: the random words of each group."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    if not isinstance(stream, Tensor):
        # Inductor takes arithmetic between symbolic ints and int64 tensors through float32.
        stream = torch.full((), stream, dtype=torch.int64, device=seed.device)
    words = philox((groups & _MASK, groups >> 32, stream & _MASK, 0), key)
    # As int32 by subtraction: the conversion of an unrepresentable int64 is not portable.
    return torch.stack([(w - ((w >> 31) << 32)).to(torch.int32) for w in words])
