"""The body of SparseLinear, the kernels, onnx.reference and the dense form compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from sparse_models import TYPES, close, expected, inputs, limit_of, model_of, packed, run, session

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.onnx.densify import densify
from zeroskip.runtime.onnx.sparse_linear import (
    add_functions,
    make_sparse_linear,
    read_sparse_linear,
)
from zeroskip.runtime.onnx.sparse_linear_function import function_body

SHAPES = [(1, 1), (7, 63), (16, 64), (33, 65), (130, 200)]


def all_ways(model: onnx.ModelProto, x: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Runs a model by every way there is."""
    onnx.save(model, folder / "sparse.onnx")
    densify(folder / "sparse.onnx", folder / "dense.onnx")
    (reference,) = ReferenceEvaluator(model).run(None, {"X": x})
    return {
        "kernels": run(session(model), x),
        "body": run(session(model, library=False), x),
        "reference": np.asarray(reference),
        "dense": run(session(folder / "dense.onnx", library=False), x),
    }


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_all_ways_agree(dtype: torch.dtype, rows: int, columns: int, tmp_path: Path) -> None:
    weight = packed(rows, columns, dtype, seed=rows)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
    x = inputs(2, 3, columns)
    for way, found in all_ways(model_of(weight, bias=bias), x, tmp_path).items():
        limit = limit_of(dtype) if way == "kernels" else limit_of(torch.float32)
        assert close(found, expected(weight, x, bias), limit), way


@pytest.mark.parametrize("block_size", [0, 64, 128])
@pytest.mark.parametrize("columns", [64, 200, 256])
@pytest.mark.parametrize("level", [0, 4])
def test_all_ways_agree_on_int8_blocks(
    block_size: int, columns: int, level: int, tmp_path: Path
) -> None:
    weight = packed(40, columns, torch.int8, block_size=block_size)
    x = inputs(2, 5, columns)
    found = all_ways(model_of(weight, accuracy_level=level), x, tmp_path)
    # The dense form does not round X.
    assert close(found.pop("dense"), expected(weight, x))
    for way, y in found.items():
        assert close(y, expected(weight, x, level=level)), way
    if level == 4:
        assert not close(found["kernels"], expected(weight, x))


def test_rows_of_one_sign_of_zeros_and_of_ties_are_rounded_alike() -> None:
    weight = packed(24, 96, torch.int8)
    model = model_of(weight, rank=2, accuracy_level=4)
    x = inputs(5, 96)
    x[0] = np.abs(x[0])
    x[1] = -np.abs(x[1])
    x[2] = 0
    x[3] = np.linspace(0, 255, 96, dtype=np.float32)
    x[3, :8] = [0.5, 1.5, 2.5, 3.5, 254.5, 253.5, 0, 255]
    x[4] *= 1e30
    wanted = expected(weight, x, level=4)
    for library in (True, False):
        found = run(session(model, library=library), x)
        for row in range(5):
            assert close(
                found[row] / np.abs(x[row]).max().clip(1),
                wanted[row] / np.abs(x[row]).max().clip(1),
            )


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_rows_that_are_not_finite_are_as_in_a_dense_product(bad: float, level: int) -> None:
    weight = packed(16, 100, torch.int8)
    model = model_of(weight, rank=2, accuracy_level=level)
    x = inputs(3, 100)
    x[1, 37] = bad
    found, body = run(session(model), x), run(session(model, library=False), x)
    assert np.array_equal(np.isfinite(found), np.isfinite(body))
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()
    assert np.array_equal(np.isnan(found), np.isnan(body))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (3, 0, 64)])
def test_any_batch(shape: tuple[int, ...]) -> None:
    weight = packed(10, 64)
    model = model_of(weight, rank=len(shape))
    x = inputs(*shape)
    for library in (True, False):
        assert close(run(session(model, library=library), x), expected(weight, x))


@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_empty_weight(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = packed(rows, columns, dtype)
    bias = torch.arange(rows, dtype=torch.float32)
    x = inputs(2, 3, columns)
    model = model_of(weight, bias=bias, accuracy_level=4 if dtype == torch.int8 else 0)
    for library in (True, False):
        assert close(run(session(model, library=library), x), expected(weight, x, bias))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_weight_that_keeps_nothing_or_all(density: float) -> None:
    weight = packed(20, 100, density=density)
    x = inputs(1, 4, 100)
    for library in (True, False):
        assert close(run(session(model_of(weight), library=library), x), expected(weight, x))


def test_garbage_in_the_padding_does_not_matter() -> None:
    weight = packed(20, 100)
    weight.values[-64:] = float("nan")
    x = inputs(1, 4, 100)
    for library in (True, False):
        assert close(run(session(model_of(weight), library=library), x), expected(weight, x))


def mixed_model() -> tuple[onnx.ModelProto, list[tuple[BitmaskWeight, int]]]:
    """Float values, int8 values and both accuracy levels one after the other."""
    chain = [
        (packed(64, 100, torch.float32, seed=1), 0),
        (packed(96, 64, torch.int8, block_size=64, seed=2), 4),
        (packed(20, 96, torch.int8, seed=3), 0),
    ]
    nodes, initializers = [], []
    for i, (weight, level) in enumerate(chain):
        made = make_sparse_linear(
            weight, "X" if i == 0 else f"h{i}", "Y" if i == 2 else f"h{i + 1}",
            name=f"fc{i}", accuracy_level=level, with_scales=True,
        )  # fmt: skip
        nodes.append(made.node)
        initializers += made.initializers
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [info("X", onnx.TensorProto.FLOAT, ["m", 100])],
        [info("Y", onnx.TensorProto.FLOAT, ["m", 20])],
        initializers,
    )
    imports = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)
    add_functions(model)
    return model, chain


def test_one_body_serves_nodes_of_every_kind(tmp_path: Path) -> None:
    model, chain = mixed_model()
    onnx.checker.check_model(model)
    y = x = inputs(4, 100)
    for weight, level in chain:
        y = expected(weight, y.astype(np.float32), level=level)
    found = all_ways(model, x, tmp_path)
    found.pop("dense")
    for way, got in found.items():
        # A sum that differs in its last bit may round to the next of 255 steps.
        assert np.abs(got - y).max() < 0.01 * np.abs(y).max(), way
    assert np.abs(found["kernels"] - found["body"]).max() < 0.01 * np.abs(y).max()


def test_the_body_folds_to_a_dense_product(tmp_path: Path) -> None:
    model = model_of(packed(64, 100))
    session(model, library=False, optimized=tmp_path / "folded.onnx")
    folded = onnx.load(tmp_path / "folded.onnx")
    assert [node.op_type for node in folded.graph.node] == ["MatMul", "Add"]


def test_wide_positions_are_the_same() -> None:
    weight = packed(30, 130)
    model = model_of(weight)
    del model.functions[:]
    model.functions.append(function_body(opset=18, scales=False, wide=True))
    x = inputs(1, 4, 130)
    assert close(run(session(model, library=False), x), expected(weight, x))


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_the_body_has_the_opset_of_its_model(opset: int) -> None:
    weight = packed(30, 130, torch.int8)
    model = model_of(weight, opset=opset, accuracy_level=4)
    onnx.checker.check_model(model, full_check=True)
    assert model.functions[0].opset_import[0].version == opset
    x = inputs(1, 4, 130)
    assert close(run(session(model, library=False), x), expected(weight, x, level=4))


def test_an_opset_that_is_too_old_is_refused() -> None:
    with pytest.raises(LoweringError, match="opset 17"):
        function_body(opset=17, scales=False)


def test_an_accuracy_level_is_for_int8() -> None:
    with pytest.raises(LoweringError, match="accuracy_level"):
        make_sparse_linear(packed(4, 4), "X", "Y", name="fc", accuracy_level=4)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_node_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = packed(33, 200, dtype)
    bias = torch.randn(33)
    onnx.save(model_of(weight, bias=bias), tmp_path / "m.onnx", save_as_external_data=True)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    found, found_bias = read_sparse_linear(model, model.graph.node[0], tmp_path)
    assert found_bias is not None
    assert torch.equal(found_bias, bias)
    assert torch.equal(found.values, weight.values)
    assert found.values.dtype == dtype
    assert torch.equal(found.unpack(), weight.unpack())
    assert (found.columns, found.block_size) == (200, 0)
