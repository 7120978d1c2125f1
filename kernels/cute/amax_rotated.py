"""Largest magnitude of a matrix after the random Hadamard transform: one read, no write but one."""

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import hadamard, ptx, tiles


class AmaxRotated:
    """Kernel for one set of static options; see `quantize_blocks.QuantizeBlocks`."""

    def __init__(self, *, by_column: bool, vector: bool) -> None:
        self.by_column = by_column
        self.vector = vector

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [B, R, C] bfloat16, float16 or float32
        amax: Int64,  # address of a zero float32 []
        rounds: Int32,
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        chunks = cute.ceil_div(x.shape[2], 64)
        self.kernel(x, amax, rounds).launch(
            grid=tiles.grid_of(x.shape[1], chunks, rounds, x.shape[0]),
            block=(tiles.THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, amax: Int64, rounds: Int32) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        bx, by, batch = arch.block_idx()  # of row tiles, of chunks
        task = (bx & 3) * tiles.WARPS + (tid >> 5)
        place = tiles.place(task, tid & 31, self.by_column)
        row = (bx >> 2) * 128 + place.row
        # Patterns of magnitudes order like the numbers, NaN above infinity.
        most = Uint32(0)
        first = by * rounds
        for chunk in cutlass.range(
            first, cutlass.min(first + rounds, cute.ceil_div(x.shape[2], 64))
        ):
            col = (chunk * 4 + place.block) * 16
            given = tiles.load_values(x, batch, row, col, 16, self.vector)
            for value in hadamard.rotate(given, tiles.rounding_to(x.element_type)):
                most = ptx.max_u32(most, ptx.bits(ptx.absolute(value)))
        most = ptx.warp_max_u32(most)
        if (tid & 31) == 0:
            ptx.atomic_max_u32(amax, most)
