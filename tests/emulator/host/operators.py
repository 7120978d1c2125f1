"""NVIDIA's NVFP4 block-scaled GEMMs, operands for them and what they should give.

Those for sm_100a are in the package nvidia-cutlass-operators. Those for sm_120a are examples in
the repository NVIDIA/cutlass and in no package: the environment variable CUTLASS_REPOSITORY names
a checkout of it.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cutlass
import torch
from cutlass import Int32, cute
from cutlass.cute.nvgpu.common import OperandMajorMode
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from tests.emulator.errors import ArgumentsError

BLOCK = 16
"""Elements a scale."""
_SCALE_ROWS, _SCALE_COLS = 128, 4
"""Rows and blocks of a tile of scales."""
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
_OPERATORS = "cutlass.operators.providers.cutedsl.gemm.implementations"
_SM_100 = f"{_OPERATORS}.sm100_dense_blockscaled_static_persistent_impl"
_EXAMPLES = "examples/python/CuTeDSL/cute/blackwell_geforce/kernel/blockscaled_gemm"


@dataclass(frozen=True)
class Operands:
    """``c [l, m, n] = (a * scale_a) @ (b * scale_b).T`` with a [l, m, k] and b [l, n, k]."""

    m: int
    n: int
    k: int
    l: int  # noqa: E741  # the name that CUTLASS has for the batch
    a: torch.Tensor
    """[l, m, k / 2] uint8: two e2m1 a byte, the first in the low half."""
    b: torch.Tensor
    """[l, n, k / 2] uint8."""
    scale_a: torch.Tensor
    """[l, tiles of 128 rows, tiles of 4 blocks, 512] uint8: e4m3 as the hardware reads them."""
    scale_b: torch.Tensor
    c: torch.Tensor
    """[l, m, n] bfloat16, NaN until written."""
    reference: torch.Tensor
    """[l, m, n] float64, exact: c before its rounding."""


@dataclass(frozen=True)
class Gemm:
    """A compiled GEMM."""

    compiled: Any
    """What ``cute.compile`` returned."""
    by_pointer: bool
    """Whether its host function takes addresses and sizes rather than tensors."""

    def arguments(self, operands: Operands) -> tuple[Any, ...]:
        """Those of the host function, without its stream."""
        o = operands
        if self.by_pointer:
            return o.a, o.b, o.scale_a, o.scale_b, o.c, (o.m, o.n, o.k, o.l)
        return (
            o.a.permute(1, 2, 0),
            o.b.permute(1, 2, 0),
            o.scale_a.view(-1),
            o.scale_b.view(-1),
            o.c.permute(1, 2, 0),
        )


def block_scaled_gemm(
    arch: str = "sm_100a",
    tile: tuple[int, int] = (128, 64),
    cluster: tuple[int, int] = (2, 1),
    max_clusters: int = 4,
    options: str = "--enable-tvm-ffi",
) -> Gemm:
    """NVIDIA's persistent GEMM for sm_100a; `tile` [256, n] takes two CTAs a tile.

    EMULATOR.md's op0 is the default; op24 is tile (256, 128), cluster (2, 1); op25 is (256, 128),
    (2, 2); op30 is (256, 192), (2, 1). No more than `max_clusters` are launched.
    """
    implementation = importlib.import_module(_SM_100).PersistentDenseBlockScaledGemmKernel
    if not implementation.is_valid_mma_tiler_and_cluster_shape(tile, cluster):
        raise ArgumentsError(f"NVIDIA's GEMM has no tile {tile} with cluster {cluster}")
    layouts = (
        OperandMajorMode.K,
        OperandMajorMode.K,
        cutlass.tensor_utils.LayoutEnum.ROW_MAJOR,
    )
    arguments = (
        _pointer(cutlass.Float4E2M1FN, 16),
        _pointer(cutlass.Float4E2M1FN, 16),
        _pointer(cutlass.Float8E4M3FN, 32),
        _pointer(cutlass.Float8E4M3FN, 32),
        _pointer(cutlass.BFloat16, 16),
        layouts,
        (Int32(0), Int32(0), Int32(0), Int32(0)),
        max_clusters,
        make_fake_stream(),
    )
    return Gemm(_compile(implementation(BLOCK, tile, cluster), arguments, arch, options), True)


def geforce_gemm(
    schedule: Literal["cooperative", "pingpong"],
    arch: str = "sm_120a",
    tile: tuple[int, int, int] = (128, 128, 128),
    epilogue_tile: tuple[int, int] = (128, 128),
    max_clusters: int = 4,
    options: str = "--enable-tvm-ffi",
) -> Gemm:
    """NVIDIA's persistent GEMM for sm_120a, of its examples."""
    folder = examples()
    if folder is None:
        raise ArgumentsError("CUTLASS_REPOSITORY must name a checkout of NVIDIA/cutlass")
    sys.path.insert(0, str(folder))  # the examples import each other from there
    try:
        module = importlib.import_module(f"dense_blockscaled_gemm_persistent_{schedule}")
    finally:
        sys.path.remove(str(folder))
    kernel = module.Sm120BlockScaledGemmKernel(cutlass.Float32, BLOCK, tile, epilogue_tile)
    scales = (_vector(cutlass.Float8E4M3FN), _vector(cutlass.Float8E4M3FN))
    arguments = (
        _matrices(cutlass.Float4E2M1FN, 32),
        _matrices(cutlass.Float4E2M1FN, 32),
        *scales,
        _matrices(cutlass.BFloat16, 8),
        max_clusters,
        make_fake_stream(),
    )
    return Gemm(_compile(kernel, arguments, arch, options), False)


def examples() -> Path | None:
    """NVIDIA's examples for sm_120a, if they are here."""
    repository = os.environ.get("CUTLASS_REPOSITORY")
    folder = Path(repository, _EXAMPLES) if repository else None
    return folder if folder and folder.is_dir() else None


def _compile(kernel: Any, arguments: tuple[Any, ...], arch: str, options: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        keep = f"--keep-ptx --generate-line-info --dump-dir {folder}"
        return cute.compile(kernel, *arguments, options=f"--gpu-arch {arch} {keep} {options}")


def _pointer(dtype: Any, align: int) -> Any:
    return cute.runtime.make_ptr(dtype, 0, cutlass.AddressSpace.gmem, assumed_align=align)


def _vector(dtype: Any) -> Any:
    return make_fake_tensor(dtype, (cute.sym_int32(),), (1,), assumed_align=16)


def _matrices(dtype: Any, divisibility: int) -> Any:
    """[rows, cols, batch], cols innermost and batch outermost."""
    shape = (cute.sym_int32(), cute.sym_int32(divisibility=divisibility), cute.sym_int32())
    return make_fake_compact_tensor(dtype, shape, stride_order=(1, 0, 2), assumed_align=16)


def operands(m: int, n: int, k: int, l: int = 1, seed: int = 0) -> Operands:  # noqa: E741
    """Random operands: every e2m1 code, and e4m3 scales from 2^-3 to 3.75 with all mantissas."""
    if k % 32:
        raise ArgumentsError(f"k must be a multiple of 32 (16 bytes of e2m1), got {k}")
    random = torch.Generator().manual_seed(seed)

    def side(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = torch.randint(256, (l, rows, k // 2), generator=random, dtype=torch.uint8)
        codes = torch.randint(32, 72, (l, rows, k // BLOCK), generator=random, dtype=torch.uint8)
        scales = codes.view(torch.float8_e4m3fn).to(torch.float64)
        return values, tiled_scales(codes), unpacked(values) * scales.repeat_interleave(BLOCK, -1)

    a, scale_a, exact_a = side(m)
    b, scale_b, exact_b = side(n)
    c = torch.full((l, m, n), torch.nan, dtype=torch.bfloat16)
    return Operands(m, n, k, l, a, b, scale_a, scale_b, c, exact_a @ exact_b.mT)


def unpacked(values: torch.Tensor) -> torch.Tensor:
    """[..., k / 2] uint8 of two e2m1 -> [..., k] float64."""
    codes = torch.stack([values & 15, values >> 4], -1).flatten(-2).long()
    return torch.where(codes >= 8, -1.0, 1.0).double() * _E2M1[codes & 7]


def tiled_scales(scales: torch.Tensor) -> torch.Tensor:
    """[l, rows, blocks] -> [l, tiles of 128 rows, tiles of 4 blocks, 512], zeros at the edges.

    In a tile, block b of row r is at byte 16 (r % 32) + 4 (r // 32) + b.
    """
    batch, rows, blocks = scales.shape
    padded = scales.new_zeros(batch, _up(rows, _SCALE_ROWS), _up(blocks, _SCALE_COLS))
    padded[:, :rows, :blocks] = scales
    split = padded.view(batch, -1, 4, 32, padded.shape[2] // _SCALE_COLS, _SCALE_COLS)
    return split.permute(0, 1, 4, 3, 2, 5).reshape(batch, split.shape[1], split.shape[4], 512)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
