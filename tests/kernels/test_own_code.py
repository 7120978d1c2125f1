"""Copies of functions that Dynamo counts apart."""

from __future__ import annotations

import functools

import pytest
import torch

from fos_compile.kernels.own_code import own_code


def make(offset: float):
    def add(x, y=1.0, *, scale=2.0):
        return (x + y) * scale + offset

    return add


def test_a_copy_behaves_as_the_function():
    function = make(3.0)
    function.mark = "kept"
    copied = own_code(function)
    assert copied(1.0) == function(1.0) == 7.0 and copied(1.0, 2.0, scale=1.0) == 6.0
    assert copied.__code__ is not function.__code__ and copied.mark == "kept"
    assert copied.__qualname__ == function.__qualname__


def test_a_method_keeps_its_instance():
    class Number:
        value = 4

        def get(self):
            return self.value

    number = Number()
    copied = own_code(number.get)
    assert copied() == 4 and copied.__self__ is number
    assert copied.__func__.__code__ is not Number.get.__code__


@pytest.mark.parametrize("other", [torch.nn.ReLU(), functools.partial(max, 1)], ids=str)
def test_other_callables_are_returned_as_they_are(other):
    assert own_code(other) is other


def test_dynamo_counts_every_copy_by_itself():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    for offset in range(10):
        torch.compile(own_code(make(float(offset))), backend=backend)(torch.ones(2))
    assert len(graphs) == 10
