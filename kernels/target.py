"""What code is built for: this machine's processor and CUDA devices, and where it is kept."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from pathlib import Path

import torch

from fos_compile.kernels.op import Status

SWITCH = "FOS_CUTE_KERNELS"
MIN_CAPABILITY = (8, 0)
"""With bfloat16 arithmetic. Nothing below 9.0 has run the kernels: it is the comparison with the
reference before the first use that makes trying safe."""
_OFF = ("0", "false", "no", "off")
_PACKAGES = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}


def cache_dir(part: str) -> Path:
    """Folder for compiled code of one kind (``cpu``, ``cute``); it need not exist."""
    root = (
        os.environ.get("FOS_CACHE_DIR")
        or os.environ.get("XDG_CACHE_HOME")
        or Path.home() / ".cache"
    )
    return Path(root) / "fos_compile" / part


@functools.cache
def processor() -> str:
    """What native code depends on: a home directory may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        model = platform.processor()
    return f"{platform.machine()} {model}"


def status(device: torch.device) -> Status:
    """Whether CuTe kernels can run on `device`, or why not. Imports neither library."""
    if device.type != "cuda":
        return Status(f"CuTe kernels need a CUDA device, got {device.type}")
    if torch.version.cuda is None or not torch.cuda.is_available():
        return Status("CuTe kernels need a CUDA build of torch and a driver")
    return _status(_index(device))


def arch(device: torch.device) -> str:
    """What kernels for a CUDA device are compiled for: ``sm_80``, ``sm_90a``.

    Features of one architecture alone, which the suffix stands for, exist from 9.0 on.
    """
    major, minor = torch.cuda.get_device_capability(_index(device))
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def reset() -> None:
    """Forget what :func:`status` found out, for tests that change the environment."""
    _status.cache_clear()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _status(index: int) -> Status:
    switch = os.environ.get(SWITCH, "")
    if switch.lower() in _OFF:
        return Status(f"CuTe kernels switched off by {SWITCH}={switch}")
    for module, package in _PACKAGES.items():
        if not _installed(module):
            return Status(f"{package} is not installed")
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        required, actual = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return Status(f"CuTe kernels need compute capability {required}, got {actual}")
    return Status()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
