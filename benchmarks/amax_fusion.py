"""Does the amax of an activation come free with the kernel that produces it?

`fos::amax` without the Hadamard transform is lowered to aten nodes, rows first, so that Inductor
puts the reduction into the producer's last loop. Three forms of each producer, compiled by this
project's backend with its own options: alone, with amax in its graph, and followed by an amax in a
graph of its own, which reads the activation again. For GPUs: on a CPU amax stays an operator.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor_config
from torch.nn import functional

import harness
from fos_compile.kernels.own_code import own_code

SHAPES = ((8192, 5120), (8192, 14336), (16384, 4096))
BOUND = 1.15
NOTES = """\
`ratio` is the producer with amax over the producer alone, `unfused` the same with amax in a second
graph. `extra` is what amax makes the compiled graph move, by Inductor's own count of the bytes that
its kernels read and write, as a fraction of the activation: 1 is a second read. Nothing else is
compiled than what is timed. `kernels` are those of the producer with amax: the second, and for many
rows the third, reduce a number a row."""
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One producer on one shape."""

    producer: str
    shape: str
    alone_us: float
    with_amax_us: float
    ratio: float
    bound: float
    unfused: float
    extra: float
    kernels: int
    spread: float


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The input of a down projection."""
    return functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama writes it, the input of q, k, v, gate and up projections."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return wide.to(x.dtype) * weight


def operands(producer: Function, shape: tuple[int, ...], device: torch.device) -> Sequence[Tensor]:
    """Gaussian bf16 arguments of a producer."""
    second = shape if producer is swiglu else shape[-1:]
    return [torch.randn(s, device=device, dtype=torch.bfloat16) for s in (shape, second)]


def compiled(function: Function) -> Function:
    """By this project's backend, quantizing nothing; one shape, one compilation."""
    return torch.compile(
        own_code(function), dynamic=False, backend="fouroversix", options={"recipe": "bf16"}
    )


def with_amax(producer: Function) -> Function:
    """Activation and amax in one graph."""

    def both(*args: Tensor) -> tuple[Tensor, Tensor]:
        y = producer(*args)
        return y, torch.ops.fos.amax(y)

    return both


def amax(y: Tensor) -> Tensor:
    """Amax in a graph of its own."""
    return torch.ops.fos.amax(y)


def moved(function: Function, arguments: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes that the kernels of a compiled function move, and how many there are; compiles it."""
    # Inductor counts bytes for its log alone, and not for what it finds in a cache.
    log = compile_fx.inductor_metrics_log
    log.setLevel(logging.INFO)
    log.propagate = False
    metrics.reset()
    with inductor_config.patch(force_disable_caches=True):
        function(*arguments)
    assert metrics.num_bytes_accessed, "Inductor counted no bytes"
    return metrics.num_bytes_accessed, metrics.generated_kernel_count


def run(producer: Function, shape: tuple[int, int], device: torch.device) -> Row:
    """Compile and time the three forms."""
    arguments = harness.rotation(lambda _: operands(producer, shape, device), device=device)
    alone, fused, second = map(compiled, (producer, with_amax(producer), amax))
    bytes_alone, _ = moved(alone, arguments[0])
    bytes_fused, kernels = moved(fused, arguments[0])
    activation = arguments[0][0].nbytes

    def unfused(*args: Tensor) -> object:
        y = alone(*args)
        return y, second(y)

    def timed(function: Function) -> harness.Timing:
        return harness.measure(function, arguments, device=device)

    # Alone on both sides of the others: a clock that drifts shows in the spread.
    before, once, twice, after = map(timed, (alone, fused, unfused, alone))
    base = min(before.us, after.us)
    return Row(
        producer=producer.__name__,
        shape="x".join(map(str, shape)),
        alone_us=base,
        with_amax_us=once.us,
        ratio=once.us / base,
        bound=BOUND,
        unfused=twice.us / base,
        extra=(bytes_fused - bytes_alone) / activation,
        kernels=kernels,
        spread=max(before.us, after.us) / base - 1,
    )


@torch.no_grad()
def main() -> None:
    """Print the table and write it after every row."""
    options = harness.parser(__doc__, name="amax_fusion").parse_args()
    torch.manual_seed(0)
    facts = harness.header(options.device)
    rows: list[Row] = []
    for shape in SHAPES:
        for producer in (swiglu, rms_norm):
            torch.compiler.reset()
            rows.append(run(producer, shape, options.device))
            print(rows[-1], flush=True)
            harness.write_results(
                rows,
                title="Amax in its producer's kernel",
                facts=facts,
                md=options.md,
                csv_path=options.csv,
                notes=NOTES,
                show=shape == SHAPES[-1] and producer is rms_norm,
            )


if __name__ == "__main__":
    main()
