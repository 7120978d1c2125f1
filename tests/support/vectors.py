"""Loads the oracle and the known answers of tests/vectors, and reads the buffers of the contract.

Everything here is numpy on its own tables: nothing is shared with the package under test.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parents[1] / "vectors"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    # make.py imports oracle by name, and dataclasses look their module up.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load("oracle")
make = _load("make")

E2M1 = np.array(oracle.E2M1 + [-v for v in oracle.E2M1], np.float32)
E4M3 = np.array([*oracle.E4M3, np.nan, *(-v for v in oracle.E4M3), np.nan], np.float32)
E8M0 = np.array([2.0 ** (b - 127) for b in range(255)] + [np.nan], np.float32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One known answer; scales are in the blocked layout of the contract."""

    x: torch.Tensor
    amax: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor
    options: Any
    dequantized: torch.Tensor | None = None
    static_amax: bool = True


def read(file: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, parsed metadata) of one file of tests/vectors."""
    with safe_open(FOLDER / file, "pt") as stored:
        metadata = {key: json.loads(text) for key, text in stored.metadata().items()}
        return {name: stored.get_tensor(name) for name in stored.keys()}, metadata


@functools.cache
def vectors() -> dict[str, Case]:
    """The cases of vectors.safetensors by name."""
    tensors, metadata = read("vectors.safetensors")
    out = {}
    for name, row in metadata["about"]["cases"].items():
        fields = {
            k: tensors[f"{name}/{k}"] for k in ("x", "amax", "values", "scales", "dequantized")
        }
        static = row.pop("static_amax")
        out[name] = Case(**fields, static_amax=static, options=oracle.Options(**row))
    return out


@functools.cache
def goldens() -> dict[str, Case]:
    """The 96 cases of the published reference by name."""
    tensors, metadata = read("goldens.safetensors")
    out = {}
    for name, row in metadata["cases"].items():
        options = oracle.Options(
            format=row["dtype"],
            scale_rule=row["scale_rule"],
            rht=row["rht"],
            transpose=row["transpose"],
            block="2d" if row["block_scale_2d"] else "1d",
        )
        out[name] = Case(
            x=tensors[f"{name}/x"],
            amax=tensors[f"{name}/amax"].reshape(()),
            values=tensors[f"{name}/values"],
            scales=torch.from_numpy(oracle.block_layout(tensors[f"{name}/scales"].numpy())),
            options=options,
        )
    return out


def philox_answers() -> list[tuple[Sequence[int], Sequence[int], list[int]]]:
    """(counter, key, words) rows of vectors.safetensors."""
    return read("vectors.safetensors")[1]["about"]["philox"]


def seed_tensor(options: Any) -> torch.Tensor | None:
    """The operator's seed argument for oracle options: None for nearest."""
    if options.rounding == "nearest":
        return None
    return torch.tensor([options.seed], dtype=torch.int64)


def quantize_options(options: Any) -> dict[str, Any]:
    """Keyword arguments of fos::quantize for oracle options."""
    names = ("format", "scale_rule", "rounding", "block", "rht", "transpose", "stream")
    return {name: getattr(options, name) for name in names}


def run_quantize(
    x: torch.Tensor, amax: torch.Tensor, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """fos::quantize under oracle options."""
    return torch.ops.fos.quantize(x, amax, seed_tensor(options), **quantize_options(options))


def oracle_quantize(
    x: torch.Tensor, amax: torch.Tensor, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """fos::quantize by the scalar oracle: slow, a few thousand elements at most."""
    matrices = x.float().numpy() if x.ndim == 3 else x.float().numpy()[None]
    height = x.shape[-1] if options.transpose else x.shape[-2]
    with np.errstate(all="ignore"):
        parts = [
            oracle.quantize(m, np.float32(amax), options, first_row=i * height)
            for i, m in enumerate(matrices)
        ]
    results = [
        np.stack([v for v, _ in parts]),
        np.stack([oracle.block_layout(s) for _, s in parts]),
    ]
    values, scales = (torch.from_numpy(r if x.ndim == 3 else r[0]) for r in results)
    return values, scales


def unpack(values: torch.Tensor) -> np.ndarray:
    """[.., P/2] packed bytes -> [.., P] codes 0..15."""
    packed = values.numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def row_major(scales: torch.Tensor, rows: int, groups: int) -> np.ndarray:
    """[.., L] blocked scale bytes -> [.., rows, groups]."""
    m, g = np.arange(rows)[:, None], np.arange(groups)[None]
    tile = m // 128 * (groups // 4) + g // 4
    return scales.numpy()[..., tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + g % 4]


def nearest_even(values: np.ndarray, grid: Sequence[float]) -> np.ndarray:
    """Index of the nearest grid point in float64, ties to the even index, saturating.

    Distances to the two neighbours of a float32 value are exact in float64 wherever they tie.
    """
    points = np.array(grid, np.float64)
    # Far above the grid all distances would round to the same number.
    clipped = np.minimum(values.astype(np.float64), points[-1])
    distance = np.abs(clipped[..., None] - points)
    first = distance.argmin(-1)
    following = np.minimum(first + 1, len(points) - 1)
    best = np.take_along_axis(distance, first[..., None], -1)
    tie = (np.take_along_axis(distance, following[..., None], -1) == best)[..., 0]
    return np.where(tie & (first % 2 == 1), following, first)


def dice(rows: int, cols: int, seed: int, stream: int, rounding: str = "stochastic") -> np.ndarray:
    """u of contract section 5 for [rows, cols] (cols padded), all Philox calls at once.

    float64 for stochastic_hardware: in a sum with it floor(a / step + u) is that of exact numbers.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    group = np.arange(rows * cols // 16, dtype=np.uint64)
    c = [group & mask, group >> half, np.full_like(group, stream), np.zeros_like(group)]
    pattern = seed & 0xFFFFFFFFFFFFFFFF
    key = [pattern & 0xFFFFFFFF, pattern >> 32]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        c = [(p1 >> half) ^ c[1] ^ k0, p1 & mask, (p0 >> half) ^ c[3] ^ k1, p0 & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = np.stack(c, -1)
    if rounding == "stochastic_hardware":
        bits = words[..., None, None] >> np.array(oracle.HARDWARE_BITS, np.uint64) & np.uint64(1)
        return (bits @ 2.0 ** np.arange(-1, -17, -1)).reshape(rows, cols)
    shifts = np.arange(0, 32, 8, dtype=np.uint64)
    bytes_ = (words[..., None] >> shifts) & np.uint64(255)
    return (bytes_.reshape(rows, cols).astype(np.float32) + np.float32(0.5)) / np.float32(256)
