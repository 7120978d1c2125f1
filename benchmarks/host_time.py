"""What does a call of a quantizer cost the host, next to a call of torch?

A matrix so small that a GPU waits for the host, eager calls of a warm shape, no CUDA graph. On a
CPU the same Python runs with kernels that do nothing: what is left is ours.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import torch

import harness
from fos_compile import kernels
from fos_compile.kernels import cuda, target
from fos_compile.kernels.cute import host_general, launch
from fos_compile.kernels.cute.cache import KERNELS, Kernel, KernelCache, KernelKey

SHAPE = (64, 128)
CALLS, BATCHES = 100, 201
"""Fewer calls in a batch than a launch queue holds, or the host would wait for the GPU."""
NOTES = """\
`us` is the median over {batches} batches of {calls} calls, from Python to Python; `over_neg` that
over the time of torch.neg right before. `function_us` is the same call of the operator's CUDA
function, without torch's dispatcher; `kernel_us` is the launch of the compiled kernel alone,
`buffers_us` what the output buffers cost: `us` contains both. Options that are given cost the
dispatcher more than defaults."""
STAND_IN = "fos_host_time"
"""Library of the operators on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One call."""

    call: str
    us: float
    over_neg: float | None
    function_us: float | None
    kernel_us: float | None
    buffers_us: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A call with its arguments, and the CUDA function behind it if it is one of ours."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    function: Callable[..., Any] | None = None


def host_us(function: Callable[[], object], device: torch.device) -> float:
    """Median host time of a call, the GPU idle at the start of every batch."""
    samples = []
    for index in range(BATCHES + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        if index >= 3:
            samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(samples)


def idle_kernels() -> None:
    """Serve CPU tensors by the CUDA functions, with kernels that do nothing."""
    found = types.SimpleNamespace(get=lambda key, arch: lambda *arguments: None)
    properties = types.SimpleNamespace(multi_processor_count=132)
    replaced: list[tuple[Any, str, Any]] = [
        (launch, "KERNELS", found),
        (launch, "disagreement", lambda *arguments: ""),
        (target, "status", lambda device: kernels.Status()),
        (target, "arch", lambda device: "none"),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_properties", lambda device: properties),
    ]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    functions: list[tuple[kernels.Op, Callable[..., object]]] = [
        (kernels.AMAX, cuda.cuda_amax),
        (kernels.QUANTIZE, cuda.cuda_quantize),
        (kernels.QUANTIZE_PAIR, cuda.cuda_quantize_pair),
        (kernels.DEQUANTIZE, cuda.cuda_dequantize),
    ]
    for op, function in functions:
        torch.library.define(f"{STAND_IN}::{op.name}", op.schema)
        torch.library.impl(f"{STAND_IN}::{op.name}", "CPU", function)


def cases(device: torch.device) -> list[Case]:
    """torch for comparison, then every operator that has a kernel."""
    library = getattr(torch.ops, "fos" if device.type == "cuda" else STAND_IN)
    x = torch.randn(SHAPE, device=device).bfloat16()
    amax = x.abs().amax().float()
    seed = torch.tensor([7], device=device)
    gradient = {"rounding_col": "stochastic", "rht_col": True}

    def quantize(name: str, *rest: Any, **options: Any) -> Case:
        return Case(
            name=name,
            call=library.quantize.default,
            arguments=(x, amax, *rest),
            options=options,
            function=cuda.cuda_quantize,
        )

    return [
        Case(name="torch.neg", call=torch.neg, arguments=(x,)),
        Case(
            name="torch.empty",
            call=torch.empty,
            arguments=(SHAPE,),
            options={"dtype": torch.uint8, "device": device},
        ),
        quantize("quantize"),
        quantize("quantize, 2D static_6", block="2d", scale_rule="static_6"),
        quantize("quantize, transposed stochastic", seed, transpose=True, rounding="stochastic"),
        Case(
            name="quantize_pair",
            call=library.quantize_pair.default,
            arguments=(x, amax, amax, seed),
            options=gradient,
            function=cuda.cuda_quantize_pair,
        ),
        Case(
            name="dequantize",
            call=library.dequantize.default,
            arguments=(*library.quantize(x, amax), None, *SHAPE),
            options={"dtype": torch.bfloat16},
            function=cuda.cuda_dequantize,
        ),
        Case(
            name="amax with RHT",
            call=library.amax.default,
            arguments=(x, True),
            function=cuda.cuda_amax,
        ),
    ]


def buffers_us(outputs: Any, device: torch.device) -> float:
    """Host time of allocating buffers like these."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    new = [host_general.allocator(tuple(each.shape), each.dtype, device) for each in outputs]
    return sum(host_us(each, device) for each in new)


class Recorder:
    """In place of the cache of compiled kernels: remembers the last launch."""

    def __init__(self, kernels: KernelCache) -> None:
        self.kernels = kernels
        self.last: Callable[[], object] = list

    def get(self, key: KernelKey, arch: str) -> Kernel:
        """A kernel that is remembered with its arguments when it is called."""
        kernel = self.kernels.get(key, arch)

        def remembered(*arguments: Any) -> None:
            self.last = functools.partial(kernel, *arguments)
            kernel(*arguments)

        return remembered


def kernel_us(case: Case, device: torch.device) -> float:
    """Host time of launching the kernel of a call."""
    assert case.function is not None
    recorder = Recorder(KERNELS)
    replaced = {"KERNELS": recorder, "_PLANS": {}, "_READY": {}}
    kept = {name: getattr(launch, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(launch, name, value)
        outputs = case.function(*case.arguments, **case.options)
        us = host_us(recorder.last, device)
        del outputs  # the recorded launch writes there
    finally:
        for name, value in kept.items():
            setattr(launch, name, value)
    return us


def run(case: Case, device: torch.device) -> Row:
    """Measure one call, right after torch.neg: the speed of a shared machine changes."""
    x = case.arguments[0] if isinstance(case.arguments[0], torch.Tensor) else None
    neg_us = host_us(functools.partial(torch.neg, x), device) if x is not None else None
    us = host_us(lambda: case.call(*case.arguments, **case.options), device)
    row = Row(
        call=case.name,
        us=us,
        over_neg=us / neg_us if neg_us else None,
        function_us=None,
        kernel_us=None,
        buffers_us=None,
    )
    function = case.function
    if function is None:
        return row
    outputs = function(*case.arguments, **case.options)
    return dataclasses.replace(
        row,
        function_us=host_us(lambda: function(*case.arguments, **case.options), device),
        kernel_us=kernel_us(case, device),
        buffers_us=buffers_us(outputs, device),
    )


def main() -> None:
    """Measure every call and write the table."""
    arguments = harness.parser(__doc__, name="host_time").parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        idle_kernels()
    with torch.no_grad():
        rows = [run(case, device) for case in cases(device)]
    facts = harness.header(device, with_roof=False)
    if device.type != "cuda":
        facts["kernels"] = "none: launches that do nothing"
    harness.write_results(
        rows,
        title="Host time of a call",
        facts=facts,
        md=arguments.md,
        csv_path=arguments.csv,
        notes=NOTES.format(batches=BATCHES, calls=CALLS),
    )


if __name__ == "__main__":
    main()
