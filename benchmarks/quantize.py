"""How far from the memory roof are the quantizers, and what does 4/6 cost over plain NVFP4?

Device time in a CUDA graph, L2 cold, bf16 in, amax given unless the case says otherwise. Bytes are
those of the operator's own cost function: one read of every input, one write of every output.
Beside each case: the same operator as Inductor compiles the reference.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import harness
from fos_compile import kernels
from fos_compile.kernels import target
from fos_compile.kernels.outlined import outlined

fos = torch.ops.fos
NOTES = """\
`of_copy` is the rate of the operator's own bytes over that of the fastest large copy; `bound` is
what is asked of an H200, whose memory is 1.4 times as fast as an H100's with the same arithmetic.
`over_static` is the time over that of static_6 in the same run and shape. `inductor_us` is the
reference compiled by torch.compile. Decode shapes are compared with an empty kernel instead:
`over_empty_us`. `undecided` is the share of blocks that went through the exact path after all."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case."""

    case: str
    shape: str
    us: float
    spread: float
    gb_s: float
    of_copy: float
    bound: float | None
    over_static: float | None
    over_empty_us: float | None
    inductor_us: float | None
    undecided: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An operator with its options on a shape.

    Attributes:
        op: of the registry.
        make: shape -> arguments, without options.
        options: keyword arguments.
        bound: least share of copy bandwidth on an H200.
    """

    name: str
    op: kernels.Op
    shape: tuple[int, int]
    make: Callable[[tuple[int, int]], Sequence[Any]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bound: float | None = None


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    """Gaussian bf16."""
    return torch.randn(shape, device="cuda").bfloat16()


def one(shape: tuple[int, int]) -> Sequence[Any]:
    """Arguments of quantize: matrix, amax, seed."""
    x = matrix(shape)
    return x, x.abs().amax().float(), torch.tensor([7], device="cuda")


def pair(shape: tuple[int, int]) -> Sequence[Any]:
    """Arguments of quantize_pair: matrix, amax of the rows, of the rotated columns, seed."""
    x, amax, seed = one(shape)
    return x, amax, fos.amax(x, True, True), seed


def packed(shape: tuple[int, int]) -> Sequence[Any]:
    """Arguments of dequantize without amax."""
    x, amax, _ = one(shape)
    return (*fos.quantize(x, amax), None, *shape)


def cases() -> list[Case]:
    """What is required, and what the recipes use."""
    large, deep, wide, weight = (16384, 16384), (8192, 5120), (8192, 14336), (14336, 4096)
    quantize, both = kernels.QUANTIZE, kernels.QUANTIZE_PAIR
    static = {"scale_rule": "static_6"}
    found = [
        Case(name="static_6", op=quantize, shape=large, make=one, options=static, bound=0.88),
        Case(name="mse", op=quantize, shape=large, make=one, bound=0.70),
        Case(name="static_6", op=quantize, shape=deep, make=one, options=static),
        Case(name="mse", op=quantize, shape=deep, make=one, bound=0.60),
        Case(name="static_6", op=quantize, shape=wide, make=one, options=static),
        Case(name="mse", op=quantize, shape=wide, make=one, bound=0.60),
        Case(
            name="mse, 2D, both orientations",
            op=both,
            shape=weight,
            make=pair,
            options={"block": "2d"},
            bound=0.60,
        ),
        Case(
            name="mse, row nearest + column RHT stochastic",
            op=both,
            shape=deep,
            make=pair,
            options={"rounding_col": "stochastic", "rht_col": True},
            bound=0.50,
        ),
        Case(
            name="mse, stochastic",
            op=quantize,
            shape=deep,
            make=one,
            options={"rounding": "stochastic"},
        ),
        Case(
            name="amax with RHT",
            op=kernels.AMAX,
            shape=large,
            make=lambda shape: (matrix(shape), True),
            bound=0.75,
        ),
        Case(
            name="dequantize to bf16",
            op=kernels.DEQUANTIZE,
            shape=large,
            make=packed,
            options={"dtype": torch.bfloat16},
            bound=0.80,
        ),
    ]
    found += [Case(name="mse", op=quantize, shape=(m, 4096), make=one) for m in (1, 8, 64)]
    return found


def run(case: Case, roof: harness.Roof, static: float | None, empty_us: float) -> Row:
    """Measure one case and what Inductor makes of the reference."""
    device = torch.device("cuda")
    arguments = harness.rotation(lambda _: case.make(case.shape), device=device)
    support = case.op.supports(*arguments[0], **case.options)
    assert support, support.reason

    def kernel(*args: Any) -> object:
        return case.op.overload(*args, **case.options)

    def compiled(*args: Any) -> object:
        return outlined(case.op)(*args, **case.options)

    timing = harness.measure(kernel, arguments, device=device)
    bytes_ = case.op.cost(*arguments[0], **case.options).bytes
    small = case.shape[0] < 128
    compiled(*arguments[0])
    inductor = None if small else harness.measure(compiled, arguments, device=device).us
    return Row(
        case=case.name,
        shape="x".join(map(str, case.shape)),
        us=timing.us,
        spread=timing.spread,
        gb_s=timing.rate(bytes_) / 1e9,
        of_copy=roof.fraction(timing, bytes_=bytes_),
        bound=case.bound,
        over_static=static and timing.us / static,
        over_empty_us=timing.us - empty_us if small else None,
        inductor_us=inductor,
        undecided=undecided(case),
    )


def host() -> dict[str, str]:
    """Host time of a warm call, back to back, beside the smallest operator of torch."""
    x, amax, _ = one((64, 4096))
    calls: dict[str, Callable[[], object]] = {
        "torch.neg": lambda: torch.neg(x),
        "fos::quantize": lambda: fos.quantize(x, amax),
    }
    times = {}
    for name, call in calls.items():
        samples = []
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            samples.append((time.perf_counter() - start) / 20 * 1e6)
        times[name] = f"{statistics.median(samples):.1f} us"
    return {"host time of a call": ", ".join(f"{name} {took}" for name, took in times.items())}


def undecided(case: Case) -> float | None:
    """Share of blocks that the filter could not decide, from a kernel that counts them."""
    if case.op is not kernels.QUANTIZE or case.options.get("rounding", "nearest") != "nearest":
        return None
    from fos_compile.kernels.cute import build, host_quantize_filtered, tables

    chosen = {**tables.DEFAULTS["quantize"], **case.options}
    key = tables.TABLES["quantize"][0].key(torch.bfloat16, tuple(chosen.values()))
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    x, amax, _ = one(case.shape)
    kernel = build.counting(key, target.arch(x.device), count.data_ptr())
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    host_quantize_filtered.launch(kernel, num_sms, key, x, amax, None, 0)
    return count.item() * 16 / x.numel()


def main() -> None:
    """Print the table and write it."""
    options = harness.parser(__doc__, name="quantize").parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    roof = harness.roof(device)
    # An argument list needs a length, and a kernel that waits for 0 cycles does nothing.
    empty = harness.measure(torch.cuda._sleep, [(0,)] * 16, device=device)
    rows: list[Row] = []
    static: dict[str, float] = {}
    for case in cases():
        shape = "x".join(map(str, case.shape))
        known = static.get(shape) if case.name == "mse" else None
        rows.append(run(case, roof, known, empty.us))
        if case.name == "static_6":
            static[shape] = rows[-1].us
        print(rows[-1], flush=True)
    harness.write_results(
        rows,
        title="Quantizers on the device",
        facts={**harness.header(options.device), "empty kernel": f"{empty.us:.2f} us", **host()},
        md=options.md,
        csv_path=options.csv,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
