"""Which operators a file imports is read without its graph, and damage is left to ONNX Runtime."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from sparse_models import model_of, packed

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx import model_imports
from zeroskip.runtime.onnx.custom_ops import uses_sparse_linear
from zeroskip.runtime.onnx.model_imports import finds_domain, imports_domain
from zeroskip.runtime.onnx.session import OnnxModel

MIB = 1 << 20


def dense_model(size: int, *domains: str) -> onnx.ModelProto:
    """One product with a weight of size * size float32 within the file."""
    weight = numpy_helper.from_array(np.ones((size, size), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name in ("x", "y")
    )
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    imports = [helper.make_opsetid("", 18), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def finds(data: bytes) -> bool:
    return finds_domain(io.BytesIO(data), "zeroskip")


def length(size: int) -> bytes:
    """A length as protobuf writes it, in four bytes."""
    return bytes(
        [size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21 & 127]
    )


def test_packed_models_are_told_from_others() -> None:
    assert finds(model_of(packed(7, 65)).SerializeToString())
    assert not finds(dense_model(4).SerializeToString())
    others = ("zeroskiq", "zeroski", "zeroskip.more", "com.microsoft")
    assert not finds(dense_model(4, *others).SerializeToString())
    assert finds(dense_model(4, *others, "zeroskip").SerializeToString())
    assert not finds(b"")


def test_the_name_counts_only_where_domains_are_named() -> None:
    model = dense_model(4)
    model.producer_name = model.domain = model.graph.doc_string = "zeroskip"
    model.metadata_props.add(key="zeroskip", value="zeroskip")
    model.functions.add(name="zeroskip", domain="zeroskip")
    assert not finds(model.SerializeToString())


def test_fields_may_come_in_any_order_and_be_unknown() -> None:
    graph = dense_model(4).graph.SerializeToString()
    imported = helper.make_opsetid("zeroskip", 1).SerializeToString()
    unknown = {
        "a number": bytes([30 << 3 & 127 | 128, 1]) + bytes([255] * 9 + [1]),
        "eight bytes": bytes([12 << 3 | 1]) + bytes(8),
        "four bytes": bytes([13 << 3 | 5]) + bytes(4),
        "bytes": bytes([15 << 3 | 2, 3]) + b"abc",
    }
    fields = [
        bytes([7 << 3 | 2]) + length(len(graph)) + graph,
        *unknown.values(),
        bytes([8 << 3 | 2, len(imported)]) + imported,
    ]
    onnx.ModelProto.FromString(b"".join(fields))  # protobuf agrees that it is a message
    assert finds(b"".join(fields))
    assert finds(b"".join(reversed(fields)))
    assert not finds(b"".join(fields[:-1]))


def test_a_file_cut_short_anywhere_is_refused_or_read_as_far_as_it_goes() -> None:
    data = dense_model(4, "zeroskip").SerializeToString()
    found = []
    for size in range(len(data)):
        try:
            found.append(finds(data[:size]))
        except ValueError:
            found.append(False)
    assert finds(data)
    # The import of the domain comes last, and only its version behind the name.
    assert not any(found[: data.rindex(b"zeroskip") + 8])


def test_garbage_is_refused_or_has_no_such_import() -> None:
    source = random.Random(0)
    data = dense_model(4, "zeroskip").SerializeToString()
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(len(data))] = source.randrange(256)
        for text in (bytes(damaged), source.randbytes(source.randrange(1, 60))):
            try:
                agreed = finds(text)
            except ValueError:
                continue
            try:
                model = onnx.ModelProto.FromString(text)
            except Exception:
                continue
            assert agreed == any(each.domain == "zeroskip" for each in model.opset_import)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a model", "no protobuf message"),
        (b"\x00\x00", "begins no field"),
        (b"\x0b", "begins no value"),
        (b"\xff" * 20, "more than ten bytes"),
        (b"\x3a\xff\xff\xff\xff\x0f" + b"graph", "ends behind"),
        (b"\x42\x05\x0a\x7fabc", "ends behind"),
        (b"\x3a", "cut short"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"cannot be read.*{message}") as caught:
        uses_sparse_linear(path)
    assert str(path) in str(caught.value)
    # The session leaves the file to ONNX Runtime, which says it in its own words.
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load") as refused:
        OnnxModel(tmp_path)
    with pytest.raises(Exception, match=r".") as own:
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert str(own.value) in str(refused.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        imports_domain(tmp_path / "absent.onnx", "zeroskip")


class Counted(io.FileIO):
    """A file that counts the bytes that are read from the disk."""

    count = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = super().readinto(buffer) or 0
        Counted.count += size
        return size


@pytest.mark.parametrize("domains", [(), ("zeroskip",)])
def test_the_weights_within_a_file_are_not_read(
    domains: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(dense_model(3000, *domains), path)
    assert path.stat().st_size > 32 * MIB
    monkeypatch.setattr(Counted, "count", 0)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Counted(self)))
    assert model_imports.imports_domain(path, "zeroskip") == bool(domains)
    assert 0 < Counted.count < MIB


def test_a_session_does_not_parse_the_model_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    onnx.save(dense_model(4), tmp_path / "model.onnx")
    monkeypatch.setattr(onnx, "load", never)
    monkeypatch.setattr(onnx, "load_model", never)
    assert OnnxModel(tmp_path).inputs == ("x",)
