"""fos::seed: a fresh seed for stochastic rounding, as a node of the graph.

Numerics: 63 uniform bits of torch's default generator of the device, so `torch.manual_seed` and
saved generator states reproduce a run. Never inlined: a compiled draw would use another generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels.op import Cost, Example, Op, Status, define_op

SCHEMA = "(*, Device device) -> Tensor"


def reference(*, device: torch.device) -> Tensor:
    """Draw a seed.

    Args:
        device: whose default generator is used and where the seed lives.

    Returns:
        int64 [1] in [0, 2^63 - 1).
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def fake(*, device: torch.device) -> Tensor:
    """int64 [1]; the reference would draw from the generator of the fake device."""
    return torch.empty((1,), dtype=torch.int64, device=device)


def supports(*, device: torch.device) -> Status:
    """Whether a device kernel serves this call."""
    return Status(f"seed: drawn by torch's generator on {torch.device(device).type}")


def cost(*, device: torch.device) -> Cost:
    """Eight bytes."""
    return Cost(8, 0)


def example_inputs() -> list[Example]:
    """The CPU."""
    return [((), {"device": torch.device("cpu")})]


SEED = define_op(
    Op(
        name="seed",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
        inlinable=False,
        tags=(torch.Tag.nondeterministic_seeded,),
    )
)
