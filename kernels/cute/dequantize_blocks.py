"""FP4 buffers back to numbers: a block a thread, every option of fos::dequantize."""

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels import formats
from fos_compile.kernels.cute import ptx, tiles


class DequantizeBlocks:
    """Kernel for one set of static options.

    Attributes:
        format: nvfp4 or mxfp4.
        scaled: whether to apply the tensor scale, amax / qs.
        dtype: of the output: BFloat16, Float16 or Float32.
    """

    def __init__(self, format: str, *, scaled: bool, dtype: Any) -> None:
        self.format = format
        self.scaled = scaled
        self.dtype = dtype
        self.width = formats.WIDTH[format]
        # Chunks loaded before the first is stored: 9 bytes a thread are too few to hide a load.
        self.ahead = 64 // self.width

    @cute.jit
    def __call__(
        self,
        values: cute.Tensor,  # [B, R, P/2] uint8
        scales: Int64,  # address of uint8 [B, L]
        amax: Int64,  # address of float32 []; anything if not `scaled`
        qs: Float32,
        out: Int64,  # address of dtype [B, R, cols]
        cols: Int32,
        rounds: Int32,
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        chunks = values.shape[2] // (2 * self.width)
        self.kernel(values, scales, amax, qs, out, cols, rounds).launch(
            grid=tiles.grid_of(values.shape[1], chunks, rounds, values.shape[0]),
            block=(tiles.THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        values: cute.Tensor,
        scales: Int64,
        amax: Int64,
        qs: Float32,
        out: Int64,
        cols: Int32,
        rounds: Int32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        bx, by, batch = arch.block_idx()  # of row tiles, of chunks
        task = (bx & 3) * tiles.WARPS + (tid >> 5)
        place = tiles.place(task, tid & 31, False)
        row = (bx >> 2) * 128 + place.row
        chunks = values.shape[2] // (2 * self.width)
        inside = Uint32(1) if row < values.shape[1] else Uint32(0)
        factor, divisor = Float32(1.0), qs
        if cutlass.const_expr(self.scaled):
            factor = ptx.load_f32(amax)
            # Shifting both keeps (code * scale) * amax below infinity and changes no bit.
            shift = ptx.real(ptx.where_less(1.0, factor, (127 - 12) << 23, 127 << 23))
            factor, divisor = ptx.mul(factor, shift), ptx.mul(qs, shift)
        line = Int64(batch) * values.shape[1] + row
        tile = (Int64(batch) * cute.ceil_div(values.shape[1], 128) + (bx >> 2)) * chunks
        marks = scales + tile * 512 + place.scale
        source = values.iterator.toint() + line * values.shape[2]
        first = by * rounds
        last = cutlass.min(first + rounds, chunks)
        for start in cutlass.range(first, last, self.ahead):
            loaded = []
            for i in cutlass.range_constexpr(self.ahead):
                wanted = inside if start + i < last else Uint32(0)
                col = ((start + i) * 4 + place.block) * self.width
                words = [
                    word
                    for half in range(0, self.width // 2, 8)
                    for word in ptx.load_v2(source + col // 2 + half, wanted)
                ]
                loaded.append((wanted, col, words, ptx.load_u8(marks + (start + i) * 512, wanted)))
            for wanted, col, words, byte in loaded:
                scale = self.decode_scale(byte)
                for half in cutlass.range_constexpr(self.width // 16):
                    pair = words[2 * half : 2 * half + 2]
                    numbers = [ptx.mul(each, scale) for word in pair for each in decode(word)]
                    if cutlass.const_expr(self.scaled):
                        numbers = [ptx.div(ptx.mul(each, factor), divisor) for each in numbers]
                    self.store(out, line, col + 16 * half, cols, wanted, numbers)

    def decode_scale(self, byte: Any) -> Any:
        """The number that a scale byte stands for."""
        if self.format == "nvfp4":
            return ptx.widen(ptx.from_e4m3x2(byte))[0]
        # Byte 0 is the subnormal 2^-127, 0xff is NaN.
        pattern = ptx.where_nonzero(byte, byte << 23, 1 << 22)
        return ptx.real(ptx.where_below(byte, 0xFF, pattern, 0x7FC00000))

    @cute.jit
    def store(
        self,
        out: Int64,
        line: Int64,
        col: Int32,
        cols: Int32,
        inside: Uint32,
        numbers: cutlass.Constexpr,
    ) -> None:
        """16 numbers of a row from column `col`, those before column `cols`."""
        size = tiles.ELEMENT_BYTES[self.dtype]
        address = out + (line * cols + col) * size
        step = 16 // size
        if cols % step == 0:  # whole vectors, aligned as the output is
            words = tiles.packed(numbers, self.dtype)
            if cutlass.const_expr(size == 2):
                self.store_pair(address, col, cols, inside, words)
            else:
                for i in cutlass.range_constexpr(4):
                    wanted = inside if col + i * step < cols else Uint32(0)
                    ptx.store_v4(address + 16 * i, words[4 * i : 4 * i + 4], wanted)
        else:
            for i in cutlass.range_constexpr(16):
                wanted = inside if col + i < cols else Uint32(0)
                if cutlass.const_expr(size == 4):
                    ptx.store_b32(address + i * size, ptx.bits(numbers[i]), wanted)
                else:
                    word = tiles.packed([numbers[i], numbers[i]], self.dtype)[0]
                    ptx.store_b16(address + i * size, word, wanted)

    @cute.jit
    def store_pair(
        self, address: Int64, col: Int32, cols: Int32, inside: Uint32, words: cutlass.Constexpr
    ) -> None:
        """The 32 bytes of this thread and its neighbour, two halves at a time.

        A store of 16 bytes by every thread would fill half of each 32-byte sector, and the other
        half later: so the pair fills the sector of one, then that of the other.
        """
        odd = ptx.lane() & 1
        low, high = words[:4], words[4:]
        got = [
            ptx.shuffle_xor(ptx.where_nonzero(odd, a, b), 1) for a, b in zip(low, high, strict=True)
        ]
        apart = self.width * 2
        first = [ptx.where_nonzero(odd, theirs, a) for theirs, a in zip(got, low, strict=True)]
        second = [ptx.where_nonzero(odd, b, theirs) for theirs, b in zip(got, high, strict=True)]
        lane = Int32(odd)
        even = address - lane * apart + 16 * lane
        at = col - lane * self.width + 8 * lane
        ptx.store_v4(even, first, inside if at < cols else Uint32(0))
        ptx.store_v4(even + apart, second, inside if at + self.width < cols else Uint32(0))


def decode(word: Any) -> list[Any]:
    """Eight nibbles to float32."""
    numbers: list[Any] = []
    for i in range(4):
        pair = (word >> (8 * i)) & 0xFF
        pair = (pair | (pair << 12)) & 0x000F000F
        # Exponent and mantissa where float16 has its lowest: off by 2^14, subnormals included.
        small = ((pair & 0x00070007) << 9) | ((pair & 0x00080008) << 12)
        numbers += ptx.widen(ptx.hmul2(small, ptx.u32(0x74007400)))
    return numbers
