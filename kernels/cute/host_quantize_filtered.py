"""Host side of ``quantize_filtered``: how it is compiled and launched."""

import functools
from typing import Any

from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey

HALF_EXPONENTS = 0x7C007C00
"""Exponent bits of two float16: an argument, because `filtered` needs them in a register."""
MAX_ROUNDS = 32
"""The kernel keeps a bit a round."""
_START, _NEAR, _BEST_ROUNDS = 0.5, 0.03, 16


def ctas_per_sm(vector: bool) -> int:
    """How many CTAs registers are limited for; reading element by element takes more of them."""
    return 7 if vector else 6


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int32, Int64, Uint32

    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_filtered import QuantizeFiltered

    options = general.options_of(key)
    kernel = QuantizeFiltered(
        Rules(*(options[name] for name in Rules._fields)),
        rht=options["rht"],
        by_column=options["by_column"],
        vector=options["vector"],
    )
    addresses = [Int64(0) for _ in ("amax", "values", "scales", "undecided")]
    numbers = [Int32(1), Uint32(HALF_EXPONENTS)]
    return kernel, [general.fake_matrix(key), *addresses, *numbers, general.env_stream()]


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C] bfloat16, seen as it is quantized."""
    new_values, new_scales = general.buffers(x.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values, new_scales)
    vector = general.options_of(key)["vector"]
    read = general.reader(x, vector)
    *batch, rows, cols = x.shape
    bands = (batch[0] if batch else 1) * -(-rows // 128)
    chunks = formats.padded_cols(cols, "nvfp4") // 64
    turns = rounds(bands, chunks, ctas_per_sm(vector) * num_sms)

    def launch(x: Tensor, amax: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        addresses = amax.data_ptr(), values.data_ptr(), scales.data_ptr(), 0
        kernel(read(x), *addresses, turns, HALF_EXPONENTS)
        return values, scales

    return launch


@functools.lru_cache(maxsize=1024)
def rounds(bands: int, chunks: int, resident: int) -> int:
    """How many chunks of 64 columns each of the 4 warps of a CTA should take.

    A band of 128 rows has 16 CTAs for every 4 * rounds chunks; `resident` of them run at a time.
    In units of a round the matrix then takes waves * (rounds + 1/2): a last wave that does not fill
    the device counts whole, and so does a last CTA of a row with fewer chunks than the others.
    What is left of the exact path at the end of a CTA wants others beside it that are not at their
    end, which the formula does not see and which speaks against a few very long CTAs: among all
    within 3% of the best, the one nearest to 16 is taken. A matrix that makes no whole wave gets
    the shortest CTAs that still fit in one.

    Measured on an H100 (132 SMs of 8 CTAs), best of 4, 8, 16, 32: 16 at 16384x16384, 32 at
    8192x5120 (20 after rounding: one wave of 1024 CTAs), 8 at 8192x14336 (where 16 and 32 leave
    ragged CTAs).
    """
    total = -(-chunks // 4)
    time: dict[int, float] = {}
    for most in range(1, MAX_ROUNDS + 1):
        ctas = -(-total // most)
        if ctas > general.MAX_GRID_YZ:
            continue
        turns = -(-total // ctas)
        waves = -(-ctas * 16 * bands // resident)
        time[turns] = waves * (turns + _START)
    enough = min(time.values()) * (1 + _NEAR)
    return min(
        (turns for turns, needed in time.items() if needed <= enough),
        key=lambda turns: max(turns / _BEST_ROUNDS, _BEST_ROUNDS / turns),
    )
