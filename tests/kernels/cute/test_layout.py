"""Which kernel may read which matrix, with sizes that are known and with symbolic ones."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cute_cases import LAYOUTS, matrix
from fos_compile.kernels import formats
from fos_compile.kernels.cute import layout

VECTOR = {
    "rows",
    "slice",
    "misaligned",
    "one for all",
    "batch",
    "batch of tiles",
    "batch slice",
    "batch inside",
    "misaligned batch",
}
BY_COLUMN = {"mT", "mT slice", "batch mT"}


@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_classes(name, dtype):
    x = matrix(name, dtype)
    assert layout.anything(x) == ""
    assert (layout.vector(x) == "") is (name in VECTOR)
    assert (layout.by_column(x) == "") is (name in BY_COLUMN)


def test_the_cases_cover_every_class():
    assert {"ragged", "narrow slice", "every second"} == set(LAYOUTS) - VECTOR - BY_COLUMN


@pytest.mark.parametrize("dtype,step", [(torch.float32, 4), (torch.float16, 8)])
def test_vectors_depend_on_the_dtype(dtype, step):
    assert layout.vector(torch.empty(3, 3 * step, dtype=dtype)) == ""
    reason = layout.vector(torch.empty(3, step + 2, dtype=dtype))
    assert reason == f"columns and strides must be known to be multiples of {step}"


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2, 2)])
def test_no_matrix(shape):
    for reads in (layout.anything, layout.vector, layout.by_column):
        assert reads(torch.empty(shape)) == f"x must be [R, C] or [B, R, C], got {list(shape)}"


def test_more_batches_than_a_grid_holds():
    x = torch.empty(1, 1, 64)
    assert layout.anything(x.expand(65535, 1, 64)) == ""
    for reads in (layout.anything, layout.vector, layout.by_column):
        assert "at most 65535 batches" in reads(x.expand(65536, 1, 64))
    assert layout.anything(torch.empty(65536, 64)) == ""


def test_reasons_name_the_strides():
    assert layout.vector(torch.empty(8, 8).mT) == "columns must be contiguous, got strides [1, 8]"
    assert layout.by_column(torch.empty(8, 8)) == "rows must be contiguous, got strides [8, 1]"


@pytest.fixture
def env():
    env = ShapeEnv()
    yield env
    assert not env.guards, "asking must not guard"


def symbolic(env, shape, dynamic):
    """A fake matrix, some of whose sizes are symbolic."""
    sizes = [DimDynamic.DYNAMIC if d else DimDynamic.STATIC for d in dynamic]
    return FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(shape, dtype=torch.bfloat16),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
        source=ConstantSource("x"),
    )


def test_symbolic_rows_and_batches_are_read_in_vectors(env):
    assert layout.vector(symbolic(env, (20, 64), (True, False))) == ""
    assert layout.vector(symbolic(env, (3, 20, 64), (True, True, False))) == ""


def test_symbolic_columns_are_not(env):
    x = symbolic(env, (20, 64), (False, True))
    assert "known to be multiples of 8" in layout.vector(x)
    assert layout.anything(x) == ""
    assert layout.by_column(x.mT) == ""


def test_a_symbolic_batch_is_taken_to_be_small(env):
    assert layout.anything(symbolic(env, (70000, 1, 64), (True, False, False))) == ""


def test_known_facts_of_symbolic_sizes(env):
    x = symbolic(env, (20, 64), (True, False))
    size = x.shape[0]
    assert layout.is_multiple(size * 128, 128) and not layout.is_multiple(size, 128)
    assert layout.is_value(size, size) and not layout.is_value(size, 20)
    assert layout.is_multiple(24, 8) and not layout.is_multiple(25, 8)
    assert layout.is_value(3, 3) and not layout.is_value(3, 4)
