"""Host code of compiled kernels: what it launches, for which arguments, and what it refuses."""

from __future__ import annotations

import functools
import struct
import subprocess

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

from fos_compile.kernels.cute import build, host_quantize_filtered
from fos_compile.kernels.cute.tables import TABLES
from tests.emulator import operators, tensor_map
from tests.emulator.errors import ArgumentsError, EmulatorError, UnsupportedError
from tests.emulator.host import load
from tests.emulator.host.arguments import storage
from tests.emulator.host.library import linked
from tests.emulator.host.runtime import Runtime
from tests.emulator.kernels import copies, host_cases

FFI, PACKED = "--enable-tvm-ffi", ""
POINTER = struct.Struct("<Q")


@functools.cache
def every_argument(options, arch="sm_100a", shared_bytes=100_000, cluster=2):
    return load(host_cases.compile_every_argument(arch, shared_bytes, cluster, options))


def arguments(**changes):
    """Good ones for `every_argument`."""
    good = {
        "packed": torch.zeros(4, 32, dtype=torch.uint8),
        "scales": torch.zeros(64, dtype=torch.uint8),
        "result": torch.zeros(1),
        "sizes": (3, 7),
        "address": 0x1000,
        "scale": 2.5,
    }
    return tuple((good | changes).values())


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_elementwise(arch):
    host = load(copies.compile_add(arch), arch=arch)
    tensors = [torch.zeros(1000) for _ in range(3)]
    (launch,) = host.launches(*tensors)
    assert host.arch == arch
    assert launch.kernel in host.module.entries
    assert (launch.grid, launch.block, launch.cluster) == ((8, 1, 1), (128, 1, 1), (1, 1, 1))
    assert launch.shared_bytes == 0
    for raw, tensor in zip(launch.params, tensors, strict=True):
        assert struct.unpack_from("<Qi", raw) == (tensor.data_ptr(), 1000)
        assert len(raw) == 16


def test_a_stream_may_be_given_or_left_out():
    host = load(copies.compile_add("sm_100a"))
    tensors = [torch.zeros(10) for _ in range(3)]
    assert host.launches(*tensors)[0].grid == host.launches(*tensors, 0)[0].grid


def test_sizes_and_strides_of_a_view():
    host = load(copies.compile_strided("sm_100a"))
    x, y = torch.zeros(40, 60), torch.zeros(60, 40).T
    (launch,) = host.launches(x, y)
    assert launch.grid == (2, 10, 1)
    found = [struct.unpack("<Qiiqq", raw) for raw in launch.params]
    assert found == [(x.data_ptr(), 40, 60, 60, 1), (y.data_ptr(), 40, 60, 1, 40)]


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_every_kind_of_argument(options, capfd):
    good = arguments()
    first, second = every_argument(options).launches(*good)
    assert (first.grid, first.block, first.cluster) == ((8, 3, 1), (32, 1, 1), (2, 1, 1))
    assert first.shared_bytes == 100_000
    # 32 bytes hold 64 elements.
    assert first.params == (
        POINTER.pack(good[2].data_ptr()),
        struct.pack("<i", 64),
        struct.pack("<f", 2.5),
    )
    assert (second.grid, second.block, second.cluster) == ((1, 1, 1), (64, 2, 1), (1, 1, 1))
    assert second.params == (POINTER.pack(0x1000), struct.pack("<i", 7), struct.pack("<f", 2.5))
    assert not any(capfd.readouterr())


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_e2m1_in_its_own_dtype(options):
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    scales = torch.zeros(64, dtype=torch.float8_e4m3fn)
    same = arguments(packed=packed.view(torch.float4_e2m1fn_x2), scales=scales)
    assert every_argument(options).launches(*same)[0].grid == (8, 3, 1)


BAD = {
    "dtype": ({"packed": torch.zeros(4, 32)}, "argument 0 .packed.*float4_e2m1fn_x2 or torch.uint"),
    "rank": ({"packed": torch.zeros(32, dtype=torch.uint8)}, "rank 2 is required"),
    "no tensor": ({"packed": 3}, "a tensor is required, got int"),
    "no CPU tensor": (
        {"packed": torch.zeros(4, 32, dtype=torch.uint8, device="meta")},
        "a CPU tensor is required, got one on meta",
    ),
    "size": ({"packed": torch.zeros(4, 31, dtype=torch.uint8)}, "divisible by 16|multiple of 32"),
    "stride": (
        {"packed": torch.zeros(4, 64, dtype=torch.uint8)[:, ::2]},
        r"strides\[1\].*expected|stride 1 is required",
    ),
    "pointer's dtype": ({"scales": torch.zeros(4)}, "argument 1 .scales.*float8_e4m3fn"),
    "pointer's alignment": ({"scales": 8}, "16-byte alignment is required"),
    "no pointer": ({"scales": "x"}, "an address or a tensor is required"),
    "no tuple": ({"sizes": 3}, "a tuple of 2 values"),
    "short tuple": ({"sizes": (3,)}, "a tuple of 2 values"),
    "in a tuple": ({"sizes": (3, 1.5)}, "value 1 of argument 3 .sizes.*Int32 is required"),
    "no integer": ({"address": torch.zeros(1)}, "argument 4 .address.*Int64 is required"),
    "too large": ({"sizes": (3, 2**31)}, "does not fit in Int32"),
    "no number": ({"scale": "1"}, "Float32 is required, got str"),
}


@pytest.mark.parametrize("options", [FFI, PACKED])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(options, case):
    changes, message = BAD[case]
    with pytest.raises(ArgumentsError, match=message):
        every_argument(options).launches(*arguments(**changes))


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_wrong_number_of_arguments(options):
    host = every_argument(options)
    with pytest.raises(ArgumentsError, match=r"EveryArgument takes 6 arguments.*5 were given"):
        host.launches(*arguments()[:-1])
    assert host.launches(*arguments()), "a call after a failed one"


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_nothing_launched(options):
    host = load(host_cases.compile_maybe("sm_100a", options))
    result = torch.zeros(1)
    assert host.launches(result, 3)[0].grid == (3, 1, 1)
    with pytest.raises(ArgumentsError, match="launched no kernel"):
        host.launches(result, 0)


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_too_much_shared_memory_for_the_device(options):
    # Where that is noticed, when the kernel is loaded or when it is called, is the DSL's choice.
    with pytest.raises(EmulatorError, match=r"wants 120000 bytes.*101376"):
        every_argument(options, "sm_120a", 120_000, 1).launches(*arguments())


def test_without_its_ptx():
    from cutlass import Float32, cute
    from cutlass.cute.runtime import make_fake_stream

    tensors = [host_cases.make_fake_tensor(Float32, (10,), (1,)) for _ in range(3)]
    compiled = cute.compile(copies._add, *tensors, make_fake_stream(), options="--gpu-arch sm_100a")
    with pytest.raises(ArgumentsError, match="keep-ptx"):
        load(compiled)
    with pytest.raises(ArgumentsError, match=r"cute\.compile returned is required, got int"):
        load(3)
    with pytest.raises(ArgumentsError, match="compiled for sm_100a, sm_90a was asked for"):
        load(copies.compile_add("sm_100a"), arch="sm_90a")


def test_what_the_shim_does_not_know(tmp_path):
    source, unknown = tmp_path / "a.c", tmp_path / "a.o"
    source.write_text("int _cudaMalloc(); int f(void) { return _cudaMalloc(); }")
    subprocess.run(["cc", "-fPIC", "-c", source, "-o", unknown], check=True)
    with pytest.raises(UnsupportedError, match="_cudaMalloc"):
        linked(unknown.read_bytes())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("device_attribute", ([0], 17), "device attribute 17"),
        ("kernel_attribute", ([0], 3, 0), "attribute 3 of a kernel"),
        ("set_attribute", (0, 5, 1), "sets attribute 5"),
    ],
)
def test_questions_without_an_answer(name, values, message):
    runtime = Runtime(load(copies.compile_add("sm_100a")).module, 4)
    with pytest.raises(UnsupportedError, match=message), runtime.listening():
        code = runtime._guarded(getattr(runtime, f"_{name}"))(*values)
        assert code, "host code must see a failure"


def test_answers_depend_on_the_architecture():
    answers = {}
    for arch in ("sm_90a", "sm_100a", "sm_120a"):
        runtime = Runtime(load(copies.compile_add(arch)).module, 7)
        value = [0]
        runtime._device_attribute(value, 97)
        answers[arch] = value[0]
        runtime._device_attribute(value, 16)
        assert value[0] == 7
    assert answers == {"sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_quantizer_of_the_project(arch, tmp_path):
    """Launched by the project's own code, with the host code in the place of the kernel."""
    options = ("nvfp4", "static_6", "nearest", "1d", False, False)
    key = TABLES["quantize"][0].key(torch.bfloat16, options)
    extra = f"--keep-ptx --generate-line-info --dump-dir {tmp_path}"
    host = load(build.compiled(key, arch, extra))
    assert ".loc" in host.ptx
    launches = []
    x = torch.zeros(1, 256, 128, dtype=torch.bfloat16)
    amax = torch.ones(1)
    run = host_quantize_filtered.prepare(
        lambda *given: launches.extend(host.launches(*given)), 132, key, x
    )
    values, scales = run(x, amax)
    (launch,) = launches
    # 2 bands of 128 rows, 16 CTAs a band for every 4 chunks of 64 columns.
    assert (launch.grid, launch.block, launch.shared_bytes) == ((32, 1, 1), (128, 1, 1), 0)
    assert struct.unpack_from("<Qiii", launch.params[0]) == (x.data_ptr(), 1, 256, 128)
    addresses = [POINTER.unpack(raw)[0] for raw in launch.params[1:4]]
    assert addresses == [amax.data_ptr(), values.data_ptr(), scales.data_ptr()]
    with pytest.raises(ArgumentsError, match="expected data alignment=16"):
        host.launches(x[:, :, 1:], *addresses, 0, 1, 0)


@pytest.mark.parametrize("options", [FFI, PACKED])
def test_nvidia_gemm(options):
    pytest.importorskip("cutlass.operators", reason="nvidia-cutlass-operators is not installed")
    case = operators.problem(256, 256, 512)
    out = torch.empty(1, 256, 256, dtype=torch.bfloat16)
    host = operators.host(operators.Configuration(128, 64, (2, 1)), 4, options=options)
    (launch,) = host.launches(*case.arguments(out))
    assert (launch.grid, launch.block, launch.cluster) == ((2, 1, 4), (192, 1, 1), (2, 1, 1))
    assert launch.shared_bytes == 226304
    maps = [tensor_map.decode(raw) for raw in launch.params if len(raw) == 128]
    tensors = (case.a, case.b, case.sfa, case.sfb, out)
    assert [each.address for each in maps] == [tensor.data_ptr() for tensor in tensors]
    assert [each.dims for each in maps] == [
        (512, 256, 1),
        (512, 256, 1),
        (256, 8, 2, 1),
        (256, 8, 2, 1),
        (256, 256, 1),
    ]
    # Each CTA of the pair loads half of the 64 rows of B, for both.
    assert [each.box for each in maps[:2]] == [(256, 128, 1), (256, 32, 1)]


@pytest.mark.parametrize(
    ("n", "cluster", "grid"),
    [(128, (2, 1), (2, 1, 2)), (128, (2, 2), (2, 2, 1)), (192, (2, 1), (2, 1, 2))],
)
def test_nvidia_gemm_of_two_ctas_a_tile(n, cluster, grid):
    pytest.importorskip("cutlass.operators", reason="nvidia-cutlass-operators is not installed")
    host = operators.host(operators.Configuration(256, n, cluster), 4)
    case = operators.problem(256, 256, 512)
    out = torch.empty(1, 256, 256, dtype=torch.bfloat16)
    (launch,) = host.launches(*case.arguments(out))
    assert (launch.grid, launch.block) == (grid, (192, 1, 1))
    assert launch.cluster == (*cluster, 1)


def test_operands():
    case = operators.problem(40, 136, 96, 2)
    numbers = (0, 0.5, 1, 1.5, 2, 3, 4, 6)

    def element(values, scales, batch, row, k):
        code = int(values[batch, row, k // 2]) >> 4 * (k % 2) & 15
        block, line = k // 16, row % 128
        at = 16 * (line % 32) + 4 * (line // 32) + block % 4
        tiles = scales.view(2, -1, scales[0].numel() // (-(-values.shape[1] // 128) * 512), 512)
        scale = tiles[batch, row // 128, block // 4, at].view(torch.float8_e4m3fn)
        return (-1) ** (code >> 3) * numbers[code & 7] * float(scale)

    for batch, m, n in ((0, 0, 0), (1, 39, 135), (1, 33, 64)):
        expected = sum(
            element(case.a, case.sfa, batch, m, k) * element(case.b, case.sfb, batch, n, k)
            for k in range(96)
        )
        assert case.exact[batch, m, n] == expected


def test_storage():
    base = torch.zeros(10, 8, dtype=torch.int16)
    for view in (base, base[2:4, 1:3], base[::3, 5], base[:, 1:2].expand(10, 4), base.T, base[:0]):
        address, owned = storage(view)
        expected = torch.zeros(base.numel(), dtype=torch.bool)
        index = torch.arange(base.numel()).as_strided(
            view.shape, view.stride(), view.storage_offset()
        )
        expected[index.reshape(-1)] = True
        start = view.storage_offset()
        assert address == view.data_ptr()
        found = torch.zeros(2 * base.numel(), dtype=torch.bool)
        found[2 * start : 2 * start + len(owned)] = owned
        assert torch.equal(found, expected.repeat_interleave(2))
