"""What a tile of the sm_100a matmul takes of shared and of tensor memory, in plain numbers.

One place for the arithmetic that the kernel, its host side, tests and benchmarks share. Nothing
here needs the compiler.
"""

from dataclasses import dataclass
from typing import Any

from fos_compile.kernels import formats

TILE_K = 256
"""Columns of a stage: 128 bytes of E2M1, the span of TMA's widest swizzle."""
MMA_K = 64
"""Columns of one MMA instruction."""
BAND = 128
"""Rows that share a chunk of scales."""
CHUNK_BYTES = 512
"""Scales of a band and four blocks: a contiguous piece of the blocked layout (docs/contract.md)."""
EPILOGUE_WARPS = 4
BOX = 32
"""Rows and columns that an epilogue warp writes at a time."""
BUFFERS = 2
"""Boxes that an epilogue warp has in shared memory."""
SHARED_BYTES = 227 * 1024
"""Of a CTA on sm_100 and sm_103."""
TENSOR_COLUMNS = 512
_BARRIERS = 256
_ALIGNMENT = 1024

TILES = (
    *((128, n) for n in (64, 128, 192, 256)),
    *((256, n) for n in (64, 128, 192, 256)),
)
"""Rows and columns; 256 rows are two CTAs and one MMA."""
CLUSTERS = tuple((m, n) for m in (1, 2, 4) for n in (1, 2, 4))


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of the output, who computes it, and of which numbers."""

    rows: int
    cols: int
    cluster: tuple[int, int]
    """CTAs along M and N that load each operand once for all of them."""
    format: str
    item: int
    """Bytes of a number of the output."""

    def __post_init__(self) -> None:
        if (self.rows, self.cols) not in TILES or self.cluster not in CLUSTERS:
            raise ValueError(f"no such tile or cluster: {self}")
        if self.cluster[0] % self.ctas:
            raise ValueError(f"a tile of two CTAs needs a cluster of an even number: {self}")

    @property
    def ctas(self) -> int:
        """CTAs that share a tile; each has 128 of its rows."""
        return self.rows // BAND

    @property
    def chunks(self) -> int:
        """Of scales, in a stage, for each band."""
        return TILE_K // (4 * formats.WIDTH[self.format])

    @property
    def bands(self) -> int:
        """Of B's scales that a tile touches: one of 192 columns begins or ends inside of one."""
        return -(-self.cols // BAND)

    @property
    def load_bytes(self) -> int:
        """What arrives in one CTA's shared memory for a stage."""
        values = (BAND + self.cols // self.ctas) * TILE_K // 2
        return values + (1 + self.bands) * self.chunks * CHUNK_BYTES

    @property
    def epilogue_bytes(self) -> int:
        """Boxes of the output, and a row of bias a warp."""
        return EPILOGUE_WARPS * (BUFFERS * BOX * BOX * self.item + self.cols * 4)

    @property
    def stages(self) -> int:
        """As many as fit: bytes in flight are what hides the latency of memory."""
        left = SHARED_BYTES - _ALIGNMENT - _BARRIERS - self.epilogue_bytes
        return left // self.load_bytes

    @property
    def scale_columns(self) -> int:
        """Of tensor memory, for the scales of a stage: 4 a chunk."""
        return 4 * self.chunks * (1 + self.bands)

    @property
    def accumulators(self) -> int:
        """Pairs of barriers for accumulators.

        There are always two accumulators. Two of 256 columns and the scales do not fit, so there
        the second begins before the first ends, and one waits for the overlap of the other.
        """
        return 2 if 2 * self.cols + self.scale_columns <= TENSOR_COLUMNS else 1

    @property
    def accumulator_step(self) -> int:
        """Columns from one accumulator to the other."""
        if self.accumulators == 2:
            return self.cols
        return TENSOR_COLUMNS - self.scale_columns - self.cols

    @property
    def scales_at(self) -> int:
        """The column behind both accumulators."""
        return self.accumulator_step + self.cols

    @property
    def tensor_columns(self) -> int:
        """What is allocated: a power of two."""
        return 1 << (self.scales_at + self.scale_columns - 1).bit_length()

    @property
    def free_after(self) -> int:
        """Boxes of an accumulator after which the next tile may begin."""
        boxes = self.cols // BOX
        return boxes if self.accumulators == 2 else -(-(self.cols - self.accumulator_step) // BOX)


GROUP = 8
"""Rows of clusters that are finished before the next ones: what runs at a time is then about
square, and reads about as few rows of A as of B through the L2 cache."""


def place(index: Any, rows: Any, cols: Any, minimum: Any = min) -> tuple[Any, Any, Any]:
    """(row, column, batch) of a tile, in the order in which they are computed.

    Args:
        index: which, from 0.
        rows: tiles of a matrix along M.
        cols: tiles of a matrix along N.
        minimum: of two numbers.
    """
    batch, index = index // (rows * cols), index % (rows * cols)
    first = index // (GROUP * cols) * GROUP
    height = minimum(rows - first, GROUP)
    index = index % (GROUP * cols)
    return first + index % height, index // height, batch
