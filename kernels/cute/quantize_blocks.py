"""Any matrix to FP4, 1D blocks: a block a thread, every option, the arithmetic of `contract`.

The general kernel: it serves what no faster kernel does. It reads any strides, so a transposed
matrix is read in place.
"""

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels import formats
from fos_compile.kernels.cute import contract, hadamard, ptx, random_bits, tiles


class QuantizeBlocks:
    """Kernel for one set of static options.

    Attributes:
        rules: format, scale rule and rounding.
        rht: whether groups of 16 are rotated first.
        by_column: whether the rows, not the columns, are contiguous in memory.
        vector: whether 16-byte loads along the columns are possible.
    """

    def __init__(self, rules: contract.Rules, *, rht: bool, by_column: bool, vector: bool) -> None:
        self.rules = rules
        self.rht = rht
        self.by_column = by_column
        self.vector = vector
        self.width = formats.WIDTH[rules.format]

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [B, R, C] bfloat16, float16 or float32
        amax: Int64,  # address of float32 []
        seed: Int64,  # address of int64 [1]; anything for nearest
        values: Int64,  # address of uint8 [B, R, P/2]
        scales: Int64,  # address of uint8 [B, L]
        dice: Uint32,  # stream
        rounds: Int32,
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        chunks = cute.ceil_div(x.shape[2], 4 * self.width)
        self.kernel(x, amax, seed, values, scales, dice, rounds).launch(
            grid=tiles.grid_of(x.shape[1], chunks, rounds, x.shape[0]),
            block=(tiles.THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        amax: Int64,
        seed: Int64,
        values: Int64,
        scales: Int64,
        dice: Uint32,
        rounds: Int32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        bx, by, batch = arch.block_idx()  # of row tiles, of chunks
        task = (bx & 3) * tiles.WARPS + (tid >> 5)
        place = tiles.place(task, tid & 31, self.by_column)
        row = (bx >> 2) * 128 + place.row
        chunks = cute.ceil_div(x.shape[2], 4 * self.width)
        tensor = contract.tensor_of(ptx.load_f32(amax), self.rules.qs)
        outside = contract.outside_midrange(tensor)
        keys: list[Any] = []
        if cutlass.const_expr(self.rules.rounding != "nearest"):
            keys = random_bits.keys_of(ptx.load_v2(seed))
        inside = Uint32(1) if row < x.shape[1] else Uint32(0)
        first = by * rounds
        for chunk in cutlass.range(first, cutlass.min(first + rounds, chunks)):
            col = (chunk * 4 + place.block) * self.width
            given = tiles.load_values(x, batch, row, col, self.width, self.vector)
            if cutlass.const_expr(self.rht):
                rounded = tiles.rounding_to(x.element_type)
                given = [
                    each
                    for start in range(0, self.width, 16)
                    for each in hadamard.rotate(given[start : start + 16], rounded)
                ]
            offsets = None
            line = Int64(batch) * x.shape[1] + row
            if cutlass.const_expr(self.rules.rounding != "nearest"):
                group = line * (chunks * (self.width // 4)) + col // 16
                offsets = self.offsets(keys, group, dice)
            words: list[Any] = []
            scale = Uint32(0)
            if cutlass.const_expr(self.rules.format == "mxfp4"):
                words, scale = contract.quantize(given, tensor, self.rules, offsets)
            else:
                words, scale = contract.quantize_either(given, tensor, self.rules, offsets, outside)
            at = values + line * (chunks * (2 * self.width)) + col // 2
            for i in cutlass.range_constexpr(self.width // 16):
                ptx.store_v2(at + 8 * i, words[2 * i], words[2 * i + 1], inside)
            tile = (Int64(batch) * cute.ceil_div(x.shape[1], 128) + (bx >> 2)) * chunks + chunk
            ptx.store_u8(scales + tile * 512 + place.scale, scale * inside, 1)

    def offsets(self, keys: Any, group: Any, dice: Any) -> list[Any]:
        """Dice of all elements of a block whose first group of 16 is `group`."""
        found = []
        for i in range(self.width // 16):
            words = random_bits.philox(keys, tiles.words_of(group + i), dice)
            is_hardware = self.rules.rounding == contract.HARDWARE
            found += words if is_hardware else random_bits.offsets(words)
        return found
