"""Which tile multiplies: a cost model in plain numbers, and the choice that it makes.

No compiler and no GPU are needed, so that a choice can be explained, tested and repeated anywhere.
``seconds`` of a choice is::

    launch + latency + max(SMs, L2, DRAM) + last epilogue (+ reduction of a split K)

- **SMs**: rounds of tiles times the longest of tensor core, shared memory, what an SM takes from
  L2, and the epilogue of the tile before, which hides behind a mainloop.
- **L2**: what all CTAs read, a multicast once for a cluster.
- **DRAM**: operands and output once; B again for every group of rows (`matmul_layout.GROUP`) where
  it does not stay in L2. By Little's law, no faster than the bytes in flight over the latency.

Where the numbers are from (see also docs/matmul.md):

- Dense FP4, SMs, DRAM: NVIDIA's data sheets of DGX B200 (9 PFLOP/s, 8 TB/s a GPU) and GB300 (15
  PFLOP/s, 8 TB/s; 160 SMs by "Inside NVIDIA Blackwell Ultra"), the RTX Blackwell white paper (RTX
  5090: 170 SMs, 2.407 GHz, 1676 TFLOP/s with FP4, 1.792 TB/s, 96 MB of L2) and the DGX Spark data
  sheet (500 TFLOP/s dense FP4, 273 GB/s). Clocks of the others are what these rates imply.
- Shared memory: 128 bytes a cycle and SM (CUDA C++ Best Practices Guide). From L2: 64 bytes a cycle
  and SM, and together 5120 bytes a cycle a die (A100 white paper): assumed to hold since.
- Assumed: the L2 of sm_100a, sm_103a (126 MB) and sm_121a (24 MB, 1536 bytes a cycle).
- Latency of DRAM: about 900 cycles were measured on consumer Blackwell by others; 1 us under load
  is assumed. Launch: 3 us is assumed, the same for every choice.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from fos_compile.kernels import formats
from fos_compile.kernels.cute import matmul_layout
from fos_compile.kernels.cute.matmul_layout import BAND, CLUSTERS, GROUP, TILE_K, TILES, Tiling

SWAP_AND_SPLIT = False
"""Whether the sm_100 kernel takes swapped operands and a split K."""
SPLITS = (1, 2, 4, 8)
SM120_TILES = ((128, 128),)
"""What is predicted for: there is no kernel for sm_120a yet."""
SMALL_M = 64
"""Rows up to which operands are swapped."""
DEFAULT_SIZES = {"m": 4096, "n": 4096, "k": 4096, "batch": 1}
"""What a size that is not an int, a symbol of a graph, is taken for: it must not be guarded on."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a product is computed.

    With `swap` the tile's rows are rows of b and its columns rows of a; `split` CTAs share K.
    """

    tile: tuple[int, int]
    cluster: tuple[int, int]
    swap: bool = False
    split: int = 1

    def __str__(self) -> str:
        text = "{}x{} cluster {}x{}".format(*self.tile, *self.cluster)
        return text + " swap" * self.swap + f" split {self.split}" * (self.split > 1)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a GPU, as published; see the module."""

    num_sms: int
    hertz: float
    macs: int
    """Products of dense FP4 that an SM adds up in a cycle."""
    dram: float
    """Bytes a second."""
    l2: float
    """Bytes a cycle, of all SMs."""
    l2_bytes: int

    @property
    def flops(self) -> float:
        """Peak of all SMs, a second."""
        return 2 * self.macs * self.num_sms * self.hertz


_MB = 1 << 20
RATES = {
    "sm_100a": Rates(148, 1.85e9, 16384, 8e12, 2 * 5120, 126 * _MB),
    "sm_103a": Rates(160, 1.92e9, 24576, 8e12, 2 * 5120, 126 * _MB),
    "sm_120a": Rates(170, 2.407e9, 2048, 1.792e12, 5120, 96 * _MB),
    "sm_121a": Rates(48, 2.5e9, 2048, 0.273e12, 1536, 24 * _MB),
}
SHARED_RATE = 128
INGEST_RATE = 64
LATENCY = 1e-6
LAUNCH = 3e-6
EPILOGUE_INSTRUCTIONS = 2.0
"""Of a thread a number of the output: 1.6 to 2.7 in benchmarks/results/matmul_static.md."""
CLUSTER_SYNC = 1e-6
"""Of a split K: CTAs wait for each other before their sums are added, assumed."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a CTA does for TILE_K columns, whichever kernel it runs."""

    ctas: int
    load: float
    """Bytes that arrive."""
    shared: float
    """Bytes that the tensor core reads from shared memory."""
    depth: int
    """Stages at a time."""
    l2_a: float
    l2_b: float
    """Bytes of the operands, before multicast."""


def candidates(format: str, dtype: torch.dtype, arch: str) -> tuple[Choice, ...]:
    """Every choice that a kernel for `arch` takes, or would: `SM120_TILES`. Small clusters first.

    Raises:
        ValueError: no kernel of ours is made for `arch`.
    """
    rates(arch)
    if not is_sm100(arch):
        return tuple(Choice(tile, (1, 1)) for tile in SM120_TILES)
    plain = [
        Choice(tile, cluster)
        for cluster in sorted(CLUSTERS, key=math.prod)
        for tile in TILES
        if cluster[0] % (tile[0] // BAND) == 0
    ]
    if not SWAP_AND_SPLIT:
        return tuple(plain)
    small = [
        Choice(each.tile, each.cluster, swap, split)
        for each in plain
        for swap in (False, True)
        for split in SPLITS
        if (swap or split > 1) and math.prod(each.cluster) == each.tile[0] // BAND
    ]
    return (*plain, *small)


def rates(arch: str) -> Rates:
    """Of the GPU of an architecture that the module names."""
    if arch not in RATES:
        raise ValueError(f"arch must be one of {', '.join(RATES)}, got {arch!r}")
    return RATES[arch]


def is_sm100(arch: str) -> bool:
    """Whether the kernel with tensor memory runs there."""
    return arch in ("sm_100a", "sm_103a")


def bytes_in_flight(choice: Choice, *, format: str, dtype: torch.dtype, arch: str) -> int:
    """Predicted for an SM: stages that are loaded ahead, times bytes of a stage."""
    stage = _stage(choice, format, dtype, arch)
    return int(stage.depth * stage.load)


def _stage(choice: Choice, format: str, dtype: torch.dtype, arch: str) -> _Stage:
    rows, cols = choice.tile
    scale_bytes = TILE_K // formats.WIDTH[format]
    if not is_sm100(arch):
        # mma.sync reads A for each warp along N and B for each along M: two of each.
        load = (rows + cols) * (TILE_K // 2 + scale_bytes)
        depth = max(1, 90 * 1024 // load)
        return _Stage(1, load, 2 * load, depth, load * rows / (rows + cols), load / 2)
    found = Tiling(rows, cols, choice.cluster, format, dtype.itemsize)
    scales = found.chunks * matmul_layout.CHUNK_BYTES
    own_a = BAND * TILE_K / 2 + scales
    own_b = cols / found.ctas * TILE_K / 2 + found.bands * scales
    return _Stage(found.ctas, found.load_bytes, own_a + own_b, found.stages, own_a, own_b)


def seconds(
    choice: Choice,
    m: int,
    n: int,
    k: int,
    batch: int,
    *,
    format: str,
    dtype: torch.dtype,
    arch: str,
    num_sms: int,
    instructions: float | None = None,
) -> float:
    """Predicted time of `batch` products [m, k] by [n, k].T.

    Args:
        choice: one of `candidates`.
        m: rows of a.
        n: rows of b.
        k: columns of both.
        batch: how many products.
        format: nvfp4 or mxfp4.
        dtype: of the output.
        arch: as sm_100a.
        num_sms: of the GPU; its other rates are those of `rates(arch)`.
        instructions: of an epilogue, instead of `EPILOGUE_INSTRUCTIONS`.

    Returns:
        0.0 where there is nothing to compute.
    """
    if not (m and n and k and batch):
        return 0.0
    device, stage = rates(arch), _stage(choice, format, dtype, arch)
    hertz = device.hertz
    m, n = (n, m) if choice.swap else (m, n)
    rows, cols = choice.tile
    size = math.prod(choice.cluster)
    # What a cluster computes at a time, and how often the fullest one does.
    high, wide = rows * choice.cluster[0] // stage.ctas, cols * choice.cluster[1]
    work = -(-m // high) * -(-n // wide) * batch * choice.split
    places = max(1, num_sms // size)
    rounds = -(-work // places)
    steps = -(-k // TILE_K)
    steps = -(-steps // choice.split)

    tile_rows = rows // stage.ctas
    tensor = tile_rows * cols * TILE_K / device.macs
    step = max(tensor, stage.shared / SHARED_RATE, stage.load / INGEST_RATE)
    lanes = max(1, tile_rows // 32) / 4
    if instructions is None:
        instructions = EPILOGUE_INSTRUCTIONS
    epilogue = lanes * cols * instructions
    on_sms = rounds * max(steps * step, epilogue) / hertz

    used = min(work, places) * size
    l2_step = stage.l2_a / choice.cluster[1] + stage.l2_b * stage.ctas / choice.cluster[0]
    through_l2 = work * size * steps * l2_step / (device.l2 * hertz)
    scaled = 0.5 + 1 / formats.WIDTH[format]
    b_bytes = n * k * scaled
    again = 1 if b_bytes <= device.l2_bytes / 2 else -(-m // (high * GROUP))
    moved = batch * (m * k * scaled + b_bytes * again + m * n * dtype.itemsize)
    reachable = min(device.dram, used * stage.depth * stage.load / LATENCY)
    reduction = 0.0
    if choice.split > 1:
        # In each round: who waits for the sums of others does not multiply.
        reduction = rounds * (CLUSTER_SYNC + tile_rows * cols * 4 / (INGEST_RATE * hertz))
    return (
        LAUNCH + LATENCY + max(on_sms, through_l2, moved / reachable) + epilogue / hertz + reduction
    )


def best(
    m: int,
    n: int,
    k: int,
    batch: int,
    *,
    format: str,
    dtype: torch.dtype,
    arch: str,
    num_sms: int,
    count: int = 1,
) -> tuple[Choice, ...]:
    """The `count` fastest choices by the model, the fastest first."""

    def cost(choice: Choice) -> float:
        return seconds(
            choice, m, n, k, batch, format=format, dtype=dtype, arch=arch, num_sms=num_sms
        )

    usable = [each for each in candidates(format, dtype, arch) if not each.swap or m <= SMALL_M]
    return tuple(sorted(usable, key=cost)[:count])


def choose(
    m: Any,
    n: Any,
    k: Any,
    batch: Any = 1,
    *,
    format: str,
    dtype: torch.dtype,
    arch: str,
    num_sms: int,
    device: torch.device | None = None,
) -> Choice:
    """The winner of autotuning on `device` if there is one, else the best by the model.

    Sizes that are not ints count as `DEFAULT_SIZES`. `device` is the current GPU if it is not
    given; where there is none, nothing is looked up.
    """
    # Not at the top: what is tuned are the choices of this module.
    from fos_compile.kernels.cute import matmul_tuning as tuning

    given = {"m": m, "n": n, "k": k, "batch": batch}
    sizes = {name: x if type(x) is int else DEFAULT_SIZES[name] for name, x in given.items()}
    name = tuning.device_name(torch.device("cuda") if device is None else device)
    problem = tuning.Problem(**sizes, format=format, dtype=dtype, arch=arch, num_sms=num_sms)
    return tuning.lookup(problem, name) or _by_model(problem)


@functools.lru_cache(maxsize=4096)
def _by_model(problem: Any) -> Choice:
    return problem.best(1)[0]
