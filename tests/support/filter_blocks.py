"""Blocks of 16 that the tests of the filters share: what is common, and what is hard to decide."""

from __future__ import annotations

import torch

BLOCKS = 1 << 15


def gaussian(generator):
    return torch.randn(BLOCKS, 16, generator=generator)


def heavy_tailed(generator):
    return gaussian(generator) * torch.exp(4 * torch.randn(BLOCKS, 1, generator=generator))


def on_the_grid(generator):
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0])
    return grid[torch.randint(9, (BLOCKS, 16), generator=generator)]


def at_thresholds(generator):
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    signs = torch.randint(2, (BLOCKS, 16), generator=generator) * 2 - 1
    return ties[torch.randint(8, (BLOCKS, 16), generator=generator)] * signs


def next_to_thresholds(generator):
    """Within a float16 rounding of a tie, where q may be on the wrong side."""
    off = 1 + 2.0**-8 * torch.randint(-1, 2, (BLOCKS, 16), generator=generator)
    return at_thresholds(generator) * off


def sixteenths(generator):
    return torch.randint(-96, 97, (BLOCKS, 16), generator=generator) / 16


def mostly_tiny(generator):
    """One large element, the others down to what float16 cannot hold beside it."""
    x = gaussian(generator) * torch.exp2(torch.randint(-30, 1, (BLOCKS, 16), generator=generator))
    x[:, 0] = 6.0
    return x


def sparse(generator):
    return gaussian(generator) * (torch.rand(BLOCKS, 16, generator=generator) < 0.1)


DATA = [
    gaussian,
    heavy_tailed,
    on_the_grid,
    at_thresholds,
    next_to_thresholds,
    sixteenths,
    mostly_tiny,
    sparse,
]
