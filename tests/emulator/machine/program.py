"""A kernel ready to run: its code decoded for one launch, its parameters, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from tests.emulator.errors import ArgumentsError, Deadlock, Fault
from tests.emulator.isa.decoder import decode
from tests.emulator.launch import Launch
from tests.emulator.machine.cluster import Cluster, Dim
from tests.emulator.machine.engine import Mode
from tests.emulator.machine.global_memory import GlobalMemory
from tests.emulator.machine.registers import LANES, RegisterFile, uniform
from tests.emulator.machine.shared_memory import RANK_SHIFT
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Entry, Module


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run: `mode` of asynchronous work, `schedule` of warps, `seed` of what is random.

    `max_instructions` a cluster executes before it counts as endless. `races` off leaves out the
    happens-before checks, for kernels that order themselves by flags in global memory.
    """

    mode: Mode = "eager"
    schedule: Literal["round_robin", "random"] = "round_robin"
    seed: int = 0
    max_instructions: int = 20_000_000
    races: bool = True
    trace: Callable[[Warp, int], None] | None = None


class Program:
    """One launch of an entry."""

    def __init__(self, module: Module, launch: Launch, memory: GlobalMemory) -> None:
        if launch.kernel not in module.entries:
            raise ArgumentsError(
                f"kernel {launch.kernel} is not in this PTX, which has "
                f"{', '.join(module.entries) or 'no entry'}"
            )
        self.module = module
        self.launch = launch
        self.memory = memory
        self.entry: Entry = module.entries[launch.kernel]
        self.parameters = self._parameters()
        self.file, self.code = self._decoded()
        self.lines = {i.line: i for i in self.entry.instructions}
        self.shared_bytes = self._shared_bytes()
        self._check_shape()

    def _decoded(self) -> tuple[RegisterFile, list[Step]]:
        """Steps of the entry, decoded once for all its launches unless somebody edited it."""
        entry, target = self.entry, self.module.target
        kept = entry.decoded
        if kept is None or kept[0] != entry.instructions or kept[1] != target:
            file = RegisterFile(entry)
            kept = entry.decoded = (
                list(entry.instructions),
                target,
                file,
                decode(entry, file, target),
            )
        return kept[2], kept[3]

    def _parameters(self) -> np.ndarray:
        given, wanted = self.launch.params, self.entry.parameters
        if len(given) != len(wanted):
            raise ArgumentsError(
                f"{self.entry.name} takes {len(wanted)} parameters, got {len(given)}"
            )
        size = max((p.offset + p.size for p in wanted), default=0)
        block = np.zeros(size, np.uint8)
        for parameter, value in zip(wanted, given, strict=True):
            if len(value) != parameter.size:
                raise ArgumentsError(
                    f"{parameter.name} has {parameter.size} bytes, got {len(value)}"
                )
            block[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(
                value, np.uint8
            )
        return block

    def _shared_bytes(self) -> int:
        dynamic = self.entry.dynamic_shared
        if dynamic is None:
            return self.entry.static_shared + self.launch.shared_bytes
        return dynamic + self.launch.shared_bytes

    def _check_shape(self) -> None:
        required = self.entry.directives.get("reqntid")
        block = self.launch.block
        if required and tuple(required) + (1,) * (3 - len(required)) != block:
            raise ArgumentsError(f"{self.entry.name} requires blocks of {required}, got {block}")
        for what, size, most in (
            ("threads a block", int(np.prod(block)), 1024),
            ("CTAs a cluster", int(np.prod(self.launch.cluster)), 16),
            ("bytes of shared memory", self.shared_bytes, 232448),
        ):
            if size > most:
                raise ArgumentsError(
                    f"{self.entry.name}: {size} {what}, at most {most} are possible"
                )
        for size, parts in zip(self.launch.grid, self.launch.cluster, strict=True):
            if size % parts:
                raise ArgumentsError(
                    f"grid {self.launch.grid} is no multiple of cluster {self.launch.cluster}"
                )

    # Running -----------------------------------------------------------------------------------

    def clusters(self) -> Iterator[list[Dim]]:
        """CTA indices of each cluster; those of a cooperative launch run together."""
        grid, cluster = self.launch.grid, self.launch.cluster
        starts = product(*(range(0, g, c) for g, c in zip(grid[::-1], cluster[::-1], strict=True)))
        groups = [
            [
                (x + i, y + j, z + k)
                for k in range(cluster[2])
                for j in range(cluster[1])
                for i in range(cluster[0])
            ]
            for z, y, x in starts
        ]
        if self.launch.cooperative and max(cluster) == 1:
            yield [index for group in groups for index in group]
        else:
            yield from groups

    def run(self, settings: Settings) -> int:
        """Execute every cluster, one after the other; instructions executed, times warps."""
        executed = 0
        with np.errstate(all="ignore"):
            for indices in self.clusters():
                cluster = Cluster(self, indices, settings)
                for warp in cluster.warps:
                    warp.trace = settings.trace
                cluster.run()
                executed += cluster.executed
        return executed

    def fill(self, warp: Warp) -> None:
        """Give a warp its registers."""
        warp.r = list(self.file.initial)
        warp.d = list(self.file.defined)
        for key, slot in self.file.specials.items():
            name, bits = key.rsplit(":", 1)
            if name.startswith("&"):  # a shared variable's address, with the CTA's rank
                address = int(name[1:]) | warp.cta.rank << RANK_SHIFT
                warp.r[slot] = uniform(address, int(bits))
            else:
                warp.r[slot] = self._special(name, warp)

    def _special(self, name: str, warp: Warp) -> np.ndarray:
        launch, cta = self.launch, warp.cta
        x, y, _ = launch.block
        thread = LANES + np.uint32(32 * warp.index)
        cluster = tuple(i // c for i, c in zip(cta.index, launch.cluster, strict=True))
        rank = tuple(i % c for i, c in zip(cta.index, launch.cluster, strict=True))
        clusters = tuple(g // c for g, c in zip(launch.grid, launch.cluster, strict=True))
        stem, _, axis = name.partition(".")
        by_axis: dict[str, tuple[int, int, int]] = {
            "%ctaid": cta.index,
            "%ntid": launch.block,
            "%nctaid": launch.grid,
            "%clusterid": cluster,  # type: ignore[dict-item]
            "%nclusterid": clusters,  # type: ignore[dict-item]
            "%cluster_ctaid": rank,  # type: ignore[dict-item]
            "%cluster_nctaid": launch.cluster,
        }
        if stem in by_axis:
            return uniform(by_axis[stem]["xyz".index(axis)], 32)
        if stem == "%tid":
            values = (thread % x, thread // x % y, thread // (x * y))
            return values["xyz".index(axis)].astype(np.uint32)
        plain = {
            "%laneid": LANES,
            "%warpid": uniform(warp.index, 32),
            "%cluster_ctarank": uniform(cta.rank if max(launch.cluster) > 1 else 0, 32),
            "%cluster_nctarank": uniform(int(np.prod(launch.cluster)), 32),
            "%dynamic_smem_size": uniform(launch.shared_bytes, 32),
            "%total_smem_size": uniform(self.shared_bytes, 32),
            "%lanemask_eq": np.uint32(1) << LANES,
            "%lanemask_lt": (np.uint32(1) << LANES) - np.uint32(1),
            "%lanemask_le": (np.uint32(2) << LANES) - np.uint32(1),
            "%lanemask_gt": ~((np.uint32(2) << LANES) - np.uint32(1)),
            "%lanemask_ge": ~((np.uint32(1) << LANES) - np.uint32(1)),
            "%smid": uniform(0, 32),
            "%nsmid": uniform(1, 32),
            "%clock": uniform(0, 32),
            "%clock64": uniform(0, 64),
            "%globaltimer": uniform(0, 64),
            "WARP_SZ": uniform(32, 32),
        }
        if name not in plain:
            raise Fault("special register", f"{name} is not emulated")
        return plain[name]

    # Messages ----------------------------------------------------------------------------------

    def where(self, pc: int) -> str:
        """Line of an instruction, with its text and its source where the DSL gave it."""
        return self.line(self.entry.instructions[min(pc, len(self.entry.instructions) - 1)].line)

    def line(self, number: int) -> str:
        """A line of the PTX, for messages."""
        text = self.module.lines[number - 1].strip() if number else "?"
        found = self.lines.get(number)
        source = ""
        if found is not None and found.location is not None:
            file = Path(self.module.files.get(found.location.file, "?")).name
            source = f" ({file}:{found.location.line})"
        return f"line {number} `{text[:160]}`{source}"

    def located(self, fault: Fault, warp: Warp) -> Fault:
        """The same fault with who did it and where."""
        text = str(fault).removeprefix(f"{fault.check}: ")
        lanes = f" lanes {warp.mask:#010x}" if warp.mask != warp.live else ""
        message = f"{text}\n  in {warp.name}{lanes} at {self.where(warp.pc)}"
        if isinstance(fault, Deadlock):
            return Deadlock(message)
        return Fault(fault.check, message)
