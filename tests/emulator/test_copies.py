"""Rung 1: loads, stores, shared memory, shuffles, atomics, divergence, clusters, against torch."""

from __future__ import annotations

import pytest
import torch
from cutlass import Float16, Float32, Int8, Int64

from tests.emulator.emulate import emulate
from tests.emulator.kernels import copies
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import host

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")
SCHEDULES = (Settings(), Settings(mode="random", schedule="random", seed=5))

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def _kernel(name, *options):
    return host(getattr(copies, f"compile_{name}"), *options)


def _padded(rows, columns, dtype=torch.float32):
    """A matrix with gaps between rows and elements, and the buffer that it is in."""
    buffer = torch.full((rows, 3 * columns + 5), 7).to(dtype)
    return buffer[:, 1 : 3 * columns : 3], buffer


def _integers(*shape, low=-1000, high=1000):
    return torch.randint(low, high, shape, dtype=torch.int32)


@pytest.mark.parametrize("n", [1, 31, 32, 127, 128, 129, 1000])
def test_add(arch, n):
    a, b, c = torch.randn(n), torch.randn(n), torch.empty(n)
    kept = a.clone(), b.clone()
    run = emulate(_kernel("add", arch), a, b, c, outputs=[c])
    assert torch.equal(c, a + b)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])
    (launch,) = run.launches
    assert launch.grid == (-(-n // 128), 1, 1)
    assert (launch.block, launch.cluster) == ((128, 1, 1), (1, 1, 1))


def test_cost_is_linear_in_ctas(arch):
    counts = []
    for ctas in (1, 2, 6):
        a, b, c = (torch.zeros(128 * ctas) for _ in range(3))
        counts.append(emulate(_kernel("add", arch), a, b, c, outputs=[c]).executed)
    assert counts == [counts[0], 2 * counts[0], 6 * counts[0]]


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        (torch.float32, Float32),
        (torch.float16, Float16),
        (torch.int8, Int8),
        (torch.int64, Int64),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 32), (37, 45)])
def test_strided_copies_keep_to_their_elements(arch, shape, dtype, element):
    kernel = _kernel("strided", arch, element)
    x, _ = _padded(*shape, dtype)
    x.copy_(torch.randint(-100, 100, shape))
    y, buffer = _padded(*shape, dtype)
    before = buffer.clone()
    emulate(kernel, x, y, outputs=[y])
    assert torch.equal(y, x)
    before[:, 1 : 3 * shape[1] : 3] = x
    assert torch.equal(buffer, before), "gaps were written"


def test_strided_copies_of_transposed_and_broadcast_views(arch):
    kernel = _kernel("strided", arch)
    x, y = torch.randn(21, 40), torch.empty(21, 40)
    emulate(kernel, x.t(), y.t(), outputs=[y.t()])
    assert torch.equal(y, x)
    row, y = torch.randn(40), torch.empty(21, 40)
    emulate(kernel, row.expand(21, 40), y, outputs=[y])
    assert torch.equal(y, row.expand(21, 40))


@pytest.mark.parametrize("n", [4, 512, 516, 1028])
def test_vectors(arch, n):
    x, y = torch.randn(n), torch.empty(n)
    kernel = _kernel("vectors", arch)
    opcodes = {line.split()[0] for line in kernel.module.lines if "global" in line}
    kind = "v4.b32" if arch == "sm_90a" else "v2.b64"
    assert {f"ld.global.{kind}", f"st.global.{kind}"} <= opcodes
    emulate(kernel, x, y, outputs=[y])
    assert torch.equal(y, x)


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 70)])
def test_transpose(arch, shape, settings):
    x, _ = _padded(*shape)
    x.copy_(torch.randn(shape))
    y = torch.empty(shape[::-1])
    emulate(_kernel("transpose", arch), x, y, outputs=[y], settings=settings)
    assert torch.equal(y, x.t())


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize(("n", "count"), [(1, 1), (1000, 128), (1000, 300)])
def test_sums(arch, n, count, settings):
    """Of integers, which float32 adds exactly in any order."""
    x = _integers(n).float()
    sums = torch.empty(-(-n // count))
    emulate(_kernel("sums", arch), x, sums, count, outputs=[sums], settings=settings)
    padded = torch.nn.functional.pad(x, (0, len(sums) * count - n))
    assert torch.equal(sums, padded.view(-1, count).sum(1))


@pytest.mark.parametrize("n", [1, 128, 300])
def test_votes(arch, n):
    x = _integers(n)
    positive, largest = (torch.empty(n, dtype=torch.int32) for _ in range(2))
    emulate(_kernel("votes", arch), x, positive, largest, outputs=[positive, largest])
    warps = torch.nn.functional.pad(x, (0, -n % 32)).view(-1, 32)
    assert torch.equal(positive, (warps > 0).sum(1).int().repeat_interleave(32)[:n])
    expected = warps.amax(1)
    if n % 32:
        expected[-1].clamp_(min=0)
    assert torch.equal(largest, expected.repeat_interleave(32)[:n])


@pytest.mark.parametrize("settings", SCHEDULES)
def test_histogram(arch, settings):
    x = _integers(700, low=0, high=64)
    counts = _integers(64)
    expected = counts + torch.bincount(x, minlength=64).int()
    emulate(_kernel("histogram", arch), x, counts, settings=settings)
    assert torch.equal(counts, expected)


def _collatz(number):
    steps = 0
    while number != 1:
        number, steps = number // 2 if number % 2 == 0 else 3 * number + 1, steps + 1
    return steps


@pytest.mark.parametrize("settings", SCHEDULES)
def test_loops_of_every_lane_own_length(arch, settings):
    x = _integers(130, low=1, high=100)
    steps = torch.empty_like(x)
    emulate(_kernel("collatz", arch), x, steps, outputs=[steps], settings=settings)
    assert steps.tolist() == [_collatz(number) for number in x.tolist()]


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("barrier", ["cluster", "mbarrier"])
def test_exchange_between_ctas(arch, barrier, settings):
    x = _integers(768)
    y = torch.empty_like(x)
    run = emulate(_kernel("exchange", arch, barrier), x, y, outputs=[y], settings=settings)
    assert torch.equal(y, x.view(3, 2, 128).flip(1).reshape(-1))
    assert run.launches[0].cluster == (2, 1, 1)
