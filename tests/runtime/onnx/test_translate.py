"""The translation: names, data that is read late, masks, fused operators, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from onnx_models import parameters
from torch import nn

import zeroskip.ir.ops  # noqa: F401  (registers masked_linear)
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.weights import Weights, pack_bits
from zeroskip.runtime.onnx import transformers_patches
from zeroskip.runtime.onnx.folder import save_model
from zeroskip.runtime.onnx.masked_linear import masked_linear_operator
from zeroskip.runtime.onnx.session import OnnxModel
from zeroskip.runtime.onnx.translate import translate

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
AXES = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}


def graph_of(module: nn.Module) -> torch.fx.GraphModule:
    with torch.no_grad():
        program = torch.export.export(module, (), {"input": X}, dynamic_shapes=AXES, strict=False)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, torch.fx.GraphModule)
    return graph_module


def model_of(
    module: nn.Module, weights: Mapping[str, torch.Tensor] | None = None, **options: Any
) -> onnx_ir.Model:
    return translate(
        graph_of(module),
        example_inputs={"input": X},
        dynamic_shapes=AXES,
        weights=parameters(module) if weights is None else weights,
        input_names=["input"],
        output_names=["y"],
        **options,
    )


def run(model: onnx_ir.Model, folder: Path, x: torch.Tensor = X) -> torch.Tensor:
    save_model(model, folder)
    return OnnxModel(folder, threads=1).run({"input": x})["y"]


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias)


class Masked(nn.Module):
    """A masked linear, and optionally a plain use of the same weight."""

    def __init__(self, keep: torch.Tensor, bias: bool, tied: bool = False) -> None:
        super().__init__()
        inner = linear(bias)
        self.weight, self.bias, self.tied = inner.weight, inner.bias, tied
        self.register_buffer("mask_bits", pack_bits(keep))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        operator = masked_linear_operator()
        assert operator is not None
        y: torch.Tensor = operator(input, self.weight, self.mask_bits, self.bias)
        return y @ self.weight if self.tied else y


KEEP = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.5


class Counting(Mapping[str, torch.Tensor]):
    """Weights that remember which were read."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.read = weights, list[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def test_weights_are_read_when_saved_and_not_before(tmp_path: Path) -> None:
    module = nn.Sequential(linear(), nn.ReLU(), nn.Linear(5, 2))
    weights = Counting(parameters(module))
    model = model_of(module, weights)
    assert weights.read == []
    torch.testing.assert_close(run(model, tmp_path), module(X))
    assert sorted(set(weights.read)) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_the_file_keeps_the_orientation_of_the_checkpoint(tmp_path: Path) -> None:
    module = linear()
    save_model(model_of(module), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert (stored["weight"] == module.weight.detach().numpy()).all()
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch_size", "sequence_length", 6]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    model = model_of(linear(), opset=opset)
    assert model.opset_imports[""] == opset
    torch.testing.assert_close(run(model, tmp_path), linear()(X))


@pytest.mark.parametrize("bias", [True, False])
def test_masked_linear_is_a_product_with_the_masked_weight(bias: bool, tmp_path: Path) -> None:
    module = Masked(KEEP, bias)
    y = run(model_of(module), tmp_path)
    expected = nn.functional.linear(X, module.weight * KEEP, module.bias)
    torch.testing.assert_close(y, expected)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {t.name for t in graph.initializer} == {"weight", *(["bias"] if bias else [])}
    assert {node.op_type for node in graph.node} <= {"MatMul", "Transpose", "Add"}


def test_a_swapped_mask_is_honoured(tmp_path: Path) -> None:
    module = Masked(KEEP, bias=True)
    graph_module = graph_of(module)
    graph_module.get_buffer("mask_bits").copy_(pack_bits(~KEEP))
    model = translate(
        graph_module,
        example_inputs={"input": X},
        dynamic_shapes=AXES,
        weights=parameters(module),
        input_names=["input"],
        output_names=["y"],
    )
    expected = nn.functional.linear(X, module.weight * ~KEEP, module.bias)
    torch.testing.assert_close(run(model, tmp_path), expected)


def test_a_tied_weight_must_hold_its_zeros(tmp_path: Path) -> None:
    module = Masked(KEEP, bias=False, tied=True)
    with pytest.raises(LoweringError, match="read unmasked in another"):
        save_model(model_of(module), tmp_path)
    with torch.no_grad():
        module.weight.mul_(KEEP)
    expected = nn.functional.linear(X, module.weight) @ module.weight
    torch.testing.assert_close(run(model_of(module), tmp_path), expected)


def test_a_missing_weight_is_named() -> None:
    module = linear()
    with pytest.raises(LoweringError, match="reads parameter 'bias'"):
        model_of(module, Weights({"weight": module.weight}))


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    weights = parameters(linear()).replace({"weight": torch.zeros(6, 5)})
    with pytest.raises(LoweringError, match=r"shape \(6, 5\), but the graph needs \(5, 6\)"):
        save_model(model_of(linear(), weights), tmp_path)


@torch.library.custom_op("zeroskip_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = twice(input)
        return y


def test_an_unknown_operator_is_refused_until_it_is_translated(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="twice") as caught:
        model_of(Twice())
    assert "translation_table" in str(caught.value.next_step)
    from onnxscript.onnx_opset import opset18 as op

    table = {torch.ops.zeroskip_test.twice.default: lambda x: op.Add(x, x)}
    torch.testing.assert_close(run(model_of(Twice(), translation_table=table), tmp_path), X * 2)


def test_a_moved_private_function_is_named() -> None:
    with pytest.raises(LoweringError, match=r"no transformers\.exporters\.utils\.gone"):
        transformers_patches._private("transformers.exporters.utils", "gone")
