"""The emulator fails when it should: kernels with one fault each are caught, by the same check.

results/mutants.md says by which; ``python -m tests.emulator.mutants`` writes it anew.
"""

from __future__ import annotations

import pytest

pytest.importorskip("cutlass.operators", reason="nvidia-cutlass-operators is not installed")

from tests.emulator.mutants import MUTANTS, SETTINGS, hunt, original, recorded, run
from tests.emulator.mutations.catalogue import ONE, PAIR, SQUARE, WIDE, WIDE_PAIR
from tests.emulator.mutations.roles import Gemm

KERNELS = [ONE, WIDE, PAIR, WIDE_PAIR, SQUARE]
RECORD = recorded()


@pytest.mark.parametrize("configuration", KERNELS, ids=str)
def test_kernels_without_a_fault_pass(configuration):
    """Under every setting that mutants are run in: what is caught is the fault."""
    for settings in SETTINGS.values():
        run(Gemm(original(configuration)), configuration, settings)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_caught_by_the_recorded_check(mutant):
    expected = RECORD[str(mutant)]
    order = sorted(SETTINGS, key=lambda name: name != expected.setting)
    found = hunt(mutant, tuple(order))
    assert found.check == expected.check, found.message


def test_the_record_is_of_these_mutants():
    assert set(RECORD) == {str(mutant) for mutant in MUTANTS}
    assert len(RECORD) == len(MUTANTS)


def test_survivors_are_those_that_are_explained():
    survivors = {str(mutant) for mutant in MUTANTS if not RECORD[str(mutant)].check}
    assert survivors == {str(mutant) for mutant in MUTANTS if mutant.survives}


def test_nine_in_ten_are_caught():
    caught = [name for name, outcome in RECORD.items() if outcome.check]
    assert len(caught) >= 0.9 * len(RECORD)
