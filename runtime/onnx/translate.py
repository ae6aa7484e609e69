"""From an ATen graph to an ONNX model whose weights are read only when the file is written.

The graph is exported again over parameters that have a shape and no data, so nothing can be folded
into them or copied; afterwards each parameter's initializer is bound to a lazy tensor under its own
name, in the orientation of the checkpoint. Everything is float32 in the file: bfloat16 and float16
graphs are widened first, because ONNX Runtime's CPU kernels do not cover them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tensor_adapters import TorchTensor
from torch._subclasses.fake_tensor import FakeTensor

from zeroskip.ir.errors import LoweringError
from zeroskip.runtime.onnx.axes import AxisNames, name_axes
from zeroskip.runtime.onnx.masked_linear import (
    MaskedWeights,
    masked_linear_translation,
    masked_weights,
)
from zeroskip.runtime.onnx.packed_linear import add_body, sparse_linear_translation
from zeroskip.runtime.onnx.skeleton import NARROW, Skeleton, strip_data
from zeroskip.runtime.onnx.transformers_patches import graph_fixes, onnx_patches, translations
from zeroskip.runtime.onnx.unpacked_linear import unpack_linears, unpacking_translation

OPSET = 20
NOISY = (
    "torch.onnx._internal.exporter._registration",
    "onnx_ir.passes.common.initializer_deduplication",
)
Translations = Mapping[Callable[..., Any], Callable[..., Any]]


def translate(
    graph_module: torch.fx.GraphModule,
    *,
    example_inputs: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    axis_names: AxisNames | None = None,
    opset: int = OPSET,
    translation_table: Translations | None = None,
) -> onnx_ir.Model:
    """Translates an unlifted ATen graph; the initializers of `weights` load when they are saved.

    Args:
        graph_module: Not changed. Its parameters may be real, narrow or FakeTensors: only their
            shapes are used. Its buffers must hold data.
        example_inputs: Keywords it was traced with; only shapes and dtypes are used.
        dynamic_shapes: As given to `torch.export`; None takes the axes that are symbolic in the
            metadata of the placeholders.
        weights: Parameter name to tensor, read one at a time. Every parameter of the graph must be
            in it under one of the names that share it.
        input_names: Flat names in the order of the flattened `example_inputs`.
        output_names: Flat names in the order of the flattened outputs.
        axis_names: Input or output name -> axis -> name of that dynamic axis.
        opset: Version of the standard operators.
        translation_table: Operator -> onnxscript function, over and above the built-in ones.

    Raises:
        LoweringError: A parameter has no weight, or an operator has no ONNX form.
    """
    skeleton = strip_data(graph_module, example_inputs, weights)
    weights = unpack_linears(skeleton, weights)
    masked = masked_weights(skeleton.graph_module)
    table = {
        **translations(),
        **masked_linear_translation(),
        **sparse_linear_translation(),
        **unpacking_translation(),
        **(translation_table or {}),
    }
    try:
        shapes = _symbolic_axes(graph_module) if dynamic_shapes is None else dict(dynamic_shapes)
        model = _standard_operators(
            skeleton, shapes, list(input_names), list(output_names), opset, table
        )
    # torch.export and torch.onnx raise many types, private ones too; each means the same here.
    except Exception as error:
        raise LoweringError(
            f"the graph has no ONNX form at opset {opset}: {error}",
            where="translate",
            next_step="give translation_table a function for the operator, or export before lowering",
        ) from error
    # Metadata holds Python stack traces: paths of the machine that exported, and most of the size.
    ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    name_axes(model, axis_names or {})
    _bind(model, weights, masked)
    add_body(model)
    return model


def _symbolic_axes(graph_module: torch.fx.GraphModule) -> dict[str, dict[int, Any]]:
    return {
        str(node.target): {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        }
        for node in graph_module.graph.find_nodes(op="placeholder")
    }


def _standard_operators(
    skeleton: Skeleton,
    dynamic_shapes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    opset: int,
    table: Translations,
) -> onnx_ir.Model:
    """Exports, translates and optimizes; initializers of parameters come back without a value."""
    with torch.no_grad(), onnx_patches(), _quiet():
        program = torch.export.export(
            skeleton.graph_module,
            (),
            skeleton.example_inputs,
            dynamic_shapes=dynamic_shapes,
            strict=False,
        )
        graph_fixes(program.graph_module)
        translated = torch.onnx.export(
            program,
            (),
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            custom_translation_table=dict(table),
            optimize=False,
            dynamo=True,
            verbose=False,
        )
        assert translated is not None
        model = translated.model
        for value in model.graph.initializers.values():
            # Without a value the optimizer can neither fold a parameter nor fail on reading it.
            if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
                value.const_value = None
        onnxscript.optimizer.optimize_ir(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings about what is intended here: no torchvision, initializers without data."""
    saved = [(logger, logger.level) for logger in map(logging.getLogger, NOISY)]
    try:
        for logger, _ in saved:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # torch.export copies its own deprecated tree specs.
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            yield
    finally:
        for logger, level in saved:
            logger.setLevel(level)


def _bind(model: onnx_ir.Model, weights: Mapping[str, torch.Tensor], masked: MaskedWeights) -> None:
    """Gives every parameter's initializer a tensor that is loaded, widened and masked on demand."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(int(dim) for dim in value.shape if isinstance(dim, int))

        narrow = value.dtype in (onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT16)

        def load(
            name: str = name, shape: tuple[int, ...] = shape, narrow: bool = narrow
        ) -> TorchTensor:
            weight = weights[name].detach()
            if tuple(weight.shape) != shape:
                raise LoweringError(
                    f"{name!r} has shape {tuple(weight.shape)}, but the graph needs {shape}",
                    where=name,
                    next_step="pass the weights of the model that was captured",
                )
            weight = masked.apply(name, weight.cpu())
            # Only the values of packed weights are narrow in the graph.
            widened = weight.float() if weight.dtype in NARROW and not narrow else weight
            return TorchTensor(widened.contiguous(), name=name)

        value.const_value = onnx_ir.LazyTensor(load, value.dtype, value.shape, name=name)
