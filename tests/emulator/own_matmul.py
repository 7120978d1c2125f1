"""The project's own FP4 matmul for sm_100a in the emulator, and data for it.

What runs is what a user's call runs: the host side prepares and allocates, the compiled host code
makes tensor maps and launches, and the emulator executes the PTX.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import build, host_general, host_matmul_sm100
from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.dequantize import unscaled
from tests.emulator.emulate import Run, emulate, load
from tests.emulator.machine.program import Settings

EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a unit in the last place, relative."""
SCALES = {"nvfp4": (0x20, 0x50), "mxfp4": (0x78, 0x84)}
"""Bytes that scales are drawn from: six binades or more, so that a swapped one is seen."""


@functools.lru_cache(maxsize=64)
def host(key: KernelKey, arch: str) -> Any:
    """Host code and PTX of a kernel as users get them; the assembler has no part in it."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--keep-ptx --ptxas-options -O0 --dump-dir {folder}"
        return load(build.compiled(key, arch, options))


@dataclass(frozen=True)
class Problem:
    """Arguments of fos::scaled_mm, what they stand for, and how far off a result may be.

    sums (before alpha and bias), exact and budget are float64 [B, M, N].
    """

    arguments: tuple[Any, ...]
    sums: Tensor
    exact: Tensor
    budget: Tensor

    def errors(self, out: Tensor) -> Tensor:
        """In units of the budget: at most 1 in each element."""
        return (out.double() - self.exact).abs() / self.budget


def _operand(
    rows: int, k: int, batch: int, format: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and scales of [batch, rows, k] as the quantizer leaves them, and exact numbers."""
    draw = torch.Generator().manual_seed(seed)
    columns = formats.padded_cols(k, format)
    values = torch.randint(0, 256, (batch, rows, columns // 2), dtype=torch.uint8, generator=draw)
    codes = torch.stack([values & 15, values >> 4], dim=-1).view(batch, rows, columns)
    codes[..., k:] = 0
    values = codes[..., ::2] | codes[..., 1::2] << 4
    low, high = SCALES[format]
    blocks = columns // formats.WIDTH[format]
    bands = -(-rows // 128)
    raw = torch.randint(low, high, (batch, bands * 128, blocks), dtype=torch.uint8, generator=draw)
    raw[:, rows:] = 0
    raw[..., -(-k // formats.WIDTH[format]) :] = 0
    parts = raw.view(batch, bands, 4, 32, blocks // 4, 4)
    scales = parts.permute(0, 1, 4, 3, 2, 5).reshape(batch, -1)
    return values, scales, unscaled(values, scales, format).double()


def problem(
    m: int,
    n: int,
    k: int,
    batch: int = 1,
    *,
    format: str = "nvfp4",
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = None,
    seed: int = 0,
) -> Problem:
    """Random data.

    The budget of an element: alpha is three float32 operations and scaling is a fourth; each of the
    P / 64 accumulations rounds a float32 sum of at most ``sum |a b|`` once (2^-24 of it; hardware
    may truncate, 2^-23); the bias is one more addition; then one rounding to the output.
    """
    a, scales_a, exact_a = _operand(m, k, batch, format, 2 * seed)
    b, scales_b, exact_b = _operand(n, k, batch, format, 2 * seed + 1)
    draw = torch.Generator().manual_seed(seed)
    amax_a, amax_b = torch.tensor(37.1), torch.tensor(1230.5)
    qs_a, qs_b = (1536.0, 2688.0) if format == "nvfp4" else (1.0, 1.0)
    if format == "mxfp4":
        amax_a, amax_b = torch.ones(()), torch.ones(())
    alpha = (amax_a.double() / qs_a) * (amax_b.double() / qs_b)
    sums = exact_a @ exact_b.mT
    product = alpha * sums
    size = alpha * (exact_a.abs() @ exact_b.abs().mT)
    exact = product
    added = None
    if bias is not None:
        added = (torch.randn(n, generator=draw) * product.std()).to(bias)
        exact = product + added.double()
    roundings = 2.0**-23 * (a.shape[-1] // 32 + 4)
    budget = roundings * size + 2.0**-24 * exact.abs() * (bias is not None)
    budget = budget + EPSILON[dtype] * (exact.abs() + budget) + 1e-300
    arguments = (a, scales_a, amax_a, qs_a, b, scales_b, amax_b, qs_b, added)
    return Problem(arguments, sums, exact, budget)


def run(
    key: KernelKey,
    case: Problem,
    *,
    settings: Settings | None = None,
    arch: str = "sm_100a",
    num_sms: int = 2,
) -> tuple[Tensor, Run]:
    """The product, in the emulator."""
    allocated, runs = [], []
    # All but a, which is an argument itself.
    memory = [each for each in case.arguments[1:] if isinstance(each, Tensor)]
    readable = host_matmul_sm100._readable

    def copied(x: Tensor) -> Tensor:
        found = readable(x)
        if found is not x:
            memory.append(found)
        return found

    def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        def new() -> Tensor:
            allocated.append(torch.empty(shape, dtype=dtype))
            return allocated[-1]

        return new

    def kernel(*arguments: Any) -> None:
        runs.append(
            emulate(
                host(key, arch), *arguments, outputs=allocated, memory=memory,
                settings=settings,
            )
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_general, "allocator", allocator)
        patch.setattr(host_matmul_sm100, "_readable", copied)
        launch = host_matmul_sm100.prepare(
            kernel, num_sms, key, case.arguments[0], case.arguments[4]
        )
        out = launch(*case.arguments)
    return out, runs[0]
