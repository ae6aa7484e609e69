"""linear_24 and bitmap_linear in ONNX: a product with a dense weight, zeros included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from onnx_models import parameters
from torch import Tensor, nn

from zeroskip.ir.bitmap import pack_bitmap
from zeroskip.ir.bitmap_linear import bitmap_linear
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.fragments import to_fragments
from zeroskip.ir.linear_24 import linear_24
from zeroskip.ir.packing import Packing
from zeroskip.ir.semi_structured import pack_semi_structured
from zeroskip.runtime.onnx.folder import save_model
from zeroskip.runtime.onnx.session import OnnxModel
from zeroskip.runtime.onnx.translate import translate

AXES = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
COLUMNS, ROWS = 76, 21


def random_weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    order = torch.rand(groups.shape, generator=generator).argsort(-1)
    return groups.masked_fill(order > 1, 0).reshape(rows, columns)


def random_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


class Product(nn.Module):
    """One product with a packed weight.

    Args:
        kind: The operator, and the form of its weight.
        bias: Whether there is one.
        parameters: Whether the operands are parameters; else they are buffers.
        computed: Whether the graph computes the operands.
    """

    def __init__(
        self,
        kind: str,
        bias: bool = True,
        parameters: bool = True,
        computed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.kind, self.computed = kind, computed
        self.dense = random_weight().to(dtype)
        self.bias = nn.Parameter(torch.linspace(-1, 1, ROWS).to(dtype)) if bias else None
        self.fc = nn.Module()
        for name, tensor in packed(kind, self.dense).items():
            if parameters:
                self.fc.register_parameter(f"weight_{name}", nn.Parameter(tensor, False))
            else:
                self.fc.register_buffer(f"weight_{name}", tensor)

    def operand(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self.fc, f"weight_{name}")
        return tensor.reshape(-1).clone().reshape(tensor.shape) if self.computed else tensor

    def forward(self, input: Tensor) -> Tensor:
        if self.kind == "bitmap":
            operands = [self.operand(name) for name in ("bits", "starts", "values")]
            return bitmap_linear(input, *operands, self.bias)
        rows = ROWS if self.kind == "fragments" else 0
        return linear_24(input, self.operand("values"), self.operand("codes"), self.bias, rows)


def packed(kind: str, weight: Tensor) -> dict[str, Tensor]:
    if kind == "bitmap":
        bits = pack_bitmap(weight)
        return {"bits": bits.bits, "starts": bits.starts, "values": bits.values}
    canonical = pack_semi_structured(weight)
    values, codes = (
        to_fragments(canonical) if kind == "fragments" else (canonical.values, canonical.codes)
    )
    return {"values": values, "codes": codes}


def graph_of(module: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    with torch.no_grad():
        program = torch.export.export(module, (), {"input": x}, dynamic_shapes=AXES, strict=False)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, torch.fx.GraphModule)
    return graph_module


def model_of(
    module: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    change: Callable[[torch.fx.GraphModule], None] = lambda graph_module: None,
    dtype: torch.dtype = torch.float32,
) -> onnx_ir.Model:
    x = random_input(dtype)
    graph_module = graph_of(module, x)
    change(graph_module)
    return translate(
        graph_module,
        example_inputs={"input": x},
        dynamic_shapes=AXES,
        weights=parameters(module) if weights is None else weights,
        input_names=["input"],
        output_names=["y"],
    )


def run(model: onnx_ir.Model, folder: Path) -> Tensor:
    save_model(model, folder)
    return OnnxModel(folder, threads=1).run({"input": random_input()})["y"]


def stored(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """The initializers by name, and the operators, of the file that was written."""
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return arrays, {node.op_type for node in graph.node}


kinds = pytest.mark.parametrize("kind", ["canonical", "bitmap"])


@kinds
@pytest.mark.parametrize(("bias", "as_parameters"), [(True, True), (False, False)])
def test_a_product_with_a_dense_weight(
    kind: str, bias: bool, as_parameters: bool, tmp_path: Path
) -> None:
    module = Product(kind, bias, as_parameters)
    y = run(model_of(module), tmp_path)
    torch.testing.assert_close(y, module(random_input()))
    arrays, operators = stored(tmp_path)
    assert set(arrays) == {"fc.weight", *(["bias"] if bias else [])}
    assert (arrays["fc.weight"] == module.dense.numpy()).all()
    assert operators <= {"MatMul", "Transpose", "Add", "Gemm"}


@pytest.mark.parametrize("kind", ["canonical", "fragments", "bitmap"])
@pytest.mark.parametrize(
    ("dtype", "as_parameters"), [(torch.bfloat16, True), (torch.float16, False)]
)
def test_16_bit_weights_are_widened(
    kind: str, dtype: torch.dtype, as_parameters: bool, tmp_path: Path
) -> None:
    module = Product(kind, parameters=as_parameters, dtype=dtype)
    y = run(model_of(module, dtype=dtype), tmp_path)
    expected = nn.functional.linear(random_input(), module.dense.float(), module.bias.float())  # type: ignore[union-attr]
    torch.testing.assert_close(y, expected)
    arrays, _ = stored(tmp_path)
    assert (arrays["fc.weight"] == module.dense.float().numpy()).all()


@kinds
def test_operands_that_the_graph_computes_are_unpacked_in_it(kind: str, tmp_path: Path) -> None:
    module = Product(kind, computed=True)
    y = run(model_of(module), tmp_path)
    torch.testing.assert_close(y, module(random_input()))
    arrays, operators = stored(tmp_path)
    assert "fc.weight" not in arrays
    assert {"fc.weight_values", "bias"} <= set(arrays)
    assert "Where" in operators


def test_computed_fragments_are_refused() -> None:
    module = Product("fragments", computed=True, dtype=torch.bfloat16)
    with pytest.raises(LoweringError, match="fragments"):
        model_of(module, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "transposed"), [("canonical", True), ("canonical", False), ("bitmap", True)]
)
def test_the_packed_parameter_gives_name_and_orientation(
    kind: str, transposed: bool, tmp_path: Path
) -> None:
    module = Product(kind)

    def mark(graph_module: torch.fx.GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if "zeroskip" in str(node.target):
                node.meta["packing"] = Packing("h.0.c_attn.weight", transposed)

    y = run(model_of(module, change=mark), tmp_path)
    torch.testing.assert_close(y, module(random_input()))
    arrays, _ = stored(tmp_path)
    weight = arrays["h.0.c_attn.weight"]
    assert (weight == (module.dense.T if transposed else module.dense).numpy()).all()


class Thrice(nn.Module):
    """A packed weight that is read three times, and a dense one of the name that it would have."""

    def __init__(self) -> None:
        super().__init__()
        weight = pack_semi_structured(random_weight(COLUMNS))
        self.weight_values = nn.Parameter(weight.values)
        self.register_buffer("weight_codes", weight.codes)
        self.weight = nn.Parameter(torch.ones(COLUMNS))

    def forward(self, input: Tensor) -> Tensor:
        y = linear_24(input, self.weight_values, self.weight_codes)
        y = linear_24(y, self.weight_values, self.weight_codes)
        return linear_24(y * self.weight, self.weight_values, self.weight_codes)


def test_a_weight_that_is_read_often_is_stored_once(tmp_path: Path) -> None:
    module = Thrice()
    torch.testing.assert_close(run(model_of(module), tmp_path), module(random_input()))
    assert set(stored(tmp_path)[0]) == {"weight", "weight_values_dense"}


class Counting(Mapping[str, Tensor]):
    """Weights that remember which were read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.read = weights, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Any:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


@kinds
def test_operands_are_read_when_saved_and_not_before(kind: str, tmp_path: Path) -> None:
    module = Product(kind)
    weights = Counting(parameters(module))
    model = model_of(module, weights)
    assert weights.read == []
    save_model(model, tmp_path)
    assert "fc.weight_values" in weights.read


def test_a_contradiction_shows_when_it_is_saved(tmp_path: Path) -> None:
    module = Product("canonical")
    weights = parameters(module)
    wrong = weights.replace({"fc.weight_codes": torch.zeros_like(weights["fc.weight_codes"])})
    with pytest.raises(LoweringError, match="name no two columns"):
        save_model(model_of(module, wrong), tmp_path)
