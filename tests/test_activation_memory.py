"""What is kept for the backward, in bytes, next to plain Inductor in bf16."""

from __future__ import annotations

import functools

import pytest
import torch

import activation_memory

CPU = torch.device("cpu")
CASES = {case.name: case for case in activation_memory.cases(quick=True)}


@functools.cache
def saved_by(name: str) -> tuple[dict[str, list[activation_memory.Saved]], dict[str, int]]:
    lists, totals, _ = activation_memory.saved_by(CASES[name], CPU)
    return lists, totals


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bound is not None])
def test_saved_bytes_stay_within_the_bound(name: str) -> None:
    lists, totals = saved_by(name)
    saved = "\n".join(str(each) for each in lists["ours"])
    assert totals["ours"] <= CASES[name].bound * totals["bf16"], saved


def test_casts_of_parameters_are_not_saved() -> None:
    (name,) = (name for name in CASES if "autocast" in name)
    model, _ = CASES[name].make(CPU)
    weights = {
        "x".join(map(str, parameter.shape))
        for name, parameter in model.named_parameters()
        if name.endswith("proj.weight")
    }
    lists, _ = saved_by(name)
    casts = [each for each in lists["ours"] if each.made_by.endswith("convert_element_type")]
    assert not [each for each in casts if each.shape in weights]
