"""Dice of stochastic rounding: Philox-4x32-10 (docs/contract.md section 5)."""

from typing import Any

from fos_compile.kernels.cute import ptx


def keys_of(seed: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """The keys of Philox's ten rounds for a (low, high) word of the seed."""
    k0, k1 = seed
    keys = []
    for _ in range(10):
        keys.append((k0, k1))
        k0, k1 = k0 + ptx.u32(0x9E3779B9), k1 + ptx.u32(0xBB67AE85)
    return keys


def philox(keys: list[tuple[Any, Any]], group: tuple[Any, Any], stream: Any) -> list[Any]:
    """The four random words of a group of 16: Philox-4x32-10 (docs/contract.md section 5).

    Args:
        keys: of `keys_of`.
        group: (low, high) word of the group's number.
        stream: third word of the counter.
    """
    c = [*group, stream, ptx.u32(0)]
    for k0, k1 in keys:
        high0, low0 = ptx.mul_wide(c[0], 0xD2511F53)
        high1, low1 = ptx.mul_wide(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
    return c


def offsets(words: list[Any]) -> list[Any]:
    """The 16 bytes of four words as u = (byte + 0.5) / 256, in one exact multiply-add."""
    return [
        ptx.fma(ptx.to_float((words[i // 4] >> (8 * (i % 4))) & 0xFF), 1 / 256, 1 / 512)
        for i in range(16)
    ]
