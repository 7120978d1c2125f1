"""Host side of ``amax_rotated``: how it is compiled and launched."""

from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int32, Int64

    from fos_compile.kernels.cute.amax_rotated import AmaxRotated

    options = general.options_of(key)
    kernel = AmaxRotated(by_column=options["by_column"], vector=options["vector"])
    return kernel, [general.fake_matrix(key), Int64(0), Int32(1), general.env_stream()]


def launch(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> Tensor:
    """Largest magnitude of x [R, C] or [B, R, C] after the transform: float32 []."""
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    if x.numel():
        x = general.batched(x, general.options_of(key)["vector"])
        batch, rows, cols = x.shape
        kernel(x, amax.data_ptr(), general.rounds(batch, rows, -(-cols // 64), num_sms))
    return amax
