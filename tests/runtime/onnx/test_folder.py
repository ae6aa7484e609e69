"""The folder of an export: complete or absent, streamed, and sparse only when asked for."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from zeroskip.ir.errors import ArtifactError, LoweringError
from zeroskip.ir.folders import new_folder
from zeroskip.runtime.onnx.folder import copy_tokenizer, save_model
from zeroskip.runtime.onnx.session import OnnxModel


def product(weight: np.ndarray) -> onnx_ir.Model:
    """Returns y = x @ weight."""
    x = onnx_ir.Value(
        name="x",
        shape=onnx_ir.Shape([2, weight.shape[0]]),
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
    )
    w = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(weight, name="w"))
    w.shape, w.type = onnx_ir.Shape(weight.shape), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    node = onnx_ir.node("MatMul", [x, w])
    y = node.outputs[0]
    y.name, y.type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    y.shape = onnx_ir.Shape([2, weight.shape[1]])
    graph = onnx_ir.Graph(
        [x], [y], nodes=[node], initializers=[w], opset_imports={"": 20}, name="product"
    )
    return onnx_ir.Model(graph, ir_version=10)


def sparse_weight() -> np.ndarray:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((64, 48), dtype=np.float32)
    return np.where(generator.random(weight.shape) < 0.9, np.float32(0), weight)


def test_a_finished_folder_is_renamed_into_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert [f.name for f in target.iterdir()] == ["file"]
    assert [f.name for f in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_vanishes(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_target_is_taken(tmp_path: Path) -> None:
    with new_folder(tmp_path) as folder:
        (folder / "file").write_text("x")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_full_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(ArtifactError, match="already holds something"), new_folder(tmp_path):
        pass
    file = tmp_path / "precious"
    with pytest.raises(ArtifactError, match="already holds something"), new_folder(file):
        pass


def test_an_unwritable_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match="cannot be written"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_a_full_disk_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No space left"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("threshold", "files"), [(1 << 30, 1), (1000, 2)])
def test_big_weights_get_a_file_of_their_own(tmp_path: Path, threshold: int, files: int) -> None:
    weight = sparse_weight()
    size = save_model(product(weight), tmp_path, external_data_threshold=threshold)
    assert len(list(tmp_path.iterdir())) == files
    assert size == sum(f.stat().st_size for f in tmp_path.iterdir())
    y = OnnxModel(tmp_path).run({"x": torch.ones(2, 64)})["y"]
    torch.testing.assert_close(y, torch.ones(2, 64) @ torch.from_numpy(weight))


def test_sparse_initializers_compute_the_same(tmp_path: Path) -> None:
    results, sizes = [], []
    for sparse in (False, True):
        folder = tmp_path / str(sparse)
        folder.mkdir()
        sizes.append(save_model(product(sparse_weight()), folder, sparse_initializers=sparse))
        results.append(OnnxModel(folder).run({"x": torch.ones(2, 64)})["y"])
        stored = onnx.load(folder / "model.onnx").graph
        assert (len(stored.initializer), len(stored.sparse_initializer)) == (1 - sparse, sparse)
    assert torch.equal(*results)
    assert sizes[1] < sizes[0]


def test_dense_weights_stay_dense_when_sparse_ones_are_asked_for(tmp_path: Path) -> None:
    save_model(product(np.ones((8, 4), np.float32)), tmp_path, sparse_initializers=True)
    assert len(onnx.load(tmp_path / "model.onnx").graph.initializer) == 1


def test_sparse_initializers_and_external_data_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="do not go together"):
        save_model(
            product(sparse_weight()), tmp_path, external_data_threshold=10, sparse_initializers=True
        )


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        copy_tokenizer(tmp_path, tmp_path)


def test_saving_lazy_weights_holds_one_at_a_time(tmp_path: Path) -> None:
    # A process of its own: the peak of a process never goes down again.
    script = f"""
        import resource, sys
        from pathlib import Path
        import numpy as np, onnx_ir
        from zeroskip.runtime.onnx.folder import save_model
        def peak():
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        values = []
        for n in range(32):
            shape = onnx_ir.Shape([1024, 4096])
            value = onnx_ir.Value(name=f"w{{n}}", shape=shape)
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            value.const_value = onnx_ir.LazyTensor(
                lambda: onnx_ir.tensor(np.ones((1024, 4096), np.float32)),
                onnx_ir.DataType.FLOAT, shape, name=f"w{{n}}")
            values.append(value)
        graph = onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={{"": 20}})
        before = peak()
        size = save_model(onnx_ir.Model(graph, ir_version=10), Path({str(tmp_path)!r}),
                          external_data_threshold=1 << 20)
        print(size, peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    size, growth = map(int, subprocess.check_output(command, text=True).split())
    assert size > 32 * 16 * 2**20
    assert growth < size / 4
