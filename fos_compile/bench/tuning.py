"""`bench matmul --tune`: time the tiles near the model's best on the GPU, and keep the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fos_compile.bench.cases import Shape, disagreement, operands, rotated
from fos_compile.bench.providers import everything, our_launch, said
from fos_compile.bench.timing import measure
from fos_compile.kernels import target


def tune_all(shapes: Iterable[Shape], *, device: torch.device, format: str) -> list[str]:
    """Tune every shape that our kernels serve; a line for each says what won, or why not."""
    (ours,) = (each for each in everything() if each.name == "ours")
    lines = []
    for shape in shapes:
        reason = ours.refuses(shape, device, format)
        try:
            line = f"not here: {reason}" if reason else _tune(shape, device, format)
        except Exception as error:  # the other shapes go on
            line = f"FAILED: {said(error)}"
        lines.append(f"{shape}, tuning: {line}")
    return lines


def _tune(shape: Shape, device: torch.device, format: str) -> str:
    from fos_compile.kernels.cute import matmul_tuning as tuning

    given = operands(shape, device=device, format=format)
    sets = rotated(given)

    def timer(choice: Any) -> float:
        multiply = our_launch(given, choice)
        if wrong := disagreement(multiply(given), given):
            raise RuntimeError(wrong)
        return measure(multiply, sets, device=device, seconds=0.1).us * 1e-6

    problem = tuning.Problem(
        m=shape.m,
        n=shape.n,
        k=shape.k,
        format=format,
        dtype=torch.bfloat16,
        arch=target.arch(device),
        num_sms=torch.cuda.get_device_properties(device).multi_processor_count,
    )
    won = tuning.tune(problem, timer, device=tuning.device_name(device))
    first = won.timed[0][1]
    than = f"{first * 1e6:.3g} us" if isinstance(first, float) else first
    return f"{won.choice}, {won.seconds * 1e6:.3g} us; the model's, {won.timed[0][0]}: {than}"
