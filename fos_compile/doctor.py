"""``doctor``: versions, devices, and which implementation each operator would use, and why."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import sys

import torch
from torch.utils import _pytree as pytree

from fos_compile.kernels import REGISTRY
from fos_compile.kernels.cpu.build import compiler

_PACKAGES = ("fos-compile", "torch", "triton", "nvidia-cutlass-dsl", "cuda-python", "transformers")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OperatorStatus:
    """Which implementation serves one operator on one device."""

    operator: str
    device: str
    implementation: str
    reason: str
    """Why nothing faster serves; empty for a device kernel."""


def versions() -> dict[str, str]:
    """Installed versions of what the backend builds on; ``-`` for what is missing."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    found["cuda (torch)"] = torch.version.cuda or "-"
    return found


def devices() -> dict[str, str]:
    """Devices that this process can use, with what decides the implementation on them."""
    path = compiler()
    builds = (
        f"C++ compiler {path}" if path else "no C++ compiler: use options={'compiler': 'eager'}"
    )
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {builds}"}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        )
    return found


def operators() -> list[OperatorStatus]:
    """Ask every operator's ``supports`` for every device, on its own example inputs.

    ``fos::amax`` has a kernel for the rotated maximum alone; the plain one is torch's reduction.
    """
    rows = []
    for device in devices():
        for name, op in REGISTRY.items():
            move = functools.partial(torch.Tensor.to, device=torch.device(device))
            label, index = ("amax(rht=True)", 1) if name == "amax" else (name, 0)
            args, kwargs = pytree.tree_map_only(torch.Tensor, move, op.example_inputs()[index])
            if "device" in kwargs:
                kwargs["device"] = torch.device(device)
            status = op.supports(*args, **kwargs)
            implementation = "device kernel" if status else "decomposition to PyTorch"
            rows.append(
                OperatorStatus(
                    operator=f"fos::{label}",
                    device=device,
                    implementation=implementation,
                    reason=str(status) * (not status),
                )
            )
    return rows


def print_doctor(file: object = None) -> None:
    """Print the three tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file or sys.stdout)  # type: ignore[arg-type]
    for title, facts in (("Versions", versions()), ("Devices", devices())):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, fact in facts.items():
            table.add_row(name, fact)
        console.print(table)
    table = Table(
        "operator",
        "device",
        "runs as",
        "why nothing faster",
        title="Operators",
        title_justify="left",
    )
    for row in operators():
        table.add_row(row.operator, row.device, row.implementation, row.reason)
    console.print(table)
    recipe = os.environ.get("FOS_RECIPE")
    if recipe:
        console.print(f"FOS_RECIPE={recipe} sets the default recipe")
