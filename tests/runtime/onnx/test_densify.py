"""The dense form of a model with packed weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx import helper as oh
from sparse_models import TYPES, close, expected, inputs, model_of, packed, run, session

from zeroskip.ir.errors import ArtifactError
from zeroskip.runtime.onnx.densify import densify
from zeroskip.runtime.onnx.sparse_linear import add_functions, make_sparse_linear


@pytest.mark.parametrize("external_from", [0, 1 << 30])
@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_of_the_operator_is_left(
    dtype: torch.dtype, external_from: int, tmp_path: Path
) -> None:
    weight = packed(40, 200, dtype)
    bias = torch.randn(40)
    onnx.save(model_of(weight, bias=bias), tmp_path / "sparse.onnx", save_as_external_data=True)
    target = tmp_path / "new" / "dense.onnx"
    assert densify(tmp_path / "sparse.onnx", target, external_from=external_from) == 1
    assert target.with_name("dense.onnx.data").exists() == (external_from == 0)
    assert len(list(target.parent.iterdir())) == (2 if external_from == 0 else 1)
    model = onnx.load(target)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert [o.domain for o in model.opset_import] == [""]
    assert not model.functions
    assert len(model.graph.initializer) == 2
    x = inputs(2, 3, 200)
    assert close(run(session(target, library=False), x), expected(weight, x, bias))


def test_a_bias_of_zeros_is_dropped(tmp_path: Path) -> None:
    onnx.save(model_of(packed(10, 20)), tmp_path / "sparse.onnx")
    densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
    model = onnx.load(tmp_path / "dense.onnx")
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert len(model.graph.initializer) == 1


def shared_and_nested() -> onnx.ModelProto:
    """One weight used by two nodes, one of them inside an If, beside an ordinary node."""
    weight = packed(20, 20)
    first = make_sparse_linear(weight, "X", "h", name="fc")
    again = onnx.NodeProto()
    again.CopyFrom(first.node)
    again.name, again.input[0], again.output[0] = "again", "relu", "inner"
    info = oh.make_tensor_value_info
    branches = [
        oh.make_graph([again], "then", [], [info("inner", TensorProto.FLOAT, ["m", 20])]),
        oh.make_graph(
            [oh.make_node("Identity", ["relu"], ["other"])],
            "else",
            [],
            [info("other", TensorProto.FLOAT, ["m", 20])],
        ),
    ]
    graph = oh.make_graph(
        [
            first.node,
            oh.make_node("Relu", ["h"], ["relu"]),
            oh.make_node("If", ["choice"], ["Y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        "graph",
        [info("X", TensorProto.FLOAT, ["m", 20])],
        [info("Y", TensorProto.FLOAT, ["m", 20])],
        [*first.initializers, numpy_helper.from_array(np.array(True), "choice")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=9)
    add_functions(model)
    return model


def test_shared_weights_and_inner_graphs(tmp_path: Path) -> None:
    model = shared_and_nested()
    onnx.save(model, tmp_path / "sparse.onnx")
    assert densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx") == 2
    x = inputs(3, 20)
    wanted = run(session(model), x)
    assert close(run(session(model, library=False), x), wanted)
    assert close(run(session(tmp_path / "dense.onnx", library=False), x), wanted)
    assert "SparseLinear" not in str(onnx.load(tmp_path / "dense.onnx").graph)


def test_a_model_without_packed_weights_is_copied(tmp_path: Path) -> None:
    onnx.save(model_of(packed(10, 20)), tmp_path / "sparse.onnx")
    densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
    assert densify(tmp_path / "dense.onnx", tmp_path / "again.onnx") == 0
    x = inputs(2, 3, 20)
    found = [
        run(session(tmp_path / f"{name}.onnx", library=False), x) for name in ("dense", "again")
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize("external_from", [0, 1 << 30])
def test_weights_that_contradict_each_other_leave_nothing(
    external_from: int, tmp_path: Path
) -> None:
    model = model_of(packed(10, 20))
    offsets = next(t for t in model.graph.initializer if t.name == "fc.row_offsets")
    array = numpy_helper.to_array(offsets).copy()
    array[3] += 1
    offsets.CopyFrom(numpy_helper.from_array(array, "fc.row_offsets"))
    onnx.save(model, tmp_path / "sparse.onnx")
    with pytest.raises(ArtifactError, match="contradict each other") as caught:
        densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx", external_from=external_from)
    assert caught.value.where == "fc"
    assert [path.name for path in tmp_path.iterdir()] == ["sparse.onnx"]


def test_weights_that_are_inputs_are_refused(tmp_path: Path) -> None:
    model = model_of(packed(10, 20))
    model.graph.input.append(oh.make_tensor_value_info("fc.values", TensorProto.FLOAT, ["values"]))
    onnx.save(model, tmp_path / "sparse.onnx")
    with pytest.raises(ArtifactError, match="values of fc is not a constant"):
        densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")


@pytest.mark.parametrize("name", ["dense.onnx", "dense.onnx.data"])
def test_a_file_that_exists_is_kept(name: str, tmp_path: Path) -> None:
    onnx.save(model_of(packed(10, 20)), tmp_path / "sparse.onnx")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match="already exists"):
        densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ArtifactError, match="cannot be read"):
        densify(tmp_path / "text.onnx", tmp_path / "dense.onnx")


PEAK = """
import sys
from zeroskip.runtime.onnx.densify import densify

def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1e3

open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = megabytes("VmRSS")
densify(sys.argv[1], sys.argv[2], external_from=0)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_one_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    size, layers = 1024, 24
    made = [
        make_sparse_linear(packed(size, size, seed=i), f"h{i}", f"h{i + 1}", name=f"fc{i}")
        for i in range(layers)
    ]
    info = oh.make_tensor_value_info
    graph = oh.make_graph(
        [layer.node for layer in made],
        "graph",
        [info("h0", TensorProto.FLOAT, ["m", size])],
        [info(f"h{layers}", TensorProto.FLOAT, ["m", size])],
        [tensor for layer in made for tensor in layer.initializers],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "sparse.onnx", save_as_external_data=True)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "sparse.onnx"), str(tmp_path / "d.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dense = size * size * 4 / 1e6
    assert (tmp_path / "d.onnx.data").stat().st_size >= layers * dense * 1e6
    assert float(done.stdout) < 0.7 * layers * dense
