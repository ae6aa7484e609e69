"""Runs a model with packed weights in plain ONNX Runtime; without arguments, one that it makes.

python examples/onnxruntime/python/run_sparse.py [MODEL]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from zeroskip.ir.formats import pack_bitmask
from zeroskip.runtime.onnx.custom_ops import custom_ops_path
from zeroskip.runtime.onnx.sparse_linear import add_functions, make_sparse_linear


def make_model(path: Path) -> torch.Tensor:
    """Writes one linear layer, 512 to 1024, that keeps a quarter of its weights; returns them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 512, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.75] = 0
    layer = make_sparse_linear(pack_bitmask(weight), "X", "Y", name="fc")
    graph = helper.make_graph(
        [layer.node],
        "example",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["tokens", 512])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["tokens", 1024])],
        layer.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    add_functions(model)  # so that it also runs where the library is not registered
    onnx.save(model, path)
    return weight


def open_sparse(path: Path) -> onnxruntime.InferenceSession:
    """Opens a model with the kernels: registering the library is all there is to it."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(custom_ops_path())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Runs the model and says what came out."""
    if len(sys.argv) > 1:
        session = open_sparse(Path(sys.argv[1]))
        for value in [*session.get_inputs(), *session.get_outputs()]:
            print(f"{value.name}: {value.type} {value.shape}")
        return
    path = Path(tempfile.mkdtemp()) / "sparse.onnx"
    weight = make_model(path)
    x = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
    (y,) = open_sparse(path).run(None, {"X": x})
    error = np.abs(y - x @ weight.T.numpy()).max()
    print(f"Y {y.shape}, at most {error:.1e} from the dense product")
    if error > 1e-3:
        sys.exit("The kernels do not compute the dense product.")


if __name__ == "__main__":
    main()
