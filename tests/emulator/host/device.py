"""What the device says of itself, by architecture: the attributes that host code may ask for."""

from __future__ import annotations

import re

from tests.emulator.errors import UnsupportedError

STATIC_SHARED_LIMIT = 48 * 1024
"""Dynamic shared memory that a kernel gets without asking for more."""

# Per generation: shared memory of a CTA at most, of an SM, threads and CTAs of an SM (CUDA C++
# programming guide, table of technical specifications).
_SIZES = {
    8: (99 * 1024, 100 * 1024, 1536, 24),
    9: (227 * 1024, 228 * 1024, 2048, 32),
    10: (227 * 1024, 228 * 1024, 2048, 32),
    12: (99 * 1024, 100 * 1024, 1536, 24),
}
_SM_80 = (163 * 1024, 164 * 1024, 2048, 32)


def capability(arch: str) -> tuple[int, int]:
    """``sm_100a`` -> (10, 0)."""
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", arch)
    if not found:
        raise UnsupportedError(f"architecture {arch!r} is not of the form sm_100a")
    return int(found[1]), int(found[2])


def attributes(arch: str, sm_count: int) -> dict[int, int]:
    """cudaDeviceAttr -> value; what is missing is refused when asked for."""
    major, minor = capability(arch)
    if major not in _SIZES:
        raise UnsupportedError(f"no device attributes are known of {arch}")
    sizes = _SM_80 if (major, minor) == (8, 0) else _SIZES[major]
    shared, shared_sm, threads_sm, ctas_sm = sizes
    return {
        1: 1024,  # MaxThreadsPerBlock
        2: 1024,  # MaxBlockDimX
        3: 1024,
        4: 64,
        5: 2**31 - 1,  # MaxGridDimX
        6: 65535,
        7: 65535,
        8: STATIC_SHARED_LIMIT,  # MaxSharedMemoryPerBlock
        10: 32,  # WarpSize
        12: 65536,  # MaxRegistersPerBlock
        16: sm_count,  # MultiProcessorCount
        39: threads_sm,  # MaxThreadsPerMultiProcessor
        75: major,  # ComputeCapabilityMajor
        76: minor,
        81: shared_sm,  # MaxSharedMemoryPerMultiprocessor
        82: 65536,  # MaxRegistersPerMultiprocessor
        95: 1,  # CooperativeLaunch
        97: shared,  # MaxSharedMemoryPerBlockOptin
        106: ctas_sm,  # MaxBlocksPerMultiprocessor
        111: 1024,  # ReservedSharedMemoryPerBlock
        120: int(major >= 9),  # ClusterLaunch
    }
