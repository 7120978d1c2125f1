"""Rungs 5 to 7: NVIDIA's NVFP4 GEMMs for sm_100a, as compiled, give the right results.

Nothing of theirs is changed: their host code computes grid, tensor maps and parameters, and their
PTX runs under every mode of asynchronous work with every check on.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass.operators", reason="nvidia-cutlass-operators is not installed")

from tests.emulator.emulate import emulate
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.operators import ALL, Configuration, host, problem

ONE = Configuration(128, 64, (2, 1))
WIDE = Configuration(128, 192, (2, 1))
PAIR = Configuration(256, 128, (2, 1))
WIDE_PAIR = Configuration(256, 192, (2, 1))
SQUARE = Configuration(256, 128, (2, 2))

SCHEDULES = [Settings(mode=mode) for mode in MODES]
SCHEDULES += [Settings(mode="random", schedule="random", seed=seed) for seed in (1, 2)]


def run(configuration, sizes, settings):
    case = problem(*sizes)
    m, n, _, batch = case.sizes
    out = torch.empty(batch, m, n, dtype=torch.bfloat16)
    done = emulate(host(configuration), *case.arguments(out), outputs=[out], settings=settings)
    assert done.launches[0].cluster == (*configuration.cluster, 1)
    worst = case.errors(out).max().item()
    assert worst <= 1, f"error of {worst:.3g} budgets"
    return done


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: f"{s.mode}-{s.schedule}{s.seed}")
@pytest.mark.parametrize("configuration", [ONE, WIDE, PAIR, WIDE_PAIR, SQUARE], ids=str)
def test_every_order_of_events_gives_the_result(configuration, settings):
    """Two tiles a CTA and K that wraps the ring of stages."""
    run(configuration, (256, 2 * configuration.n, 1280), settings)


@pytest.mark.parametrize("k", [32, 64, 256, 288, 2048, 4160])
@pytest.mark.parametrize("configuration", [ONE, PAIR], ids=str)
def test_lengths_of_k(configuration, k):
    """Less than a tile, whole tiles, a rest, and three turns of the ring."""
    run(configuration, (128, 64, k), Settings(mode="late"))


@pytest.mark.parametrize(("m", "n"), [(1, 8), (130, 72), (257, 200), (40, 328)])
@pytest.mark.parametrize("configuration", [ONE, WIDE, WIDE_PAIR], ids=str)
def test_ragged_sizes(configuration, m, n):
    """Tiles beyond the matrix are filled with zeros and not stored."""
    run(configuration, (m, n, 544), Settings(mode="random", seed=3))


@pytest.mark.parametrize("configuration", [ONE, PAIR], ids=str)
def test_batches(configuration):
    run(configuration, (136, 72, 320, 3), Settings(mode="late"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("configuration", ALL, ids=str)
def test_every_configuration(configuration, mode):
    n = configuration.n * configuration.cluster[1] + 40
    run(configuration, (300, n, 1056), Settings(mode=mode))
