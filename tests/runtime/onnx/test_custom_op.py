"""The operator in ONNX Runtime: registration, memory, threads, and what it refuses."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data
from sparse_models import TYPES, close, expected, inputs, limit_of, model_of, packed, run, session

from zeroskip.ir.errors import ArtifactError, CompileError
from zeroskip.runtime.onnx import custom_ops
from zeroskip.runtime.onnx.custom_ops import (
    DenseFallbackWarning,
    custom_ops_path,
    session_options,
    uses_sparse_linear,
    warn_dense_fallback,
)

Edit = Callable[[onnx.ModelProto], object]


def constant(model: onnx.ModelProto, part: str) -> TensorProto:
    """Returns a constant of the only node."""
    return next(tensor for tensor in model.graph.initializer if tensor.name == f"fc.{part}")


def put(model: onnx.ModelProto, part: str, array: np.ndarray) -> None:
    """Replaces a constant of the only node."""
    constant(model, part).CopyFrom(numpy_helper.from_array(array, f"fc.{part}"))


def get(model: onnx.ModelProto, part: str) -> np.ndarray:
    """Returns a copy of a constant of the only node."""
    return numpy_helper.to_array(constant(model, part)).copy()


def set_attribute(model: onnx.ModelProto, name: str, value: int) -> None:
    """Changes an attribute of the only node."""
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value


def external(model: onnx.ModelProto, folder: Path, *, misalign: int = 0) -> Path:
    """Writes every constant to one file, each `misalign` bytes behind a multiple of 4096."""
    with open(folder / "model.data", "wb") as file:
        for tensor in model.graph.initializer:
            file.seek(-(-file.tell() // 4096) * 4096 + misalign)
            start, size = file.tell(), len(tensor.raw_data)
            file.write(tensor.raw_data)
            set_external_data(tensor, "model.data", offset=start, length=size)
            tensor.ClearField("raw_data")
        file.write(bytes(1))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_the_optimized_graph_keeps_the_node(tmp_path: Path) -> None:
    session(model_of(packed(64, 100)), optimized=tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert [node.op_type for node in optimized.graph.node] == ["SparseLinear"]


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 17, 130])
def test_kernels_compute_the_product(dtype: torch.dtype, m: int, layout: int) -> None:
    weight = packed(130, 200, dtype)
    x = inputs(1, m, 200)
    found = run(session(model_of(weight, layout=layout), threads=2), x)
    assert close(found, expected(weight, x), limit_of(dtype))


def test_scales_and_bias_may_be_left_out() -> None:
    weight = packed(20, 100)
    x = inputs(1, 4, 100)
    for kept_inputs in (4, 5):
        model = model_of(weight, function=False)
        del model.graph.node[0].input[kept_inputs:]
        assert close(run(session(model), x), expected(weight, x))


def test_optional_attributes_may_be_left_out() -> None:
    weight = packed(20, 100)
    model = model_of(weight, function=False)
    kept = [a for a in model.graph.node[0].attribute if a.name in ("K", "N")]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    x = inputs(1, 4, 100)
    assert close(run(session(model), x), expected(weight, x))


@pytest.mark.parametrize("parts", [["values"], ["bitmask", "row_offsets", "values", "bias"]])
def test_weights_may_be_inputs_of_the_graph(parts: list[str]) -> None:
    weight = packed(20, 100)
    model = model_of(weight, bias=torch.randn(20), function=False)
    feeds = {"X": inputs(2, 3, 100)}
    for part in parts:
        tensor, array = constant(model, part), get(model, part)
        shape: list[int | str] = [f"{part}{i}" for i in range(array.ndim)]
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
        model.graph.input.append(info)
        feeds[tensor.name] = array
    wanted = run(session(model_of(weight, bias=torch.from_numpy(get(model, "bias")))), feeds["X"])
    for part in parts:
        model.graph.initializer.remove(constant(model, part))
    opened = session(model)
    (found,) = opened.run(None, feeds)
    assert np.array_equal(found, wanted)
    feeds["fc.values"] = feeds["fc.values"][:70]
    with pytest.raises(Exception, match=r"SparseLinear 'fc'.*values"):
        opened.run(None, feeds)
    feeds["fc.values"] = get(model_of(weight), "values")
    assert np.array_equal(opened.run(None, feeds)[0], wanted)


@pytest.mark.parametrize("misalign", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", TYPES)
def test_external_data_that_is_not_aligned_is_right(
    dtype: torch.dtype, misalign: int, tmp_path: Path
) -> None:
    weight = packed(64, 100, dtype)
    path = external(model_of(weight, bias=torch.ones(64)), tmp_path, misalign=misalign)
    x = inputs(1, 4, 100)
    assert close(run(session(path), x), expected(weight, x, torch.ones(64)))


MEMORY = """
import sys, onnxruntime
from zeroskip.runtime.onnx.custom_ops import session_options

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

options = session_options()
options.intra_op_num_threads = 1
before = kilobytes("RssAnon")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(kilobytes("RssAnon") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize(("misalign", "copied"), [(0, False), (2, True)])
def test_mapped_weights_are_not_copied(misalign: int, copied: bool, tmp_path: Path) -> None:
    weight = packed(4096, 5120, density=0.9)
    megabytes = weight.nbytes / 1e6
    assert megabytes > 64
    path = external(model_of(weight), tmp_path, misalign=misalign)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout) / 1e3
    # What is not aligned is copied, which shows that the measurement sees copies.
    assert (grown > 0.8 * megabytes) if copied else (grown < 0.15 * megabytes)


def test_two_sessions_and_many_threads_at_once() -> None:
    weights = [packed(200, 300, torch.int8), packed(150, 300, torch.bfloat16)]
    sessions = [
        session(model_of(weights[0], accuracy_level=4), threads=2),
        session(model_of(weights[1])),
    ]
    xs = [inputs(1, m, 300, seed=m) for m in (1, 3, 20, 64)]
    wanted = [[run(opened, x) for x in xs] for opened in sessions]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        for _ in range(30):
            i, j = int(order.integers(2)), int(order.integers(len(xs)))
            if not np.array_equal(run(sessions[i], xs[j]), wanted[i][j]):
                wrong.append(f"session {i}, input {j}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sessions_come_and_go_in_many_threads() -> None:
    weight = packed(20, 100)
    data = model_of(weight).SerializeToString()
    x = inputs(1, 2, 100)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert close(run(session(onnx.load_from_string(data)), x), expected(weight, x))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_the_threads_are_those_of_the_session(tmp_path: Path) -> None:
    opened = session(model_of(packed(2048, 512)), threads=1)
    x = inputs(1, 64, 512)
    run(opened, x)
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("counts threads in /proc")
    before = len(list(tasks.iterdir()))
    run(opened, x)
    assert len(list(tasks.iterdir())) == before


def decreasing_offsets(model: onnx.ModelProto) -> None:
    offsets = get(model, "row_offsets")
    offsets[3] = offsets[2] - 1
    put(model, "row_offsets", offsets)


def huge_offsets(model: onnx.ModelProto) -> None:
    offsets = get(model, "row_offsets")
    offsets[1:] = np.iinfo(np.int64).max
    put(model, "row_offsets", offsets)


def bit_beyond(model: onnx.ModelProto) -> None:
    bitmask = get(model, "bitmask")
    bitmask[0, -1] |= 128
    put(model, "bitmask", bitmask)


def bit_more(model: onnx.ModelProto) -> None:
    bitmask = get(model, "bitmask")
    bitmask[4, 2] ^= 1
    put(model, "bitmask", bitmask)


HOSTILE: dict[str, tuple[Edit, str]] = {
    "K": (lambda m: set_attribute(m, "K", 129), "bitmask has shape"),
    "K beyond the last bit": (lambda m: set_attribute(m, "K", 65), "beyond 65"),
    "N": (lambda m: set_attribute(m, "N", 19), "bitmask has shape"),
    "negative K": (lambda m: set_attribute(m, "K", -1), "not the sides"),
    "huge K": (lambda m: set_attribute(m, "K", 2**63 - 1), "not the sides"),
    "huge N": (lambda m: set_attribute(m, "N", 2**63 - 1), "not the sides"),
    "level": (lambda m: set_attribute(m, "accuracy_level", 3), "accuracy_level is 3"),
    "level of floats": (lambda m: set_attribute(m, "accuracy_level", 4), "int8 values only"),
    "layout": (lambda m: set_attribute(m, "layout", 2), "layout is 2"),
    "few values": (lambda m: put(m, "values", get(m, "values")[:-1]), "of padding need"),
    "no values": (lambda m: put(m, "values", np.zeros(0, np.float32)), "is missing"),
    "matrix of values": (lambda m: put(m, "values", get(m, "values")[None]), "one dimension"),
    "double values": (lambda m: put(m, "values", get(m, "values").astype(np.float64)), "float32"),
    "few offsets": (lambda m: put(m, "row_offsets", get(m, "row_offsets")[:-1]), "row_offsets has shape"),
    "first offset": (lambda m: put(m, "row_offsets", get(m, "row_offsets") + 1), r"row_offsets\[0\]"),
    "decreasing offsets": (decreasing_offsets, "row 2 keeps"),
    "huge offsets": (huge_offsets, "row 0 keeps"),
    "bit beyond the columns": (bit_beyond, "beyond 100"),
    "one bit more": (bit_more, "row 4 keeps"),
    "flat bitmask": (lambda m: put(m, "bitmask", get(m, "bitmask").reshape(-1)), "bitmask has shape"),
    "short bias": (lambda m: put(m, "bias", np.zeros(3, np.float32)), "bias has shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_malformed_model_is_refused(name: str) -> None:
    edit, message = HOSTILE[name]
    model = model_of(packed(20, 100), function=False)
    edit(model)
    with pytest.raises(Exception, match=f"SparseLinear 'fc'.*{message}"):
        run(session(model), inputs(1, 2, 100))


INT8_HOSTILE: dict[str, tuple[Edit, str]] = {
    "few scales": (lambda m: put(m, "scales", get(m, "scales")[:, :1]), "scales"),
    "rows of scales": (lambda m: put(m, "scales", get(m, "scales")[:-1]), "scales of type"),
    "scale that is no number": (lambda m: put(m, "scales", get(m, "scales") * np.nan), "not finite"),
    "block size": (lambda m: set_attribute(m, "block_size", 63), "multiple of 64"),
    "negative block size": (lambda m: set_attribute(m, "block_size", -64), "multiple of 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(INT8_HOSTILE))
def test_malformed_int8_values_are_refused(name: str) -> None:
    edit, message = INT8_HOSTILE[name]
    model = model_of(packed(20, 100, torch.int8, block_size=64), function=False)
    edit(model)
    with pytest.raises(Exception, match=f"SparseLinear 'fc'.*{message}"):
        run(session(model), inputs(1, 2, 100))


def test_scales_of_float_values_must_be_one() -> None:
    weight = packed(20, 100)
    x = inputs(1, 2, 100)
    for scale in (1.0, 2.0):
        model = model_of(weight, function=False)
        model.graph.node[0].input[4] = "fc.scales"
        scales = np.full((20, 1), scale, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(scales, "fc.scales"))
        if scale == 1:
            assert close(run(session(model), x), expected(weight, x))
        else:
            with pytest.raises(Exception, match=r"SparseLinear 'fc'.*scales"):
                session(model)


@pytest.mark.parametrize("shape", [(99,), (2, 101), (1, 2, 0), ()])
def test_an_x_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = model_of(packed(20, 100), function=False)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    opened = session(model)
    with pytest.raises(Exception, match="SparseLinear 'fc': X has shape"):
        run(opened, np.zeros(shape, np.float32))


def test_an_x_of_a_wrong_type_is_refused() -> None:
    model = model_of(packed(20, 100), function=False)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match="SparseLinear"):
        session(model)


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = external(model_of(packed(64, 100)), tmp_path)
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(Exception, match=r"fc\.\w+.*out of bounds"):
        session(path)


def test_the_instruction_set_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(40, 100)
    x = inputs(1, 4, 100)
    monkeypatch.setenv("ZEROSKIP_INSTRUCTION_SET", "portable")
    assert close(run(session(model_of(weight)), x), expected(weight, x))
    monkeypatch.setenv("ZEROSKIP_INSTRUCTION_SET", "none such")
    with pytest.raises(Exception, match=r"SparseLinear 'fc'.*none such"):
        session(model_of(weight))


def test_the_layout_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(40, 100)
    x = inputs(1, 4, 100)
    monkeypatch.setenv("ZEROSKIP_LAYOUT", "1")
    assert close(run(session(model_of(weight)), x), expected(weight, x))
    monkeypatch.setenv("ZEROSKIP_LAYOUT", "fast")
    with pytest.raises(Exception, match=r"SparseLinear 'fc'.*ZEROSKIP_LAYOUT is 'fast'"):
        session(model_of(weight))


GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GetVersion = ctypes.CFUNCTYPE(ctypes.c_void_p)
CreateStatus = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


class ApiBase(ctypes.Structure):
    """An OrtApiBase."""

    _fields_ = (("get_api", GetApi), ("get_version", GetVersion))


@pytest.mark.parametrize("newest", [0, 1, 16])
def test_a_runtime_that_is_too_old_is_refused(newest: int) -> None:
    messages: list[bytes] = []
    status = 0x5A5A

    @CreateStatus
    def create_status(code: int, message: bytes) -> int:
        messages.append(message)
        return status

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
    asked: list[int] = []

    @GetApi
    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version <= newest else None

    version = ctypes.create_string_buffer(b"1.16.3")
    base = ApiBase(get_api, GetVersion(lambda: ctypes.addressof(version)))
    register = ctypes.CDLL(custom_ops_path()).RegisterCustomOps
    register.argtypes, register.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_void_p
    found = register(None, ctypes.addressof(base))
    assert asked == [17, 1]
    if newest == 0:  # there is no function to make an error with
        assert found is None
        return
    assert found == status
    (message,) = messages
    assert message.startswith(b"zeroskip needs ONNX Runtime 1.17 or later (version 17 of")
    assert message.endswith(b"this is ONNX Runtime 1.16.3")


def test_options_are_kept() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    assert session_options(options) is options
    assert options.intra_op_num_threads == 3


def test_a_library_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake.so"
    fake.write_bytes(b"not a library")
    monkeypatch.setattr(custom_ops, "custom_ops_path", lambda: str(fake))
    with pytest.raises(ArtifactError, match="refuses the kernel library") as caught:
        session_options()
    assert caught.value.next_step == "run `zeroskip doctor`"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROSKIP_LIBRARY", "/nowhere/libzeroskip.so")
    with pytest.raises(CompileError) as caught:
        custom_ops_path()
    assert caught.value.next_step


def test_models_with_packed_weights_are_told_from_others(tmp_path: Path) -> None:
    sparse = external(model_of(packed(4, 4)), tmp_path)
    (tmp_path / "model.data").unlink()  # it is not read
    assert uses_sparse_linear(sparse)
    with pytest.warns(DenseFallbackWarning, match=r"zeroskip export --dense") as caught:
        warn_dense_fallback(sparse)
    assert caught[0].filename == __file__
    plain = onnx.load(sparse, load_external_data=False)
    del plain.graph.node[:], plain.opset_import[1]
    onnx.save(plain, tmp_path / "plain.onnx")
    assert not uses_sparse_linear(tmp_path / "plain.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_dense_fallback(tmp_path / "plain.onnx")


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ArtifactError, match="cannot be read"):
        uses_sparse_linear(tmp_path / "text.onnx")
