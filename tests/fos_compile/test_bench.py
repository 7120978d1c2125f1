"""`bench matmul` on the CPU: it times what works, and says what does not."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

from fos_compile.bench import cases, matmul, mlp, providers, tuning
from fos_compile.bench.cases import Shape
from fos_compile.bench.providers import Provider
from fos_compile.cli import app
from fos_compile.kernels.errors import InvalidArgument

CPU = torch.device("cpu")
SHAPE = Shape(130, 72, 96)


def command(*arguments):
    return CliRunner().invoke(app, ["bench", "matmul", *arguments], env={"COLUMNS": "400"})


def fake(multiply, name="fake"):
    return Provider(name, lambda given: (multiply, "a fake"), lambda *_: "")


def product(given):
    return torch.ops.fos.scaled_mm(*given.packed, **given.sizes)


def raising(given):
    raise RuntimeError("launch failed\nin line 2")


def zeroed(given):
    return torch.zeros_like(product(given))


def in_one_place(given):
    out = product(given)
    out[-1, -1] += 0.1 + out.abs().max() / 64
    return out


BAD = {
    "raises": (raising, "RuntimeError: launch failed"),
    "zeros": (zeroed, "error budget"),
    "NaN": (lambda given: product(given) * float("nan"), "off by nan"),
    "slightly wrong": (lambda given: product(given) * 1.02, "error budget"),
    "one element": (in_one_place, "error budget"),
    "another shape": (lambda given: product(given)[:-1], "instead of bfloat16 [130, 72]"),
    "another type": (lambda given: product(given).half(), "returns float16"),
    "nothing": (lambda given: None, "returns NoneType"),
}


def test_the_command(tmp_path):
    md, numbers = tmp_path / "m.md", tmp_path / "m.csv"
    result = command("--quick", "--no-mlp", "--tune", "--device", "cpu",
                     "--md", str(md), "--csv", str(numbers))  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(numbers.open()))
    assert {row["shape"] for row in rows} == {str(each) for each in cases.QUICK}
    assert {"bf16 torch.mm", "fos::scaled_mm"} <= {row["provider"] for row in rows}
    assert all(float(row["us"]) > 0 for row in rows)
    text = md.read_text()
    assert "versions: python" in text and "device: CPU" in text
    assert "8x256x128, cuBLASLt: not here: needs a GPU" in text
    assert "8x256x128, tuning: not here: needs a GPU" in text
    assert "100x72x96, fos::scaled_mm: passed" in text


def test_the_command_fails_where_a_provider_does(monkeypatch):
    monkeypatch.setattr(matmul, "everything", lambda: (fake(raising, "broken"),))
    result = command("--quick", "--no-mlp", "--device", "cpu")
    assert result.exit_code == 1
    assert "broken: FAILED: RuntimeError: launch failed" in result.output
    assert "Nothing was timed" in result.output


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_providers_of_a_cpu_agree(format):
    report = matmul.run([SHAPE], device=CPU, format=format, seconds=0)
    assert not report.failures
    tested = [line for line in report.log if line.endswith(": passed")]
    assert len(tested) == 3


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_not_timed(name):
    multiply, reason = BAD[name]
    pair = (fake(multiply, "bad"), fake(product, "good"))
    report = matmul.run([SHAPE], device=CPU, seconds=0, providers=pair)
    assert [row.provider for row in report.rows] == ["good"]
    (failure,) = report.failures
    assert failure.startswith("130x72x96, bad: FAILED") and reason in failure


def test_numbers_of_a_row():
    report = matmul.run([SHAPE], device=CPU, seconds=0)
    first, second = report.rows[:2]
    assert first.tflops == pytest.approx(2 * 130 * 72 * 96 / first.us / 1e6)
    assert second.of_bf16 == pytest.approx(second.us / first.us)
    assert second.of_peak is None


def test_shapes():
    assert cases.parse("decode")[0].m == 1
    assert cases.parse("7x8x9,quick,7x8x9") == (Shape(7, 8, 9), *cases.QUICK)
    assert {each.m for each in cases.DECODE} == {1, 8, 16, 64}
    for wrong in ("", "1x2", "0x1x1", "1x2x3x4", "axbxc", "large", "-1x2x3"):
        with pytest.raises(InvalidArgument, match="MxNxK"):
            cases.parse(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "5x5"), "MxNxK"),
        (("--shapes", ""), "MxNxK"),
        (("--format", "fp8"), "nvfp4, mxfp4"),
        (("--quick", "--md", "/no/such/folder/m.md"), "a folder that exists"),
        (("--quick", "--md", "/"), "a folder that exists"),
        (("--device", "tpu"), "--device must be one of"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cpu", (), cases.QUICK),
        ("cuda", (), (*cases.SQUARES, *cases.MLP, *cases.DECODE)),
        ("cuda", ("--quick",), cases.QUICK),
        ("cpu", ("--shapes", "5x6x7"), (Shape(5, 6, 7),)),
    ],
)
def test_default_shapes(device, arguments, expected, monkeypatch):
    asked = []

    def fake_run(shapes, **options):
        asked.append(shapes)
        return matmul.Report([], [])

    monkeypatch.setattr(matmul, "run", fake_run)
    monkeypatch.setattr(matmul, "header", lambda device: {})
    monkeypatch.setattr("fos_compile.bench.command.default_device", lambda: torch.device(device))
    result = command("--no-mlp", *arguments)
    assert result.exit_code == 0, result.output
    assert asked == [expected]


def test_large_shapes_are_left_out():
    fits, large = cases.limited([Shape(8, 8, 8), Shape(1 << 20, 1 << 20, 64)], 1 << 30)
    assert fits == [Shape(8, 8, 8)] and len(large) == 1


def test_what_other_devices_refuse(monkeypatch):
    by_name = {each.name: each for each in providers.everything()}
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "10.0" in by_name["cuBLASLt"].refuses(SHAPE, cuda, "nvfp4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "N a multiple of 16" in by_name["cuBLASLt"].refuses(SHAPE, cuda, "nvfp4")
    assert not by_name["cuBLASLt"].refuses(Shape(1, 64, 100), cuda, "nvfp4")  # K is padded
    assert not by_name["cuBLASLt"].refuses(Shape(1, 64, 64), cuda, "nvfp4")
    assert "nvfp4 alone" in by_name["cuBLASLt"].refuses(Shape(1, 64, 64), cuda, "mxfp4")


@pytest.mark.parametrize("tile", [((128, 64), (1, 1)), ((256, 128), (2, 2))], ids=str)
def test_our_launch_calls_what_it_compiles(tile, monkeypatch, tmp_path):
    """The compiled code looks at the number, the order and the types of arguments, then at where
    they are."""
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
    from fos_compile.kernels import target
    from fos_compile.kernels.cute.matmul_tiles import Choice

    monkeypatch.setenv("FOS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(target, "arch", lambda device: "sm_100a")
    monkeypatch.setattr(providers, "_num_sms", lambda device: 148)
    given = cases.operands(SHAPE, device=CPU)
    multiply = providers.our_launch(given, Choice(*tile))
    with pytest.raises(ValueError, match="device_type=cuda"):
        multiply(given)


def test_ours_takes_the_chosen_tile(monkeypatch):
    from fos_compile.kernels import target
    from fos_compile.kernels.cute import matmul_tiles

    monkeypatch.setattr(target, "arch", lambda device: "sm_100a")
    monkeypatch.setattr(providers, "_num_sms", lambda device: 148)
    launched = []
    monkeypatch.setattr(providers, "our_launch", lambda given, choice: launched.append(choice))
    _, what = providers._ours(cases.operands(SHAPE, device=CPU))
    given = {"format": "nvfp4", "dtype": torch.bfloat16, "arch": "sm_100a", "num_sms": 148}
    assert launched == [matmul_tiles.choose(130, 72, 96, **given)]
    assert what.startswith(f"{launched[0]}, ") and what.endswith("bytes in flight an SM")


def test_copies_are_other_memory_and_equal():
    given = cases.operands(SHAPE, device=CPU)
    (first,), (second,), *_ = cases.rotated(given)
    assert first.a is given.a and second.a.data_ptr() != given.a.data_ptr()
    assert torch.equal(second.a, given.a) and torch.equal(product(second), product(given))


def test_cublaslt_is_called_as_torch_wants():
    """By the checks that torch makes of fake tensors: types, recipes, sizes of scales."""
    given = cases.operands(Shape(130, 64, 160), device=CPU)
    with FakeTensorMode() as mode:
        names = [each.name for each in dataclasses.fields(given)]
        tensors = {name: getattr(given, name) for name in names}
        fakes = {name: mode.from_tensor(each) for name, each in tensors.items()
                 if isinstance(each, torch.Tensor)}  # fmt: skip
        faked = dataclasses.replace(given, **fakes)
        multiply, _ = providers._cublaslt(faked)
        out = multiply(faked)
    assert out.shape == (130, 64) and out.dtype is torch.bfloat16


def test_the_peak_is_of_the_device(monkeypatch):
    class B200:
        multi_processor_count = 148

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: B200)
    assert matmul.peak(torch.device("cuda", 0)) == pytest.approx(9e15, rel=0.02)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert matmul.peak(torch.device("cuda", 0)) is None
    assert matmul.peak(CPU) is None


def test_tuning_goes_on_after_a_failure(monkeypatch):
    ours = Provider("ours", lambda given: (product, ""), lambda *_: "")
    monkeypatch.setattr(tuning, "everything", lambda: (ours,))

    def failing(shape, device, format):
        if shape.m == 1:
            raise RuntimeError("no choice works")
        return "128x64 won"

    monkeypatch.setattr(tuning, "_tune", failing)
    lines = tuning.tune_all([Shape(1, 2, 3), Shape(2, 2, 3)], device=CPU, format="nvfp4")
    assert lines == [
        "1x2x3, tuning: FAILED: RuntimeError: no choice works",
        "2x2x3, tuning: 128x64 won",
    ]


def test_the_mlp(monkeypatch):
    monkeypatch.setattr(mlp, "TINY", (64, 64, 64))
    bf16, training = matmul.mlp_rows(CPU, 0)
    assert (bf16.provider, training.provider) == ("bf16, Inductor", "training")
    assert bf16.of_bf16 == 1 and training.us > 0
