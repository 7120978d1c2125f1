"""NVIDIA's own NVFP4 GEMMs for sm_100 (package nvidia-cutlass-operators), and data for them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.emulator import formats
from tests.emulator.host import Host, load

BLOCK = 16
"""Elements a scale."""


@dataclass(frozen=True)
class Configuration:
    """A kernel of the package: tile and cluster in CTAs, `pair` for cta_group::2."""

    m: int
    n: int
    cluster: tuple[int, int]

    @property
    def pair(self) -> bool:
        """Whether two CTAs share a tile."""
        return self.m == 256

    def __str__(self) -> str:
        return f"{self.m}x{self.n}-cluster{self.cluster[0]}x{self.cluster[1]}"


ALL = [
    Configuration(m, n, (x, y))
    for m, sizes in ((128, (64, 128, 192)), (256, (64, 128, 192)))
    for n in sizes
    for x in (2, 4)
    for y in (1, 2, 4)
]
"""Those that the package offers for bf16 output."""


@functools.cache
def host(
    configuration: Configuration, clusters: int = 2, arch: str = "sm_100a", options: str = ""
) -> Host:
    """Host code and PTX of a kernel; its persistent grid has `clusters` clusters at most."""
    from cutlass import AddressSpace, BFloat16, Float4E2M1FN, Float8E4M3FN, Int32, cute
    from cutlass.cute.nvgpu.common import OperandMajorMode
    from cutlass.cute.runtime import make_fake_stream, make_ptr
    from cutlass.operators.providers.cutedsl.gemm.implementations import (
        sm100_dense_blockscaled_static_persistent_impl as implementation,
    )
    from cutlass.tensor_utils import LayoutEnum

    kernel = implementation.PersistentDenseBlockScaledGemmKernel(
        BLOCK, (configuration.m, configuration.n), configuration.cluster
    )
    types = (Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN, BFloat16)
    pointers = [make_ptr(t, 0, AddressSpace.gmem, assumed_align=32) for t in types]
    layouts = (OperandMajorMode.K, OperandMajorMode.K, LayoutEnum.ROW_MAJOR)
    sizes = tuple(Int32(0) for _ in range(4))
    with tempfile.TemporaryDirectory() as folder:
        keep = f"--keep-ptx --generate-line-info --dump-dir {folder}"
        compiled = cute.compile(
            kernel, *pointers, layouts, sizes, clusters, make_fake_stream(),
            options=f"--gpu-arch {arch} {keep} {options}",
        )  # fmt: skip
    return load(compiled)


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Random operands of ``out = (A SFA) (B SFB)^T``, its exact value and its error budget.

    a [L, M, K/2] and b [L, N, K/2] packed e2m1; sfa and sfb e4m3 in the 128x4 blocked layout;
    exact and budget float64 [L, M, N].
    """

    sizes: tuple[int, int, int, int]
    a: Tensor
    b: Tensor
    sfa: Tensor
    sfb: Tensor
    exact: Tensor
    budget: Tensor

    def arguments(self, out: Tensor) -> tuple[Any, ...]:
        """Those of the host function, with `out` bf16 [L, M, N]."""
        return self.a, self.b, self.sfa, self.sfb, out, self.sizes

    def errors(self, out: Tensor) -> Tensor:
        """Errors of a bf16 result in units of the budget: at most 1 in each element."""
        return (out.double() - self.exact).abs() / self.budget


def _blocked(scales: Tensor) -> Tensor:
    """[L, R, C] to the order that tensor cores read, R and C multiples of 128 and 4."""
    batch, rows, cols = scales.shape
    parts = scales.view(batch, rows // 128, 4, 32, cols // 4, 4)
    return parts.permute(0, 1, 4, 3, 2, 5).contiguous()


def _operand(rows: int, k: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed values, blocked scales, and what they stand for."""
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (batch, rows, k // 2), dtype=torch.uint8, generator=draw)
    padded = -(-rows // 128) * 128, -(-k // 64) * 4
    # Scales over six binades, so that a swapped one is seen.
    raw = torch.randint(0x20, 0x50, (batch, *padded), dtype=torch.uint8, generator=draw)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(batch, rows, k)
    values = torch.from_numpy(formats.e2m1_to_f32(codes.numpy())).double()
    scales = torch.from_numpy(formats.e4m3_to_f32(raw.numpy())).double()
    spread = scales[:, :rows, : k // 16].repeat_interleave(16, dim=-1)
    return packed, _blocked(raw), values * spread


def problem(m: int, n: int, k: int, batch: int = 1, seed: int = 0) -> Problem:
    """Random data. K is a multiple of 32, which TMA's 16 bytes ask for.

    The budget of an element: each of the K / 64 accumulations rounds an fp32 sum of at most
    ``sum |a b|`` once (2^-24 of it; hardware may truncate, 2^-23), then one rounding to bf16.
    """
    a, sfa, exact_a = _operand(m, k, batch, 2 * seed)
    b, sfb, exact_b = _operand(n, k, batch, 2 * seed + 1)
    exact = exact_a @ exact_b.transpose(1, 2)
    size = exact_a.abs() @ exact_b.abs().transpose(1, 2)
    budget = -(-k // 64) * 2.0**-23 * size + 2.0**-8 * exact.abs() * (1 + 2.0**-7) + 1e-300
    return Problem((m, n, k, batch), a, b, sfa, sfb, exact, budget)
