"""From a matrix to lanes of blocks and back (docs/contract.md).

A block of n elements is stored across n lanes: element i of every block in lanes[i]. Sums in the
contract's order are then sums of lanes, which every backend vectorizes across blocks.

A traced graph carries these functions with symbolic sizes, so nothing here looks at a size or a
value: padding is unconditional, every case is a `torch.where`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.philox import dice, hardware_dice
from fos_compile.kernels.rht import rht as transform

aten = torch.ops.aten
HARDWARE = "stochastic_hardware"


def group_lanes(x: Tensor, format: str, rht: bool, transpose: bool) -> Tensor:
    """[.., R, C] -> transposed, zero-padded, rotated [16, .., R', P/16] in x.dtype."""
    x = x.mT if transpose else x
    cols = x.shape[-1]
    padded = formats.padded_cols(cols, format)
    x = aten.constant_pad_nd(x, [0, padded - cols])
    lanes = x.unflatten(-1, (padded // 16, 16)).movedim(-1, 0)
    return transform(lanes) if rht else lanes


def block_lanes(lanes: Tensor, format: str, block: str) -> Tensor:
    """Lanes of groups [16, .., R, P/16] -> float32 lanes of blocks [n, .., rows, P/width].

    n is 16, 32 (mxfp4) or 256 (2d, row-major tiles, rows zero-padded to tiles of 16).
    With a symbolic number of rows, 2d guards on whether there is a single tile, nothing else does.
    """
    *lead, rows, groups = lanes.shape[1:]
    if block == "2d":
        tiles = (rows + 15) // 16
        split = formats.pad_rows(lanes, tiles * 16).unflatten(-2, (tiles, 16)).movedim(-2, 0)
        shape = (256, *lead, tiles, groups)
    elif format == "mxfp4":
        split = lanes.unflatten(-1, (groups // 2, 2)).movedim(-1, 0)
        shape = (32, *lead, rows, groups // 2)
    else:
        split, shape = lanes, lanes.shape
    return materialize(formats.copied_view(split, shape, torch.float32))


def pack_codes(codes: Tensor, format: str, block: str, rows: int) -> Tensor:
    """float32 codes [n, .., rows', P/width] -> uint8 [.., rows, P/2], low nibble = even column."""
    pairs = codes[0::2] + codes[1::2] * 16.0
    *lead, height, groups = pairs.shape[1:]
    if block == "1d":
        shape = (*lead, height, groups * pairs.shape[0])
        return formats.copied_view(pairs.movedim(0, -1), shape, torch.uint8)
    tile = pairs.unflatten(0, (16, 8)).movedim((0, 1), (-3, -1))
    whole = formats.copied_view(tile, (*lead, height * 16, groups * 8), torch.uint8)
    return whole.narrow(-2, 0, rows).clone()


def group_dice(lanes: Tensor, seed: Tensor, stream: int, rounding: str) -> Tensor:
    """Offsets u of stochastic rounding for every element: float32, the shape of `lanes`.

    Args:
        lanes: [16, .., R, P/16].
        seed: int64 [1].
        stream: see docs/contract.md section 5.
        rounding: not nearest.
    """
    *lead, rows, groups = lanes.shape[1:]
    row = torch.arange(rows, device=lanes.device)
    if lead:
        row = row + rows * torch.arange(lead[0], device=lanes.device).unsqueeze(-1)
    index = row.unsqueeze(-1) * groups + torch.arange(groups, device=lanes.device)
    return (hardware_dice if rounding == HARDWARE else dice)(seed, index, stream)


def materialize(x: Tensor) -> Tensor:
    """`x`, which Inductor's C++ backend then computes once and keeps in memory.

    Left to itself it reads lanes through the matrix, 16 elements apart, in every sum and gives up
    vectorizing (21 ms instead of 1 ms for 2M elements, AVX-512, one thread), and it repeats the
    scale of a block in each of its lanes. On a GPU recomputing is the cheaper of the two.
    """
    return x.as_strided(x.shape, x.stride()) if x.device.type == "cpu" else x


def round_magnitude(y: Tensor, u: Tensor | None, rounding: str) -> Tensor:
    """Scaled magnitudes -> E2M1 magnitudes, nearest or with the offsets `u`."""
    if u is None:
        return formats.round_e2m1(y)
    y = y.clamp(max=6.0)
    step, inverse = formats.e2m1_steps(y)
    steps = y * inverse
    if rounding == HARDWARE:
        # Of the bits below 2^-16 the sum would round some up, and none can reach the next step.
        steps = torch.floor(steps * 2.0**16) * 2.0**-16
    return (torch.floor(steps + u) * step).clamp(max=6.0)


def same_constant(value: float, like: Tensor) -> Tensor:
    """`value` as a float32 tensor that compilers cannot see through, in the shape of `like`.

    Dividing by a visible constant becomes a multiplication by its rounded reciprocal, in eager CUDA
    and in Inductor, and that changes bits. `like` is finite.
    """
    return (like * 0.0 + 1.0) * value
