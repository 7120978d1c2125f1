"""Error budgets derived from float64 oracles and sample sizes: the only home of tolerances.

The unit roundoff is 2^-p for p significant bits: 24 in float32, 11 in float16, 8 in bfloat16.
"""

from __future__ import annotations

import math

import numpy as np
import torch

U32 = 2.0**-24
UNIT = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the spacing of subnormals: what one rounding costs where the relative bound is void.
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
SIGMAS = 5.0


def gamma(n: int) -> float:
    """n float32 roundings in a chain (Higham, Accuracy and Stability, lemma 3.1)."""
    return n * U32 / (1 - n * U32)


def tensor_scale(amax_a: float, qs_a: float, amax_b: float, qs_b: float) -> float:
    """alpha of fos::scaled_mm: a defined sequence of float32 operations, hence no error."""
    f = np.float32
    return float((f(amax_a) / f(qs_a)) * (f(amax_b) / f(qs_b)))


def matmul_oracle(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha * a @ b.T + bias, its error budget), both float64, of exact operands.

    Products of code * scale have at most 12 significant bits, so they are exact in float32 and
    only the k - 1 additions round, in any order: gamma_k * sum |a||b|. Then one float32 rounding
    each for the factor alpha and for the bias, and one rounding to out_dtype.
    """
    a, b = a.double(), b.double()
    exact = alpha * (a @ b.mT)
    error = abs(alpha) * gamma(a.shape[-1]) * (a.abs() @ b.mT.abs())
    error = error + U32 * (exact.abs() + error) + TINY[torch.float32]
    if bias is not None:
        exact = exact + bias.double()
        error = error + U32 * (exact.abs() + error)
    error = error + UNIT[out_dtype] * (exact.abs() + error) + TINY[out_dtype]
    return exact, error


def outside_budget(actual: torch.Tensor, exact: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Where `actual` is farther than `error` from `exact`; NaN is outside."""
    return ~((actual.double() - exact).abs() <= error)


def rounding_bias_limit(samples: int) -> float:
    """Largest |mean((rounded - a) / step)| of `samples` stochastic roundings.

    With u = (byte + 1/2) / 256 the chance to round up, #{byte: frac + u >= 1} / 256, is within
    1/512 of frac: the bias is at most 2^-9 of a step. Each rounding is a Bernoulli variable of
    one step, variance p(1 - p) <= 1/4, so five standard deviations of the mean add 2.5/sqrt(n).
    """
    return 2.0**-9 + SIGMAS * 0.5 / math.sqrt(samples)


def hardware_bias_limit(samples: int) -> float:
    """`rounding_bias_limit` of independent roundings with 16 random bits R.

    The chance to round up, #{R: frac + R / 2^16 >= 1} / 2^16, is frac without its bits below 2^-16.
    """
    return 2.0**-16 + SIGMAS * 0.5 / math.sqrt(samples)


def agreement_limit(samples: int) -> float:
    """Five standard deviations of the share of agreements of fair independent coins."""
    return SIGMAS * 0.5 / math.sqrt(samples)


def ratio_of_means(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """(mean(above) / mean(below), its variance) of paired samples.

    Delta method: the ratio r of means has variance var(above - r * below) / (n * mean(below)^2).
    """
    above, below = above.astype(np.float64), below.astype(np.float64)
    ratio = above.mean() / below.mean()
    return ratio, (above - ratio * below).var() / (len(below) * below.mean() ** 2)


def same_ratio_limit(*variances: float) -> float:
    """Five standard deviations of the difference of independent estimates."""
    return SIGMAS * math.sqrt(sum(variances))
