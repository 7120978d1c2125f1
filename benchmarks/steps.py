"""Training steps of small parts of a model: forward and backward, compiled, timed in isolation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import harness
import workloads


class Activation(nn.Module):
    """silu(gate) * up on the two halves of one tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [.., n] for [.., 2 n]."""
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up


class LlamaBlock(nn.Module):
    """One decoder layer of transformers' Llama with its rotary embedding and the final norm."""

    def __init__(self, width: int, seq: int) -> None:
        super().__init__()
        model = workloads.llama(
            hidden=width, layers=1, heads=width // 64, ffn=3 * width, vocabulary=64, seq=seq
        )
        decoder: Any = model.model
        decoder.embed_tokens = None
        self.model: Any = decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, seq, width] for [batch, seq, width]."""
        return self.model(inputs_embeds=x).last_hidden_state


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a model for a width and a number of tokens.

    Attributes:
        make: width -> module.
        shape: (width, tokens) -> shape of the input.
        traffic: bytes that a perfectly fused step moves, for parts without a matmul.
    """

    make: Callable[[int], nn.Module]
    shape: Callable[[int, int], tuple[int, ...]]
    traffic: Callable[[int, int], int] = lambda _width, _tokens: 0


SEQ = 512
PARTS = {
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    "RMSNorm": Part(
        make=nn.RMSNorm,
        shape=lambda width, tokens: (tokens, width),
        traffic=lambda width, tokens: 5 * 2 * width * tokens,
    ),
    # Forward reads two and writes one; backward reads three and writes two; 4 width wide.
    "SwiGLU activation": Part(
        make=lambda _width: Activation(),
        shape=lambda width, tokens: (tokens, 8 * width),
        traffic=lambda width, tokens: 8 * 2 * 4 * width * tokens,
    ),
    "SwiGLU MLP": Part(
        make=lambda width: workloads.swiglu_mlp(width, blocks=1, norm=True),
        shape=lambda width, tokens: (tokens, width),
    ),
    "Llama block": Part(
        make=lambda width: LlamaBlock(width, SEQ),
        shape=lambda width, tokens: (max(1, tokens // SEQ), min(tokens, SEQ), width),
    ),
}


def build(part: str, *, width: int, tokens: int, device: torch.device) -> tuple[nn.Module, Any]:
    """Return module and input, both bf16; the input needs a gradient, as inside a model."""
    torch.manual_seed(0)
    model = PARTS[part].make(width).to(device, torch.bfloat16)
    x = torch.randn(PARTS[part].shape(width, tokens), device=device).bfloat16()
    return model, x.requires_grad_()


def roof_us(part: str, roof: harness.Roof, *, width: int, tokens: int) -> float:
    """Return the time of a step at the device's roof, its linear layers in bf16."""
    with torch.device("meta"):
        model = PARTS[part].make(width)
    weights = sum(each.numel() for each in model.parameters() if each.ndim == 2)
    return roof.us(bytes_=PARTS[part].traffic(width, tokens), flops=6 * weights * tokens)


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Compile and time one step in this process; return its times and what was quantized."""
    device = torch.device(case["device"])
    step, report = compiled_step(case, device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    timing = harness.measure(step, [()], device=device, seconds=case["seconds"], graph=False)
    result = {**dataclasses.asdict(timing), "compile_s": first_s - timing.us / 1e6, "quantized": 0}
    if report is not None:
        assert not report().failure, report()
        result["quantized"] = len(report().quantized)
        # The implementation is what distinguishes the lines of a table: say it, don't assume it.
        runs = {site.implementation for site in report().quantized}
        result["implementation"] = ", ".join(sorted(runs))
    return result


def alternating(case: dict[str, Any], options: Sequence[Any], rounds: int = 7) -> dict[str, Any]:
    """Time one part under several options of plain Inductor in turns, so that drift hits all."""
    device = torch.device(case["device"])
    compiled = [
        compiled_step({**case, "backend": "inductor", "options": each}, device)[0]
        for each in options
    ]
    seconds = case["seconds"] / rounds
    times = [
        [harness.measure(step, [()], device=device, seconds=seconds, graph=False).us]
        for step in compiled
    ]
    for _ in range(rounds - 1):
        for step, found in zip(compiled, times, strict=True):
            found.append(
                harness.measure(step, [()], device=device, seconds=seconds, graph=False).us
            )
    return {"us": times}


def compiled_step(
    case: dict[str, Any], device: torch.device
) -> tuple[Callable[[], None], Callable[[], Any] | None]:
    """Return forward and backward of a part, not compiled yet, and what gives its report."""
    from fos_compile.backend import Backend
    from fos_compile.config import parse_options

    model, x = build(case["part"], width=case["width"], tokens=case["tokens"], device=device)
    report = None
    if case["backend"] == "inductor":
        compiled = torch.compile(model, dynamic=False, fullgraph=True, options=case["options"])
    else:
        backend = Backend(parse_options(case["options"]))
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)

        def report() -> Any:
            return backend.report

    gradient: list[torch.Tensor] = []

    def step() -> None:
        y = compiled(x)
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step, report
