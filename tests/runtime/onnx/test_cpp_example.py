"""Our declarations of ONNX Runtime's C API: the C++ example built with them, and nothing untested."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sparse_models import close, expected, model_of, packed

from zeroskip.runtime.kernels import compilers
from zeroskip.runtime.onnx.custom_ops import custom_ops_path

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "onnxruntime" / "cpp"
KERNELS = ROOT / "runtime" / "kernels" / "cpu"
HEADER = KERNELS / "onnxruntime_abi.h"
COMPILER = compilers.find_compiler()

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def runtime_library() -> Path:
    """Returns the shared library of ONNX Runtime inside its wheel."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    found = [*folder.glob("libonnxruntime.so*"), *folder.glob("libonnxruntime*.dylib")]
    if not found:
        pytest.skip("this wheel of ONNX Runtime has no library that a program can link")
    return found[0]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built as its CMakeLists.txt does it."""
    if not shutil.which("cmake"):
        pytest.skip("there is no cmake")
    folder = tmp_path_factory.mktemp("cpp")
    library = runtime_library()
    # The program looks the library up by the name inside it, which a wheel does not provide.
    name = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=False
    ).stdout
    if soname := re.search(r"SONAME.*\[(.*)\]", name):
        (folder / soname[1]).symlink_to(library)
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(folder), f"-DONNXRUNTIME_LIBRARY={library}",
         f"-DCMAKE_BUILD_RPATH={folder}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"],
        ["cmake", "--build", str(folder)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_sparse"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the example."""
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_cpp_example_computes_the_product(
    program: Path, dtype: torch.dtype, rows: int, tmp_path: Path
) -> None:
    weight = packed(33, 200, dtype)
    onnx.save(model_of(weight, rank=2, function=False), tmp_path / "model.onnx")
    done = run(program, tmp_path / "model.onnx", custom_ops_path(), 200, rows)
    assert done.returncode == 0, done.stderr
    x = (np.arange(rows * 200) % 7 - 3).astype(np.float32).reshape(rows, 200)
    found = np.array([float(line) for line in done.stdout.split()], np.float32).reshape(rows, 33)
    assert close(found, expected(weight, x))


@needs_compiler
def test_the_cpp_example_reports_a_malformed_model(program: Path, tmp_path: Path) -> None:
    model = model_of(packed(33, 200), rank=2, function=False)
    next(a for a in model.graph.node[0].attribute if a.name == "N").i = 34
    onnx.save(model, tmp_path / "model.onnx")
    done = run(program, tmp_path / "model.onnx", custom_ops_path(), 200)
    assert done.returncode == 1
    assert "SparseLinear 'fc': bitmask has shape" in done.stderr


def test_the_python_example_runs() -> None:
    script = ROOT / "examples" / "onnxruntime" / "python" / "run_sparse.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "from the dense product" in done.stdout


def table() -> dict[str, int]:
    """Returns the functions that the header declares in OrtApi, and their places."""
    text = HEADER.read_text(encoding="utf-8")
    body = text[text.index("struct OrtApi {") :]
    body = body[: body.index("\n};")]
    places: dict[str, int] = {}
    place = 0
    for name, first, count in re.findall(r"ORT_API_CALL\* (\w+)\)|reserved(\d+)\[(\d+)\]", body):
        if name:
            places[name] = place
            place += 1
        else:
            assert int(first) == place, f"reserved{first} stands at {place}"
            place += int(count)
    return places


# Of ONNX Runtime's own header; the table only grows at its end, so they hold for every version.
KNOWN = {
    "CreateStatus": 0,
    "CreateSession": 7,
    "Run": 9,
    "CreateCustomOpDomain": 26,
    "GetTensorMutableData": 51,
    "KernelInfoGetAttribute_int64": 86,
    "ReleaseCustomOpDomain": 101,
    "RegisterCustomOpsLibrary_V2": 228,
    "KernelInfoGetConstantInput_tensor": 249,
    "KernelContext_GetAllocator": 253,
    "KernelContext_ParallelFor": 274,
}


def test_functions_lie_where_the_runtime_has_them() -> None:
    found = table()
    assert {name: found[name] for name in KNOWN} == KNOWN


def test_every_declared_function_is_called() -> None:
    """The other tests run this code, so a wrong place shows."""
    sources = [*KERNELS.glob("onnxruntime_*.cpp"), KERNELS / "onnxruntime_runtime.h"]
    text = "".join(path.read_text(encoding="utf-8") for path in [*sources, EXAMPLE / "main.cpp"])
    assert [name for name in table() if not re.search(rf"api_?->{name}\b", text)] == []


class ApiBase(ctypes.Structure):
    """An OrtApiBase."""

    _fields_ = (
        ("get_api", ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)),
        ("get_version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


def test_the_installed_runtime_answers_at_these_places() -> None:
    """Calls what needs no model, on the table itself."""
    library = ctypes.CDLL(str(runtime_library()))
    library.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
    base = library.OrtGetApiBase().contents
    assert base.get_version().decode() == onnxruntime.__version__
    api, places = base.get_api(17), table()

    def call(name: str, result: type | None, *arguments: object) -> object:
        types = [ctypes.c_int64 if isinstance(a, int) else type(a) for a in arguments]
        return ctypes.CFUNCTYPE(result, *types)(api[places[name]])(*arguments)

    text = ctypes.c_char_p
    pointer = ctypes.c_void_p
    status = pointer(call("CreateStatus", pointer, 2, text(b"what went wrong")))  # type: ignore[arg-type]
    assert call("GetErrorMessage", text, status) == b"what went wrong"
    call("ReleaseStatus", None, status)

    memory, value, info = pointer(), pointer(), pointer()
    assert call("CreateCpuMemoryInfo", pointer, 1, 0, ctypes.pointer(memory)) is None
    data, shape = (ctypes.c_float * 6)(*range(6)), (ctypes.c_int64 * 2)(2, 3)
    made = call(
        "CreateTensorWithDataAsOrtValue",
        pointer, memory, ctypes.pointer(data), 24, ctypes.pointer(shape), 2, 1, ctypes.pointer(value),
    )  # fmt: skip
    assert made is None
    assert call("GetTensorTypeAndShape", pointer, value, ctypes.pointer(info)) is None
    kind, rank, dims, where = ctypes.c_int(), ctypes.c_size_t(), (ctypes.c_int64 * 2)(), pointer()
    assert call("GetTensorElementType", pointer, info, ctypes.pointer(kind)) is None
    assert call("GetDimensionsCount", pointer, info, ctypes.pointer(rank)) is None
    assert call("GetDimensions", pointer, info, ctypes.pointer(dims), 2) is None
    assert call("GetTensorMutableData", pointer, value, ctypes.pointer(where)) is None
    assert (kind.value, rank.value, list(dims)) == (1, 2, [2, 3])
    assert where.value == ctypes.addressof(data)
    call("ReleaseTensorTypeAndShapeInfo", None, info)
    call("ReleaseValue", None, value)
    call("ReleaseMemoryInfo", None, memory)

    domain = pointer()
    assert call("CreateCustomOpDomain", pointer, text(b"test"), ctypes.pointer(domain)) is None
    call("ReleaseCustomOpDomain", None, domain)
