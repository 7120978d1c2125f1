"""The benchmark of the quantizers, without a device: its cases are calls, its results survive."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import harness
import peer
import quantize
from fos_compile import kernels

ROW = quantize.Row(
    case="", shape="", us=2.0, spread=0.0, gb_s=1.0, of_copy=0.5, bound=None,
    over_static=None, over_empty_us=None, inductor_us=None,
)  # fmt: skip
CASES = quantize.cases()


@pytest.fixture
def cpu(monkeypatch):
    """The operators on the CPU, and no clock worth reading."""
    monkeypatch.setattr(quantize, "DEVICE", torch.device("cpu"))
    timing = harness.Timing(us=8.0, low_us=8.0, high_us=8.0)

    def measure(function, arguments, **_):
        function(*arguments[0])
        return timing

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness, "rotation", lambda make, **_: [make(0)])


def small(case):
    return dataclasses.replace(case, shape=(48, 64), count=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.shape}")
def test_every_case_is_a_call_of_its_operator(cpu, monkeypatch, case):
    monkeypatch.setattr(type(case.op), "supports", lambda *_, **__: True, raising=False)
    roof = harness.Roof(bytes_per_s=1e12, flops_per_s=1e12)
    row = quantize.run(small(case), roof=roof, static=4.0, empty_us=1.0, inductor=False)
    assert row.over_static == 2.0 and row.over_empty_us == 7.0 and 0 < row.of_copy
    assert row.inductor_us is None and row.peer_us is None


def test_no_case_is_measured_twice_and_the_bounds_come_early():
    assert len({(case.name, case.shape) for case in CASES}) == len(CASES)
    required = [n for n, case in enumerate(CASES) if case.bound and case.op is not kernels.AMAX]
    assert required[:3] == [1, 2, 3]
    for case in CASES:
        if case.name == "mse" and case.shape[0] > 128:
            before = CASES[: CASES.index(case)]
            assert any(c.name == "static_6" and c.shape == case.shape for c in before)


class Written:
    """Collects what measure_all writes."""

    def __init__(self):
        self.calls = []

    def __call__(self, rows, *, facts, show):
        self.calls.append((len(rows), dict(facts), show))


def measure_all(measure, in_time=lambda: True):
    written = Written()
    quantize.measure_all(CASES[:3], measure, in_time, written, {})
    return written.calls


def test_the_result_is_written_after_every_case():
    seen = []

    def measure(case, static):
        seen.append(static)
        return ROW

    calls = measure_all(measure)
    assert [count for count, _, _ in calls] == [1, 2, 3, 3]
    assert [show for _, _, show in calls] == [False, False, False, True]
    assert seen == [None, ROW.us, None]


def test_out_of_time_says_what_is_missing():
    calls = measure_all(lambda case, static: ROW, in_time=lambda: False)
    count, facts, show = calls[-1]
    assert count == 1 and show
    assert CASES[1].name in facts["not measured"] and CASES[2].name in facts["not measured"]


def test_a_failing_case_does_not_end_the_run():
    def measure(case, static):
        if case is CASES[1]:
            raise RuntimeError("no")
        return ROW

    count, facts, _ = measure_all(measure)[-1]
    assert count == 2 and facts["failed"] == f"mse {CASES[1].shape} (RuntimeError)"


def fake_peer(quantize_to_fp4):
    return peer.Peer(version="1", quantize=quantize_to_fp4, utils=Names, hadamard=lambda device: 0)


class Names:
    ScaleRule = RoundStyle = str


def test_the_peer_is_timed_and_compared(cpu):
    case = small(CASES[1])
    arguments = [case.make(case.shape, case.dtype)]
    _, scales = kernels.QUANTIZE.overload(*arguments[0])

    def same(x, amax, had, **options):
        assert options["scale_rule"] == "mse" and had is None
        return None, scales.view(torch.float8_e4m3fn), amax

    row = quantize.beside(ROW, case, arguments, fake_peer(same))
    assert (row.peer_us, row.peer_amax_us, row.peer_differs) == (8.0, 8.0, 0.0)


def test_a_peer_that_fails_leaves_the_row(cpu, capsys):
    case = small(CASES[2])

    def broken(*_, **__):
        raise ValueError("no such PTX")

    row = quantize.beside(ROW, case, [case.make(case.shape, case.dtype)], fake_peer(broken))
    assert row == ROW
    assert "no such PTX" in capsys.readouterr().out
