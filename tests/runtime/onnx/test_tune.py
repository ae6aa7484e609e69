"""Folders tuned both ways, with outcomes that are made up, and what must not happen to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zeroskip.ir.errors import ArtifactError, KernelLibraryError, ParityError
from zeroskip.ir.formats import BitmaskWeight, pack_bitmask
from zeroskip.runtime import tuning
from zeroskip.runtime.dispatch import Verdict
from zeroskip.runtime.onnx import tune
from zeroskip.runtime.onnx.compare import compare_models
from zeroskip.runtime.onnx.sparse_linear import (
    add_functions,
    attribute,
    is_sparse_linear,
    make_sparse_linear,
    read_sparse_linear,
)
from zeroskip.runtime.onnx.tune import TUNE_FILE, tune_folder
from zeroskip.runtime.tuning import Measured, Tuner

WIDTH = 256
Answer = Callable[[BitmaskWeight], Mapping[int, Measured]]


class MadeUp(Tuner):
    """Answers without measuring, and counts how often it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked = answer, 0

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        return ("made-up",)

    def measure(self, weight: BitmaskWeight, **_: object) -> dict[int, Measured]:  # type: ignore[override]
        self.asked += 1
        return dict(self.answer(weight))


def always(speedup: float, layout: int = 0) -> MadeUp:
    return MadeUp(lambda _: {layout: Measured({1: speedup}, 0.0, 0, {})})


def pruned(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def quantized(seed: int) -> BitmaskWeight:
    weight = pruned(WIDTH, WIDTH, seed=seed)
    return pack_bitmask(weight, dtype=torch.int8, scales=weight.abs().amax(1, keepdim=True) / 127)


def write(folder: Path, *, int8: bool = False, level: int = 0, external: bool = False) -> Path:
    """A chain of every form of a linear: MatMul, its transpose, Gemm, with bias, sparse, dense."""
    folder.mkdir(exist_ok=True)
    nodes, constants = [], []

    def constant(name: str, tensor: torch.Tensor) -> str:
        constants.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    bias = torch.linspace(-1, 1, WIDTH)
    a = constant("a.weight", pruned(WIDTH, WIDTH, seed=1).T)
    nodes.append(helper.make_node("MatMul", ["X", a], ["a0"], "a"))
    nodes.append(helper.make_node("Add", [constant("a.bias", bias), "a0"], ["a1"], "a.add"))
    nodes.append(helper.make_node("Tanh", ["a1"], ["a2"]))
    b = constant("b.weight", pruned(WIDTH, WIDTH, seed=2))
    nodes.append(helper.make_node("Transpose", [b], ["b0"], "b.transpose", perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["a2", "b0"], ["b1"], "b"))
    c = constant("c.weight", pruned(WIDTH, WIDTH, seed=3))
    inputs = ["b1", c, constant("c.bias", bias)]
    nodes.append(helper.make_node("Gemm", inputs, ["c1"], "c", transB=1))
    plain = pack_bitmask(pruned(WIDTH, WIDTH, seed=4), dtype=torch.bfloat16)
    weight = quantized(4) if int8 else plain
    d = make_sparse_linear(weight, "c1", "d1", name="d", bias=bias, accuracy_level=level)
    nodes.append(d.node)
    constants.extend(d.initializers)
    full = constant("full.weight", torch.randn(WIDTH, WIDTH) / 16)
    nodes.append(helper.make_node("MatMul", ["d1", full], ["e1"], "full"))
    small = constant("small.weight", pruned(WIDTH, 8).T.contiguous().T)
    nodes.append(helper.make_node("MatMul", ["e1", small], ["Y"], "small"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", 8])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    add_functions(model)
    options = {"external_data": "model.onnx.data"} if external else {}
    onnx_ir.save(onnx_ir.from_proto(model), folder / "model.onnx", **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def kinds(folder: Path) -> dict[str, str]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return {n.name: n.op_type for n in nodes if n.op_type in ("MatMul", "Gemm", "SparseLinear")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_sparse(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    tuned = tune_folder(folder, m_values=[1], tuner=always(2.0))
    sparse = dict.fromkeys("abcd", "SparseLinear")
    assert kinds(folder) == {**sparse, "full": "MatMul", "small": "MatMul"}
    assert set(tuned.verdicts) == set("abcd")
    assert tuned.changed == ("a", "b", "c")
    assert tuned.distance is not None
    assert tuned.distance < 1e-6
    assert compare_models(old / "model.onnx", folder / "model.onnx") < 1e-6
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model)
    left = {tensor.name for tensor in model.graph.initializer}
    assert not left & {"a.weight", "b.weight", "c.weight", "c1"}


def test_all_dense(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    tuned = tune_folder(folder, m_values=[1], tuner=always(0.5))
    assert kinds(folder) == {**dict.fromkeys("abd", "MatMul"), "c": "Gemm"} | {
        "full": "MatMul",
        "small": "MatMul",
    }
    assert tuned.changed == ("d",)
    assert tuned.verdicts["d"].reason == "0.50x at m=1"
    model = onnx.load(folder / "model.onnx")
    assert not model.functions
    assert [each.domain for each in model.opset_import] == [""]
    # No library is needed any more.
    assert compare_models(old / "model.onnx", folder / "model.onnx", with_library=False) < 1e-6


def test_without_the_library_the_tuned_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert compare_models(old / "model.onnx", folder / "model.onnx", with_library=False) < 1e-6


@pytest.mark.parametrize("level", [0, 4])
def test_int8_goes_to_dense_and_back_exactly(tmp_path: Path, level: int) -> None:
    folder = write(tmp_path / "model", int8=True, level=level)
    before = onnx.load(folder / "model.onnx")
    node = next(n for n in before.graph.node if n.name == "d")
    expected, bias = read_sparse_linear(before, node)

    away = tune_folder(folder, m_values=[1], tuner=always(0.5))
    assert kinds(folder)["d"] == "MatMul"
    assert away.distance is not None
    assert away.distance < (2e-2 if level else 1e-5)

    tune_folder(folder, m_values=[1], tuner=always(2.0))
    after = onnx.load(folder / "model.onnx")
    node = next(n for n in after.graph.node if n.name == "d")
    got, got_bias = read_sparse_linear(after, node)
    assert attribute(node, "accuracy_level") == level
    assert bias is not None
    assert got_bias is not None
    assert torch.equal(got_bias, bias)
    assert got.values.dtype == torch.int8
    assert got.scales is not None
    assert expected.scales is not None
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.unpack(), expected.unpack())
    # The others became sparse next to it: all share one body, so all have scales.
    others = [n for n in after.graph.node if is_sparse_linear(n)]
    assert len(others) == 4
    assert all(n.input[4] for n in others)
    assert compare_models(folder / "model.onnx", folder / "model.onnx", with_library=False) == 0


def test_bfloat16_comes_back_as_bfloat16_and_says_so(folder: Path) -> None:
    tune_folder(folder, m_values=[1], tuner=always(0.5))
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]  # As a tool would that drops what it does not know.
    onnx.save(model, folder / "model.onnx")
    tuned = tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert tuned.verdicts["d"].value_type == "bfloat16"
    assert tuned.verdicts["d"].reason == "2.00x at m=1; its values are exact in bfloat16"
    assert tuned.verdicts["a"].value_type == "float32"


def test_a_weight_that_was_changed_since_does_not_come_back_wrong(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", int8=True)
    tune_folder(folder, m_values=[1], tuner=always(0.5))
    model = onnx.load(folder / "model.onnx")
    stored = next(t for t in model.graph.initializer if t.name == "d.weight")
    changed = pruned(WIDTH, WIDTH, seed=9).T.contiguous()
    stored.CopyFrom(numpy_helper.from_array(changed.numpy(), "d.weight"))
    onnx.save(model, folder / "model.onnx")
    tune_folder(folder, m_values=[1], tuner=always(2.0))
    after = onnx.load(folder / "model.onnx")
    node = next(n for n in after.graph.node if n.name == "d")
    assert torch.equal(read_sparse_linear(after, node)[0].unpack(), changed.T)


def test_small_files_get_external_data_when_they_are_packed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "PACKED_THRESHOLD", 1000)
    tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert (folder / "model.onnx.data").is_file()


def test_the_layout_is_written(folder: Path) -> None:
    tuned = tune_folder(folder, m_values=[1], tuner=always(2.0, layout=1))
    assert tuned.changed == ("a", "b", "c", "d")
    nodes = onnx.load(folder / "model.onnx").graph.node
    assert [attribute(n, "layout") for n in nodes if is_sparse_linear(n)] == [1, 1, 1, 1]


def test_a_second_run_changes_nothing(folder: Path) -> None:
    tuner = always(2.0)
    first = tune_folder(folder, m_values=[1], tuner=tuner)
    assert tuner.asked == 4
    assert first.weights == {name: f"{name}.weight" for name in "abc"} | {"d": "d"}
    before = (folder / "model.onnx").stat().st_mtime_ns
    again = tune_folder(folder, m_values=[1], tuner=tuner)
    assert again.changed == ()
    assert again.verdicts == first.verdicts
    assert again.distance is None
    assert (folder / "model.onnx").stat().st_mtime_ns == before


def test_each_is_judged_for_itself(folder: Path) -> None:
    tuner = MadeUp(
        lambda w: {0: Measured({1: 2.0 if w.values.dtype == torch.float32 else 0.5}, 0.0, 0, {})}
    )
    tuned = tune_folder(folder, m_values=[1], tuner=tuner)
    assert {n: v.choice for n, v in tuned.verdicts.items()} == {
        **dict.fromkeys("abc", "sparse"),
        "d": "dense",
    }


def test_the_record_can_be_read_again(folder: Path) -> None:
    tuned = tune_folder(folder, m_values=[1, 16], threads=2, tuner=always(2.0))
    record = json.loads((folder / TUNE_FILE).read_text())
    assert (record["m"], record["threads"]) == ([1, 16], 2)
    assert record["machine"]["onnxruntime"] == onnxruntime.__version__
    read = {name: Verdict.from_json(verdict) for name, verdict in record["linears"].items()}
    assert read == tuned.verdicts


def test_external_data_is_written_again_and_the_old_goes(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", external=True)
    old = shutil.copytree(folder, tmp_path / "old")
    for speedup, data in ((2.0, "model.onnx.tuned.data"), (0.5, "model.onnx.data")):
        tune_folder(folder, m_values=[1], tuner=always(speedup))
        assert set(contents(folder)) == {"model.onnx", data, TUNE_FILE}
        assert (folder / data).stat().st_size > 100_000
        assert compare_models(old / "model.onnx", folder / "model.onnx") < 1e-6
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                assert item.key != "offset" or int(item.value) % (4096 if speedup > 1 else 4) == 0


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = contents(folder)
    tuned = tune_folder(folder, m_values=[1], tuner=always(2.0), dry_run=True)
    assert tuned.changed == ("a", "b", "c")
    assert contents(folder) == before


def test_without_a_library_all_become_dense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise KernelLibraryError("there is no kernel library")

    monkeypatch.setattr(tuning, "library_path", missing)
    tuned = tune_folder(folder)
    assert "SparseLinear" not in kinds(folder).values()
    assert {v.choice for v in tuned.verdicts.values()} == {"dense"}
    assert "there is no kernel library" in tuned.verdicts["d"].reason


def test_progress_names_each(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    tune_folder(folder, m_values=[1], tuner=always(2.0), progress=lambda *call: calls.append(call))
    assert calls == [(0, 4, "a"), (1, 4, "b"), (2, 4, "c"), (3, 4, "d")]


# What must not happen.


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model"):
        tune_folder(tmp_path, tuner=always(2.0))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(ArtifactError, match="cannot be read"):
        tune_folder(tmp_path, tuner=always(2.0))


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", external=True)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError):
        tune_folder(folder, tuner=always(2.0))


def test_a_model_that_computes_something_else_is_not_put_in_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def wrong(*arguments: object, **options: object) -> object:
        replacement = make_sparse(*arguments, **options)  # type: ignore[arg-type]
        values = next(t for t in replacement.constants if t.name.endswith(".values"))
        numbers = np.frombuffer(values.raw_data, np.float32).copy()
        numbers[:100] += 0.1
        values.raw_data = numbers.tobytes()
        return replacement

    make_sparse = tune.make_sparse
    monkeypatch.setattr(tune, "make_sparse", wrong)
    with pytest.raises(ParityError, match="away from what it was"):
        tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert contents(folder) == before


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_the_model_as_it_was(
    tmp_path: Path, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", external=external)
    before = contents(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ArtifactError, match="No space left"):
        tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert contents(folder) == before


def test_a_rename_that_fails_leaves_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", external=True)
    before = contents(folder)
    replace = tune.os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target).name == "model.onnx":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(tune.os, "replace", fails)
    with pytest.raises(ArtifactError, match="Input/output error"):
        tune_folder(folder, m_values=[1], tuner=always(2.0))
    assert before.items() <= contents(folder).items()
    assert compare_models(folder / "model.onnx", folder / "model.onnx") == 0


def edited(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    return folder


def test_a_weight_that_something_else_reads_stays(folder: Path) -> None:
    def share(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Shape", ["a.weight"], ["shape"]))
        model.graph.output.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [2]))

    tuned = tune_folder(edited(folder, share), m_values=[1], tuner=always(2.0))
    assert set(tuned.verdicts) == set("bcd")


def test_a_product_that_is_an_output_keeps_its_name(folder: Path) -> None:
    def expose(model: onnx.ModelProto) -> None:
        model.graph.output.append(
            helper.make_tensor_value_info("a0", TensorProto.FLOAT, ["n", WIDTH])
        )

    tuned = tune_folder(edited(folder, expose), m_values=[1], tuner=always(2.0))
    assert tuned.distance is not None
    model = onnx.load(folder / "model.onnx")
    assert "a0" in {name for node in model.graph.node for name in node.output}
    assert "a.add" in {node.name for node in model.graph.node}


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"beta": 0.5}])
def test_a_gemm_that_scales_stays(folder: Path, options: dict[str, float]) -> None:
    def scale(model: onnx.ModelProto) -> None:
        gemm = next(node for node in model.graph.node if node.name == "c")
        for name, value in options.items():
            gemm.attribute.append(helper.make_attribute(name, value))

    tuned = tune_folder(edited(folder, scale), m_values=[1], tuner=always(2.0))
    assert set(tuned.verdicts) == set("abd")
