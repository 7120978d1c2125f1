"""The published Triton quantizer of Four Over Six, loaded from its unpacked sources.

Its package imports a model library and, where a GPU is, an extension that has to be built; the
Triton path needs neither. So the package is entered below its `__init__`: the modules that are
imported are the published ones, unchanged. None of it is part of this project: unpack the sdist of
PyPI's `fouroversix` and name the folder.

On a GPU before Blackwell its kernels round to E2M1 with comparisons instead of the `cvt` of
Blackwell, which is a branch of the published source. Nothing here changes what they compute.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "fouroversix"
KERNELS = "kernels/triton/ops.py"


class PeerError(SystemExit):
    """The peer cannot be used; the message says what to do, and ends a program as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """What of the published package is called."""

    version: str
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    utils: Any
    hadamard: Callable[..., Tensor]

    def call(
        self,
        x: Tensor,
        amax: Tensor | None,
        *,
        scale_rule: str = "mse",
        rounding: str = "nearest",
        block: str = "1d",
        rht: bool = False,
        transpose: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scales and amax, by the options of `fos::quantize`.

        Args:
            x: [R, C].
            amax: the largest magnitude; None lets the peer find it, as its users do. Under RHT the
                peer always does, after a transform that it writes to memory.
            scale_rule: as here.
            rounding: nearest or stochastic.
            block: 1d or 2d.
            rht: with the published signs.
            transpose: quantize x.mT.
        """
        return self.quantize(
            x,
            amax,
            self.hadamard(device=x.device) if rht else None,
            scale_rule=self.utils.ScaleRule(scale_rule),
            round_style=self.utils.RoundStyle(rounding),
            block_scale_2d=block == "2d",
            transpose=transpose,
        )

    def pair(
        self,
        x: Tensor,
        amax: Tensor | None,
        *,
        rounding_row: str = "nearest",
        rounding_col: str = "nearest",
        rht_row: bool = False,
        rht_col: bool = False,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Both orientations, by the options of `fos::quantize_pair`: two calls, it has no other."""
        row = self.call(x, amax, rounding=rounding_row, rht=rht_row, **options)
        col = self.call(x, amax, rounding=rounding_col, rht=rht_col, transpose=True, **options)
        return (*row, *col)


def load(path: Path) -> Peer:
    """Import the Triton path of an unpacked source distribution.

    Raises:
        PeerError: there is none in `path`, or Triton is missing.
    """
    root = next(
        (r for r in (path / "src" / PACKAGE, path / PACKAGE, path) if (r / KERNELS).is_file()), None
    )
    if root is None:
        raise PeerError(
            f"no {KERNELS} of {PACKAGE} under {path}: unpack the sdist of PyPI's {PACKAGE} there"
        )
    if importlib.util.find_spec("triton") is None:
        raise PeerError("the peer's kernels need triton, which is not installed")
    loaded = sys.modules.get(PACKAGE)
    if loaded is not None and list(loaded.__path__) != [str(root)]:
        raise PeerError(f"{PACKAGE} is already imported from {list(loaded.__path__)}")
    if loaded is None:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(root)]
        sys.modules[PACKAGE] = package
    return Peer(
        version=version(path),
        quantize=importlib.import_module(f"{PACKAGE}.kernels.triton.ops").quantize_to_fp4,
        utils=importlib.import_module(f"{PACKAGE}.utils"),
        hadamard=importlib.import_module(f"{PACKAGE}.quantize.utils").get_rht_matrix,
    )


def version(path: Path) -> str:
    """What the metadata of the source distribution says."""
    metadata = path / "PKG-INFO"
    found = (
        re.search(r"^Version: (\S+)$", metadata.read_text(), re.M) if metadata.exists() else None
    )
    return found[1] if found else "unknown"


def how(device: torch.device) -> str:
    """Which branch of the published kernels a device takes."""
    major = torch.cuda.get_device_capability(device)[0]
    blackwell = major in (10, 11, 12)
    return "E2M1 conversions of Blackwell" if blackwell else "its software rounding to E2M1"


def difference(scales: Tensor, theirs: Tensor) -> float:
    """Share of scale bytes that differ; both store them in 128x4 tiles, padded alike."""
    ours, other = scales.view(torch.uint8).flatten(), theirs.view(torch.uint8).flatten()
    assert ours.numel() == other.numel(), (ours.numel(), other.numel())
    return float((ours != other).float().mean())
