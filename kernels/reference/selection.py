"""Errors of a candidate scale over the elements of a block (docs/contract.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels.formats import e2m1_steps


def ordered_sum(t: Tensor) -> Tensor:
    """float32 [16, ..] or [256, ..] -> [..], added in the order of the contract.

    Explicit adds, because every backend orders a reduction in its own way.
    """
    if t.shape[0] == 16:
        return _left_to_right((t[:8] + t[8:]).unbind(0))
    running = _left_to_right(t.unflatten(0, (8, 32)).unbind(0))
    lanes = _left_to_right(running.unflatten(0, (4, 8)).unbind(0))
    return _left_to_right(lanes.unbind(0))


def _left_to_right(terms: tuple[Tensor, ...]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def realized_error(
    q: Tensor, ax: Tensor, scale: Tensor, amax: Tensor, qs: Tensor, rule: str
) -> Tensor:
    """Error of the rounded magnitudes.

    Args:
        q: float32 [n, ..], E2M1 magnitudes.
        ax: float32 [n, ..], magnitudes of the input.
        scale: float32 [..], E4M3 value of the candidate.
        amax: float32 [].
        qs: float32 [].
        rule: mse, mae or abs_max.
    """
    diff = ((q * scale) * amax) / qs - ax
    if rule == "mse":
        return ordered_sum(diff * diff)
    return ordered_sum(diff.abs()) if rule == "mae" else diff.abs().amax(0)


def expected_error(y: Tensor, scale: Tensor, rule: str) -> Tensor:
    """Expected error of stochastically rounding magnitudes `y`, whatever the dice.

    Args:
        y: float32 [n, ..], scaled magnitudes, not clipped.
        scale: float32 [..], E4M3 value of the candidate; 0 has infinite error.
        rule: mse, mae or abs_max.
    """
    over = (y - 6.0).clamp(min=0.0)
    a = y.clamp(max=6.0)
    step, inverse = e2m1_steps(a)
    low = torch.floor(a * inverse) * step
    down, up = a - low, (low + step) - a
    if rule == "abs_max":
        error = torch.where(down == 0.0, over, torch.maximum(down, up)).amax(0) * scale
    elif rule == "mae":
        error = ordered_sum((down * up) * (inverse * 2.0) + over) * scale
    else:
        error = ordered_sum(down * up + over * over) * (scale * scale)
    return torch.where(scale == 0.0, float("inf"), error)
