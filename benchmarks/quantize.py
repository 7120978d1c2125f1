"""How far from the memory roof are the quantizers, and what does 4/6 cost over plain NVFP4?

Device time in a CUDA graph, L2 cold, bf16 in unless a case says otherwise, amax given. Bytes are
those of the operator's own cost function: one read of every input, one write of every output.
Beside some cases: the same operator as Inductor compiles the reference, and with `--peer` the
published Triton kernels. The most important cases come first, and the result is written after
every case: a time limit takes only what comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import harness
import peer as published
from fos_compile import kernels
from fos_compile.kernels import target
from fos_compile.kernels.outlined import outlined

fos = torch.ops.fos
DEVICE = torch.device("cuda")
NOTES = """\
`of_copy` is the rate of the operator's own bytes over that of the fastest large copy; `bound` is
what is asked of an H200, whose memory is 1.4 times as fast as an H100's with the same arithmetic.
`over_static` is the time over that of static_6 in the same run and shape. `inductor_us` is the
reference compiled by torch.compile. Decode shapes are compared with an empty kernel instead:
`over_empty_us`. `undecided` is the share of blocks that went through the exact path after all.
`peer_us` are the published Triton kernels with amax given (under RHT they find it themselves, after
a transform that goes through memory; both orientations are two calls), `peer_amax_us` with the amax
that they compute by default, `peer_differs` the share of scale bytes that are not ours, for nearest
rounding in 1D: their sums have another order."""


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
    peer_us: float | None = None
    peer_amax_us: float | None = None
    peer_differs: float | None = None


Make = Callable[[tuple[int, int], torch.dtype], Sequence[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An operator with its options on a shape.

    Attributes:
        op: of the registry.
        make: shape and dtype -> arguments, without options.
        options: keyword arguments.
        dtype: of the matrix.
        bound: least share of copy bandwidth on an H200.
        inductor: whether to compile the reference too, which takes up to 10 seconds.
        peer: whether the published kernels do the same.
        count: whether to count undecided blocks, which compiles another kernel.
    """

    name: str
    op: kernels.Op
    shape: tuple[int, int]
    make: Make
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    bound: float | None = None
    inductor: bool = False
    peer: bool = False
    count: bool = False


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Gaussian."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def one(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Sequence[Any]:
    """Arguments of quantize: matrix, amax, seed."""
    x = matrix(shape, dtype)
    return x, x.abs().amax().float(), torch.tensor([7], device=DEVICE)


def pair(shape: tuple[int, int], dtype: torch.dtype) -> Sequence[Any]:
    """Arguments of quantize_pair: matrix, amax of the rows, of the rotated columns, seed."""
    x, amax, seed = one(shape, dtype)
    return x, amax, fos.amax(x, True, True), seed


def pair_of_tiles(shape: tuple[int, int], dtype: torch.dtype) -> Sequence[Any]:
    """The same without the transform, so one amax for both, as the weights of a model have it."""
    x, amax, seed = one(shape, dtype)
    return x, amax, amax, seed


def packed(shape: tuple[int, int], dtype: torch.dtype) -> Sequence[Any]:
    """Arguments of dequantize without amax."""
    x, amax, _ = one(shape, dtype)
    return (*fos.quantize(x, amax), None, *shape)


def rotated(shape: tuple[int, int], dtype: torch.dtype) -> Sequence[Any]:
    """Arguments of amax under the Hadamard transform."""
    return matrix(shape, dtype), True


def cases() -> list[Case]:
    """What is required, then what the recipes use, then what completes the picture."""
    large, deep, wide, weight = (16384, 16384), (8192, 5120), (8192, 14336), (14336, 4096)
    single = functools.partial(Case, op=kernels.QUANTIZE, make=one)
    both = functools.partial(Case, op=kernels.QUANTIZE_PAIR, make=pair, peer=True)
    static, tiles, stochastic = {"scale_rule": "static_6"}, {"block": "2d"}, "stochastic"
    wgrad = {"rounding_col": stochastic, "rht_col": True}
    gradient = {"rounding_row": stochastic, **wgrad}
    found = [
        single(name="static_6", shape=deep, options=static, inductor=True, peer=True),
        single(name="mse", shape=deep, bound=0.60, count=True, inductor=True, peer=True),
        both(
            name="mse, row nearest + column RHT stochastic",
            shape=deep,
            options=wgrad,
            bound=0.50,
            inductor=True,
        ),
        both(
            name="mse, 2D, both orientations",
            shape=weight,
            make=pair_of_tiles,
            options=tiles,
            bound=0.60,
            inductor=True,
        ),
        single(name="static_6", shape=large, options=static, bound=0.88, peer=True),
        single(name="mse", shape=large, bound=0.70, count=True, peer=True),
        single(name="static_6", shape=wide, options=static),
        single(name="mse", shape=wide, bound=0.60, count=True, peer=True),
        both(name="mse, row stochastic + column RHT stochastic", shape=deep, options=gradient),
        single(name="mse, stochastic", shape=deep, options={"rounding": stochastic}, peer=True),
        single(name="mse, transposed", shape=deep, options={"transpose": True}, peer=True),
        both(name="mse, row nearest + column nearest", shape=deep),
        single(name="mse, 2D", shape=weight, options=tiles, peer=True),
        Case(name="amax with RHT", op=kernels.AMAX, shape=large, make=rotated, bound=0.75),
        Case(
            name="dequantize to bf16",
            op=kernels.DEQUANTIZE,
            shape=large,
            make=packed,
            options={"dtype": torch.bfloat16},
            bound=0.80,
        ),
        *(single(name="mse", shape=(m, 4096), count=True) for m in (1, 8, 64)),
        single(name="mse, float16", shape=deep, dtype=torch.float16),
        single(name="mse, float32", shape=deep, dtype=torch.float32),
        single(name="mse, transposed RHT", shape=deep, options={"transpose": True, "rht": True}),
        single(
            name="mse, transposed RHT stochastic",
            shape=deep,
            options={"transpose": True, "rht": True, "rounding": stochastic},
        ),
    ]
    return found


def run(
    case: Case,
    *,
    roof: harness.Roof,
    static: float | None,
    empty_us: float,
    peer: published.Peer | None = None,
    inductor: bool = True,
) -> Row:
    """Measure one case, and beside it what Inductor makes of the reference and the peer."""
    arguments = harness.rotation(lambda _: case.make(case.shape, case.dtype), device=DEVICE)
    support = case.op.supports(*arguments[0], **case.options)
    assert support, support.reason

    def kernel(*args: Any) -> object:
        return case.op.overload(*args, **case.options)

    def compiled(*args: Any) -> object:
        return outlined(case.op)(*args, **case.options)

    timing = harness.measure(kernel, arguments, device=DEVICE)
    bytes_ = case.op.cost(*arguments[0], **case.options).bytes
    small = case.shape[0] < 128
    row = Row(
        case=case.name,
        shape="x".join(map(str, case.shape)),
        us=timing.us,
        spread=timing.spread,
        gb_s=timing.rate(bytes_) / 1e9,
        of_copy=roof.fraction(timing, bytes_=bytes_),
        bound=case.bound,
        over_static=static and timing.us / static,
        over_empty_us=timing.us - empty_us if small else None,
        inductor_us=(
            harness.measure(compiled, arguments, device=DEVICE).us
            if inductor and case.inductor
            else None
        ),
        undecided=undecided(case) if case.count else None,
    )
    return beside(row, case, arguments, peer) if peer and case.peer else row


def beside(row: Row, case: Case, arguments: Sequence[Sequence[Any]], peer: published.Peer) -> Row:
    """The row with the published kernels' times; a peer that fails leaves them out, and says so."""
    call = peer.pair if case.op is kernels.QUANTIZE_PAIR else peer.call

    def given(x: torch.Tensor, amax: torch.Tensor, *_: Any) -> Any:
        return call(x, amax, **case.options)

    def alone(x: torch.Tensor, *_: Any) -> Any:
        return call(x, None, **case.options)

    timed = functools.partial(harness.measure, arguments=arguments, device=DEVICE, seconds=0.2)
    try:
        differs = None
        if case.op is kernels.QUANTIZE and not {"rounding", "block"} & case.options.keys():
            ours = case.op.overload(*arguments[0], **case.options)
            differs = published.difference(ours[1], given(*arguments[0])[1])
        return dataclasses.replace(
            row, peer_us=timed(given).us, peer_amax_us=timed(alone).us, peer_differs=differs
        )
    except Exception as error:
        print(f"the peer fails on {case.name}: {type(error).__name__}: {error}", flush=True)
        return row


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
    from fos_compile.kernels.cute import build, tables

    chosen = {**tables.DEFAULTS["quantize"], **case.options}
    entry = tables.TABLES["quantize"][0]
    if entry.name != "quantize_filtered":
        return None
    key = entry.key(case.dtype, tuple(chosen.values()))
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x, amax, _ = one(case.shape, case.dtype)
    kernel = build.counting(key, target.arch(x.device), count.data_ptr())
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    entry.launch(kernel, num_sms, key, x, amax, None, 0)
    return count.item() * 16 / x.numel()


def main() -> None:
    """Measure, and write the result after every case."""
    parser = harness.parser(__doc__, name="quantize")
    parser.add_argument("--peer", type=Path, help="unpacked sdist of PyPI's fouroversix")
    parser.add_argument("--no-inductor", action="store_true", help="do not compile references")
    parser.add_argument("--limit", type=float, default=170, help="no new case after this, seconds")
    options = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    peer = published.load(options.peer) if options.peer else None
    facts = harness.header(DEVICE)
    if peer:
        facts["peer"] = f"fouroversix {peer.version}, Triton, {published.how(DEVICE)}"
    # An argument list needs a length, and a kernel that waits for 0 cycles does nothing.
    empty = harness.measure(torch.cuda._sleep, [(0,)] * 16, device=DEVICE)
    facts |= {"empty kernel": f"{empty.us:.2f} us", **host()}
    measure_all(
        cases(),
        functools.partial(
            run,
            roof=harness.roof(DEVICE),
            empty_us=empty.us,
            peer=peer,
            inductor=not options.no_inductor,
        ),
        lambda: time.perf_counter() - start < options.limit,
        functools.partial(
            harness.write_results,
            title="Quantizers on the device",
            md=options.md,
            csv_path=options.csv,
            notes=NOTES,
        ),
        facts,
    )


def measure_all(
    pending: Sequence[Case],
    measure: Callable[..., Row],
    in_time: Callable[[], bool],
    write: Callable[..., None],
    facts: dict[str, str],
) -> None:
    """Measure case by case while there is time, writing after each; one may fail.

    Args:
        pending: the cases, most important first.
        measure: (case, time of static_6 in this shape or None) to its row.
        in_time: whether to begin another case.
        write: takes rows, and the keywords `facts` and `show`.
        facts: header; what failed or was not measured is added.
    """
    rows: list[Row] = []
    static: dict[tuple[int, int], float] = {}
    for number, case in enumerate(pending):
        if rows and not in_time():
            facts["not measured"] = "; ".join(f"{c.name} {c.shape}" for c in pending[number:])
            break
        try:
            row = measure(case, static=static.get(case.shape) if case.name == "mse" else None)
        except Exception as error:
            traceback.print_exc()
            failed = f"{case.name} {case.shape} ({type(error).__name__})"
            facts["failed"] = "; ".join(filter(None, [facts.get("failed"), failed]))
            continue
        if case.name == "static_6":
            static[case.shape] = row.us
        rows.append(row)
        print(row, flush=True)
        write(rows, facts=facts, show=False)
    write(rows, facts=facts, show=True)


if __name__ == "__main__":
    main()
