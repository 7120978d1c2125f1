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


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C]: their largest magnitude after the
    transform, float32 [].
    """
    new_amax = general.allocator((), torch.float32, x.device)
    if not x.numel():
        return lambda x: new_amax().zero_()
    read = general.reader(x, general.options_of(key)["vector"])
    *batch, rows, cols = x.shape
    turns = general.rounds(batch[0] if batch else 1, rows, -(-cols // 64), num_sms)

    def launch(x: Tensor) -> Tensor:
        amax = new_amax().zero_()
        kernel(read(x), amax.data_ptr(), turns)
        return amax

    return launch
