"""Shapes with names: the linear layers of published models, as benchmarks measure them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """A weight of [n, k] and the number of tokens it is multiplied with: [m, k] @ [n, k].T."""

    name: str
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the product."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What of a decoder-only transformer decides the shapes of its linear layers.

    Attributes:
        kv_heads: heads of key and value; `heads` without grouped queries.
        ffn: width between gate/up and down projections.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def linears(self, tokens: int) -> Iterator[LinearShape]:
        """Yield the distinct linear layers of one block for `tokens` tokens."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q": (query, self.hidden),
            "kv": (key, self.hidden),
            "o": (self.hidden, query),
            "gate_up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }
        for part, (n, k) in sizes.items():
            yield LinearShape(name=f"{self.name} {part}", m=tokens, n=n, k=k)


MODELS = {
    model.name: model
    for model in (
        ModelShape(
            name="llama-3.2-1b",
            hidden=2048,
            layers=16,
            heads=32,
            kv_heads=8,
            head_dim=64,
            ffn=8192,
        ),
        ModelShape(
            name="llama-3.1-8b",
            hidden=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            ffn=14336,
        ),
        ModelShape(
            name="llama-3.1-70b",
            hidden=8192,
            layers=80,
            heads=64,
            kv_heads=8,
            head_dim=128,
            ffn=28672,
        ),
        ModelShape(
            name="qwen3-8b",
            hidden=4096,
            layers=36,
            heads=32,
            kv_heads=8,
            head_dim=128,
            ffn=12288,
        ),
        ModelShape(
            name="qwen3-32b",
            hidden=5120,
            layers=64,
            heads=64,
            kv_heads=8,
            head_dim=128,
            ffn=25600,
        ),
    )
}

# Decode with one request, decode with a batch, a long prefill or a training micro-batch.
TOKENS = (1, 128, 8192)

# What a quantizer reads: [rows, cols], from launch-bound to bandwidth-bound, one of them unaligned.
ACTIVATIONS = ((128, 4096), (2048, 2048), (8192, 5120), (16384, 16384), (4095, 4100))
