"""A Llama-shaped MLP, forward and backward, under the recipe `training` and in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fos_compile.bench.timing import Timing, measure

LLAMA_8B = 4096, 14336, 8192
"""Width, hidden width, tokens."""
TINY = 64, 128, 64
TRAINING = {"backend": "fouroversix", "options": {"recipe": "training"}}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        super().__init__()

        def linear(columns: int, rows: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)

        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] to the same."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def timings(sizes: tuple[int, int, int], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time of a step by way of compiling; launches of the host count."""
    width, hidden, tokens = sizes
    torch.manual_seed(0)
    model = SwiGLU(width, hidden, device)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    ways: dict[str, dict[str, Any]] = {"bf16, Inductor": {}, "training": TRAINING}
    found = {}
    for name, way in ways.items():
        torch._dynamo.reset()
        step = _step(torch.compile(model, **way), model, x)
        found[name] = measure(step, [()], device=device, seconds=seconds, graph=False)
    return found


def _step(compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Callable[[], None]:
    gradient = torch.ones_like(x)

    def step() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        compiled(x).backward(gradient)

    return step
