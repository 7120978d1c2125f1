"""Any matrix to NVFP4 in 2D blocks: 16 threads a tile of 16x16, the arithmetic of `contract`.

A thread has a column of the tile, because the contract adds the errors of a tile column by column.
Codes therefore come out in columns and are transposed between the 16 threads; before the stochastic
rounding of the hardware, which takes numbers of a row, the numbers are.
"""

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import contract, hadamard, ptx, random_bits, tiles


class QuantizeTiles:
    """Kernel for one set of static options; see `quantize_blocks.QuantizeBlocks`."""

    def __init__(self, rules: contract.Rules, *, rht: bool) -> None:
        self.rules = rules
        self.rht = rht

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
        self.kernel(x, amax, seed, values, scales, dice, rounds).launch(
            grid=tiles.grid_of(x.shape[1], cute.ceil_div(x.shape[2], 64), rounds, x.shape[0]),
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
        lane = tid & 31
        task = (bx & 3) * tiles.WARPS + (tid >> 5)
        # A warp has two tiles side by side: columns lie across its lanes, rows in its threads.
        top, block = (task >> 1) * 16, (task & 1) * 2 + (lane >> 4)
        row = top + (lane & 15)  # whose codes and scale this thread writes
        place = (row & 31) * 16 + (row >> 5) * 4 + block
        top, row = top + (bx >> 2) * 128, row + (bx >> 2) * 128
        chunks = cute.ceil_div(x.shape[2], 64)
        tensor = contract.tensor_of(ptx.load_f32(amax), self.rules.qs)
        outside = contract.outside_midrange(tensor)
        keys: list[Any] = []
        if cutlass.const_expr(self.rules.rounding != "nearest"):
            keys = random_bits.keys_of(ptx.load_v2(seed))
        inside = Uint32(1) if row < x.shape[1] else Uint32(0)
        first = by * rounds
        for chunk in cutlass.range(first, cutlass.min(first + rounds, chunks)):
            col = (chunk * 4 + block) * 16
            given = tiles.load_column(x, batch, top, col + (lane & 15))
            if cutlass.const_expr(self.rht):
                given = hadamard.rotate_across(given, tiles.rounding_to(x.element_type))
            offsets = None
            line = Int64(batch) * x.shape[1] + row
            if cutlass.const_expr(self.rules.rounding != "nearest"):
                group = line * (chunks * 4) + col // 16
                offsets = random_bits.philox(keys, tiles.words_of(group), dice)
                if cutlass.const_expr(self.rules.rounding != contract.HARDWARE):
                    offsets = random_bits.offsets(contract.transpose_bits(offsets, 8))
            words: list[Any] = []
            scale = Uint32(0)
            if cutlass.const_expr(self.rules.format == "mxfp4"):
                words, scale = contract.quantize(given, tensor, self.rules, offsets)
            else:
                words, scale = contract.quantize_either(given, tensor, self.rules, offsets, outside)
            if cutlass.const_expr(self.rules.rounding != contract.HARDWARE):
                words = contract.transpose_bits(words, 4)
            ptx.store_v2(values + line * (chunks * 32) + col // 2, words[0], words[1], inside)
            tile = (Int64(batch) * cute.ceil_div(x.shape[1], 128) + (bx >> 2)) * chunks + chunk
            ptx.store_u8(scales + tile * 512 + place, scale * inside, 1)
