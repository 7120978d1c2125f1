"""Options, layouts and data that the tests of ``kernels/cute`` share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import layout
from fos_compile.kernels.cute.tables import lacks

OPTIONS: dict[str, tuple[Any, ...]] = {
    "format": formats.FORMATS,
    "scale_rule": formats.SCALE_RULES,
    "rounding": formats.ROUNDINGS,
    "block": formats.BLOCKS,
    "rht": (False, True),
    "transpose": (False, True),
}


def combinations() -> Iterator[dict[str, Any]]:
    """Every combination of options of quantize, meaningful or not."""
    for chosen in itertools.product(*OPTIONS.values()):
        yield dict(zip(OPTIONS, chosen, strict=True))


def is_valid(options: dict[str, Any]) -> bool:
    """By the table of docs/contract.md section 1."""
    if options["format"] == "nvfp4":
        return True
    return (
        options["scale_rule"] in ("static_6", "static_4")
        and options["rounding"] != "stochastic_unbiased"
        and options["block"] == "1d"
    )


def valid() -> list[dict[str, Any]]:
    """Every meaningful combination."""
    return [options for options in combinations() if is_valid(options)]


def served(arch: str) -> list[dict[str, Any]]:
    """Those that an architecture has kernels for."""
    return [options for options in valid() if not lacks(tuple(options.values()), arch)]


def padded_storage(x: Tensor, left: int, right: int) -> Tensor:
    """x with NaN beside its rows: a view into something wider."""
    wide = torch.nn.functional.pad(x, (left, right), value=float("nan"))
    return wide[..., left : left + x.shape[-1]]


def misaligned(x: Tensor) -> Tensor:
    """x one element off a multiple of 16 bytes."""
    whole = x.new_empty(x.numel() + 1)
    return whole[1:].view(x.shape).copy_(x)


def every_second(x: Tensor) -> Tensor:
    """x with NaN between its columns."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "rows": ((150, 136), lambda x: x),
    "ragged": ((37, 83), lambda x: x),
    "mT": ((75, 140), lambda x: x.mT.contiguous().mT),
    "slice": ((33, 72), lambda x: padded_storage(x, 8, 16)),
    "narrow slice": ((33, 71), lambda x: padded_storage(x, 1, 2)),
    "mT slice": ((80, 37), lambda x: padded_storage(x.mT, 3, 2).mT),
    "misaligned": ((20, 64), misaligned),
    "every second": ((19, 70), every_second),
    "one for all": ((1, 96), lambda x: x.expand(40, 96)),
    "batch": ((2, 30, 72), lambda x: x),
    "batch of tiles": ((2, 128, 64), lambda x: x),
    "batch mT": ((3, 40, 21), lambda x: x.mT.contiguous().mT),
    "batch slice": ((2, 17, 72), lambda x: padded_storage(x, 8, 8)),
    "batch inside": ((30, 2, 72), lambda x: x.transpose(0, 1)),
    "misaligned batch": ((2, 16, 64), misaligned),
}
"""Shape and view of a matrix, seen as it is quantized if not transposed; covers every read."""


@functools.cache
def plain(name: str) -> Tensor:
    """Numbers of many magnitudes in the shape of a layout."""
    shape, _ = LAYOUTS[name]
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-6, 3, (*shape[:-1], 1), generator=generator))
    x[..., 0, :16] = 0.0
    x[..., -1, -1] = -0.0
    return x


def matrix(
    name: str, dtype: torch.dtype, device: Any = "cpu", special: str = "its own amax"
) -> Tensor:
    """A matrix of one of `LAYOUTS` with the numbers of one of `SPECIAL`."""
    x = SPECIAL[special][0](plain(name).to(dtype))
    return LAYOUTS[name][1](x.to(device))


def read_of(x: Tensor) -> str:
    """How the general kernels read x."""
    for name in ("vector", "by_column"):
        if not getattr(layout, name)(x):
            return name
    return "anything"


SPECIAL: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "its own amax": (lambda x: x, None),
    "a static amax": (lambda x: x, 1.5),
    "NaN in one block": (lambda x: _put(x, 3, 5, float("nan")), 4.0),
    "infinities": (lambda x: _put(_put(x, 0, 20, float("inf")), 2, 1, float("-inf")), 4.0),
    "an infinite amax": (lambda x: x, float("inf")),
    "a NaN for amax": (lambda x: x, float("nan")),
    "NaN everywhere through amax": (lambda x: _put(x, 3, 5, float("nan")), None),
    "amax 0": (lambda x: x, 0.0),
    "zeros": (torch.zeros_like, None),
    "negative zeros": (lambda x: torch.full_like(x, -0.0), 1.0),
    "tiny amax": (lambda x: (x.float() * 2.0**-120).to(x.dtype), 2.0**-115),
    "amax below 2^-116": (lambda x: (x.float() * 2.0**-125).to(x.dtype), 2.0**-117),
    "subnormals": (lambda x: (x.float() * 2.0**-135).to(x.dtype), 2.0**-116),
    "huge": (lambda x: (x.float() * 2.0**120).clamp(-3e38, 3e38).to(x.dtype), 2.0**126),
    "edge of fast division": (lambda x: (x.float() * 2.0**-43).to(x.dtype), 2.0**-40.01),
    "ties": (lambda x: (x.sign() * (x.float() * 8).abs().round() / 8).to(x.dtype), 6.0),
}
"""What becomes of a matrix, and its amax if not its own."""


def _put(x: Tensor, row: int, col: int, value: float) -> Tensor:
    x = x.clone()
    x[..., row % x.shape[-2], col % x.shape[-1]] = value
    return x


def covering(every: list[Any], choices: Callable[[Any], Iterable[Any]], size: int) -> list[Any]:
    """Some of `every` that have all sets of `size` choices that occur in it: greedily."""
    sets = [set(itertools.combinations(choices(each), size)) for each in every]
    missing, found = set().union(*sets), []
    while missing:
        best = max(range(len(every)), key=lambda i: len(sets[i] & missing))
        missing -= sets[best]
        found.append(every[best])
    return found
