"""Second rung: conversions between float32 and narrower formats, as the hardware does them."""

from typing import Any

import cuda.bindings.driver as cuda
from cutlass import Float32, Uint8, Uint16, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import ptx
from tests.emulator.kernels import compiled, vector

THREADS = 64


def _e2m1x2(low: Any, high: Any) -> Any:
    code = (
        "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, {$r1}, {$r0}; mov.b32 {$w0}, {t, 0, 0, 0}; }"
    )
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[low, high])


def _from_e2m1x2(byte: Any) -> Any:
    code = (
        "{ .reg .b16 h; .reg .b8 t, rest; cvt.u16.u32 h, {$r0}; mov.b16 {t, rest}, h; "
        "cvt.rn.f16x2.e2m1x2 {$w0}, t; }"
    )
    halves = arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[byte])
    return ptx.widen(halves)


def _from_e4m3x2(pair: Any) -> Any:
    return ptx.widen(ptx.from_e4m3x2(pair))


def _from_bf16x2(pair: Any) -> Any:
    code = (
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.bf16 {$w0}, l; cvt.f32.bf16 {$w1}, h; }"
    )
    return arch.inline_ptx(code, write_only_types=[Float32, Float32], read_only_args=[pair])


ENCODERS = {
    "e2m1": (_e2m1x2, 2, Uint8),
    "e2m1x8": (ptx.e2m1x8, 8, Uint32),
    "e4m3": (ptx.e4m3x2, 2, Uint16),
    "e5m2": (ptx.e5m2x4, 4, Uint32),
    "bf16": (ptx.bfloat16x2, 2, Uint32),
    "f16": (ptx.half2, 2, Uint32),
}
"""Name to what rounds, how many numbers make a word, lowest first, and that word."""
DECODERS = {
    "e2m1": (_from_e2m1x2, Uint8),
    "e4m3": (_from_e4m3x2, Uint16),
    "bf16": (_from_bf16x2, Uint32),
    "f16": (ptx.widen, Uint32),
}
"""Name to what widens a word of two numbers, and that word."""


class _Encode:
    """A lane makes a word of `width` float32."""

    def __init__(self, encode: Any, width: int) -> None:
        self.encode, self.width = encode, width

    @cute.jit
    def __call__(self, x: cute.Tensor, words: cute.Tensor, stream: cuda.CUstream) -> None:
        grid = (cute.ceil_div(words.shape[0], THREADS), 1, 1)
        self.kernel(x, words).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, words: cute.Tensor) -> None:
        i = arch.block_idx()[0] * THREADS + arch.thread_idx()[0]
        if i < words.shape[0]:
            numbers = [x[i * self.width + j] for j in range(self.width)]
            words[i] = self.encode(*numbers).to(words.element_type)


class _Decode:
    """A lane makes two float32 of a word."""

    def __init__(self, decode: Any) -> None:
        self.decode = decode

    @cute.jit
    def __call__(self, words: cute.Tensor, x: cute.Tensor, stream: cuda.CUstream) -> None:
        grid = (cute.ceil_div(words.shape[0], THREADS), 1, 1)
        self.kernel(words, x).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, words: cute.Tensor, x: cute.Tensor) -> None:
        i = arch.block_idx()[0] * THREADS + arch.thread_idx()[0]
        if i < words.shape[0]:
            x[2 * i], x[2 * i + 1] = self.decode(words[i].to(Uint32))


@cute.kernel
def _cast_kernel(x: cute.Tensor, y: cute.Tensor) -> None:
    i = arch.block_idx()[0] * THREADS + arch.thread_idx()[0]
    if i < x.shape[0]:
        y[i] = x[i].to(y.element_type)


@cute.jit
def _cast(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream) -> None:
    grid = (cute.ceil_div(x.shape[0], THREADS), 1, 1)
    _cast_kernel(x, y).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)


def compile_encode(arch: str, name: str) -> Any:
    """(x [n], words [n / width]), float32 and unsigned: a format of ENCODERS.

    E2M1 takes sm_100a or sm_120a.
    """
    encode, width, word = ENCODERS[name]
    return compiled(arch, _Encode(encode, width), vector(Float32), vector(word))


def compile_decode(arch: str, name: str) -> Any:
    """(words [n / 2], x [n]), unsigned and float32: a format of DECODERS.

    E2M1 takes sm_100a or sm_120a.
    """
    decode, word = DECODERS[name]
    return compiled(arch, _Decode(decode), vector(word), vector(Float32))


def compile_cast(arch: str, source: Any, target: Any) -> Any:
    """(x [n], y [n]) of any two types of `cutlass` that have one in torch: what the DSL emits."""
    return compiled(arch, _cast, vector(source), vector(target))
