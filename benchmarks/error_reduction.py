"""By what factor does choosing between 4 and 6 reduce the mean squared error on Gaussian input?

The quantizer's error on N(0, 1) beside the error of ideal block scales (float64, not rounded to
E4M3, no tensor scale): for one fixed candidate by numerical integration over the largest of 16
magnitudes, for a choice between two by Monte Carlo, which shares no code with the quantizer.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

import harness
from fos_compile import quantize

RULES = ("static_6", "static_4", "mse", "mae", "abs_max")
GRID = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
ROWS, COLS, BLOCKS = 4096, 4096, 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One scale rule; errors relative to the variance of the input."""

    scale_rule: str
    measured_mse: float
    measured_over_static_6: float
    ideal_mse: float
    ideal_over_static_6: float
    ideal_standard_error: float | None
    """Of the Monte Carlo estimate of ideal_mse; None where it was integrated."""
    measured_share_of_4: float | None


def measured(x: torch.Tensor, rule: str) -> tuple[float, torch.Tensor]:
    """Mean squared error of the quantizer on `x`, and the scale bytes."""
    q = quantize(x, rule)
    error = (q.dequantize(torch.float32).double() - x.double()).square().mean()
    return float(error / x.double().square().mean()), q.scales_2d()


def share_of_4(x: torch.Tensor, chosen: torch.Tensor) -> float:
    """Share of blocks whose scale is above the 6 candidate's (the 4 candidate's is larger)."""
    peak = x.double().unflatten(-1, (-1, 16)).abs().amax(-1)
    unit = peak / 6 * (1536 / peak.max())
    value = chosen.view(torch.float8_e4m3fn).double()
    return float((value > unit * 1.25).double().mean())


def rounded(a: np.ndarray) -> np.ndarray:
    """Nearest E2M1 magnitude; ties have probability zero."""
    return GRID[np.searchsorted((GRID[1:] + GRID[:-1]) / 2, a)]


def integrated(top: float, points: int = 4000) -> float:
    """Error with scale = largest magnitude / `top`, by the midpoint rule over (largest, other).

    The largest of 16 half-normals has density 16 F^15 f and no error; the other 15 are
    independent half-normals below it.
    """
    peak = (np.arange(points) + 0.5) * (8.0 / points)
    erf = np.vectorize(math.erf)(peak / math.sqrt(2))
    density = math.sqrt(2 / math.pi) * np.exp(-(peak**2) / 2)
    weight = 16 * erf**15 * density * (8.0 / points)
    fraction = (np.arange(points) + 0.5) / points
    error = (rounded(fraction * top) / top - fraction) ** 2
    total = 0.0
    for m, w, below in zip(peak, weight, erf, strict=True):
        z = fraction * m
        mean = (np.exp(-(z**2) / 2) * error).mean() * m**3 * math.sqrt(2 / math.pi)
        total += w * mean / below
    return 15 / 16 * total


def simulated(rule: str) -> tuple[float, float]:
    """Error when the better of scales peak/6 and peak/4 is taken by `rule`; its standard error."""
    rng = np.random.default_rng(2)
    means = []
    for _ in range(16):
        z = np.abs(rng.standard_normal((BLOCKS // 16, 16)))
        peak = z.max(-1, keepdims=True)
        difference = [np.abs(rounded(z * top / peak) * peak / top - z) for top in (6, 4)]
        squares = np.stack([(d**2).sum(-1) for d in difference])
        score = {
            "mse": squares,
            "mae": np.stack([d.sum(-1) for d in difference]),
            "abs_max": np.stack([d.max(-1) for d in difference]),
        }[rule]
        means.append(np.where(score[1] < score[0], squares[1], squares[0]).mean() / 16)
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means)))


def main() -> None:
    """Print and write the table."""
    options = harness.parser(__doc__, name="error_reduction").parse_args()
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1)).to(options.device)
    rows: list[Row] = []
    for rule in RULES:
        error, scales = measured(x, rule)
        is_fixed = rule.startswith("static")
        ideal, spread = (integrated(float(rule[-1])), None) if is_fixed else simulated(rule)
        first = rows[0] if rows else None
        rows.append(
            Row(
                scale_rule=rule,
                measured_mse=error,
                measured_over_static_6=error / first.measured_mse if first else 1.0,
                ideal_mse=ideal,
                ideal_over_static_6=ideal / first.ideal_mse if first else 1.0,
                ideal_standard_error=spread,
                measured_share_of_4=None if is_fixed else share_of_4(x, scales),
            )
        )
    harness.write_results(
        rows,
        title=f"Mean squared error of NVFP4 rules on N(0, 1), float32 {ROWS}x{COLS}",
        facts=harness.header(options.device, with_roof=False),
        md=options.md,
        csv_path=options.csv,
        notes="Ideal: block scales in float64, not rounded to E4M3.",
    )


if __name__ == "__main__":
    main()
