"""Small models that the tests and goldens share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

needs_exact_inductor = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="before torch 2.13 Inductor's C++ code ignores the exactness options: a bit may change",
)


class MLP(nn.Module):
    """up, gelu, down; sizes at the limit of what is quantized."""

    def __init__(self, width: int = 64, hidden: int = 128, *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): gate and up read one activation."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Self-attention from plain matmuls: its products have no parameter."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class TiedLM(nn.Module):
    """Embedding, one linear layer, and an output matmul with the embedding's weight."""

    def __init__(self, vocabulary: int = 96, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.body(self.embedding(tokens)), self.embedding.weight)


class Experts(nn.Module):
    """A mixture's expert weights as one 3-D parameter."""

    def __init__(self, experts: int = 2, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, hidden) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


def bf16(model: nn.Module) -> nn.Module:
    """The model in bfloat16, with reproducible weights."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(torch.bfloat16)


def tokens_of(width: int = 64, *, batch: int = 2, length: int = 16) -> torch.Tensor:
    """[batch, length, width] bfloat16, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator).to(torch.bfloat16)
