"""Compiled quantizers next to the eager reference, byte by byte; part of `exactness.py`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from fos_compile.backend import fouroversix

Options = dict[str, Any]
SEED = 1234
RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
ROUNDINGS = ("nearest", "stochastic", "stochastic_realized", "stochastic_unbiased")
LOWERINGS = (("outline", True), ("inline", True), ("inline", False))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BitsRow:
    """One combination of options: bytes that differ from the eager reference, of how many."""

    graph: str
    lowering: str
    exact: bool
    format: str
    scale_rule: str
    rounding: str
    block: str
    rht: bool
    transpose: bool
    amax_differs: bool
    values_differ: int
    of_values: int
    scales_differ: int
    of_scales: int

    @property
    def identical(self) -> bool:
        """Whether amax and every byte agree."""
        return not (self.amax_differs or self.values_differ or self.scales_differ)


def combinations(rules: Iterable[str], roundings: Iterable[str]) -> Iterator[Options]:
    """Yield the options of every NVFP4 quantizer with these rules and roundings."""
    both = (False, True)
    for rule, rounding, block, rht, transpose in itertools.product(
        rules, roundings, ("1d", "2d"), both, both
    ):
        yield {
            "format": "nvfp4",
            "scale_rule": rule,
            "rounding": rounding,
            "block": block,
            "rht": rht,
            "transpose": transpose,
        }


def cases(*, quick: bool = False) -> list[dict[str, Any]]:
    """Return what to compare: every combination alone, the recipes' rule behind producers."""
    alone = list(combinations(RULES, ROUNDINGS))
    # mxfp4 knows static rules and 1d blocks only.
    alone += [
        {**each, "format": "mxfp4"}
        for each in combinations(("static_6", "static_4"), ROUNDINGS)
        if each["block"] == "1d"
    ]
    behind = list(combinations(("mse",), ("nearest", "stochastic")))
    if quick:
        alone = [each for each in alone if each["rht"] == each["transpose"]][::7]
        behind = [
            each
            for each in behind
            if each["rht"] == each["transpose"]
            and (each["block"] == "1d" or each["rounding"] == "nearest")
        ]
    found = [_case("none", lowering, options) for options in alone for lowering in LOWERINGS]
    # Outlined, the quantizer itself cannot fuse, but the amax in front of it does.
    found += [
        _case(producer, lowering, options)
        for producer in PRODUCERS
        if producer != "none"
        for options in behind
        for lowering in (*LOWERINGS, ("outline", False))
    ]
    return found


def _case(producer: str, lowering: tuple[str, bool], options: Options) -> dict[str, Any]:
    return {"graph": producer, "lowering": lowering[0], "exact": lowering[1], "options": options}


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    narrow = x[:, : x.shape[1] // 2]
    return functional.rms_norm(narrow, narrow.shape[-1:], eps=1e-6)


PRODUCERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "SwiGLU": _swiglu,
    "RMSNorm": _rms_norm,
    "cast": lambda x: x.float().mul(0.5).sin().to(torch.bfloat16),
}


def quantized(
    producer: Callable[[torch.Tensor], torch.Tensor], options: Options
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return a function of (x, seed) that gives the producer's output, amax, values and scales."""

    def run(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _quantize(producer(x), seed, options)

    return run


def _quantize(h: torch.Tensor, seed: torch.Tensor, options: Options) -> tuple[torch.Tensor, ...]:
    if options["format"] == "mxfp4":
        amax = torch.ones((), dtype=torch.float32, device=h.device)
    else:
        amax = torch.ops.fos.amax(h, options["rht"], options["transpose"])
    dice = seed if options["rounding"] != "nearest" else None
    values, scales = torch.ops.fos.quantize(h, amax, dice, stream=3, **options)
    return h, amax, values, scales


def compare_all(
    given: Sequence[dict[str, Any]], *, device: torch.device, size: int
) -> list[BitsRow]:
    """Compare every case on Gaussian bf16 input whose rows differ in magnitude."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2 * size, generator=generator)
    x = (x * torch.logspace(-2, 1, size)[:, None]).bfloat16().to(device)
    return [_compare(case, x) for case in given]


def _compare(case: dict[str, Any], x: torch.Tensor) -> BitsRow:
    seed = torch.tensor([SEED], dtype=torch.int64, device=x.device)
    options = case["options"]
    torch.compiler.reset()
    compiled = torch.compile(
        quantized(PRODUCERS[case["graph"]], options),
        backend=fouroversix,
        fullgraph=True,
        dynamic=False,
        options={"lowering": case["lowering"], "exact": case["exact"], "strict": True},
    )
    h, amax, values, scales = compiled(x, seed)
    _, amax_eager, values_eager, scales_eager = _quantize(h, seed, options)
    return BitsRow(
        graph=case["graph"],
        lowering=case["lowering"],
        exact=case["exact"],
        **options,
        amax_differs=not torch.equal(amax, amax_eager),
        values_differ=int((values != values_eager).sum()),
        of_values=values.numel(),
        scales_differ=int((scales != scales_eager).sum()),
        of_scales=scales.numel(),
    )
