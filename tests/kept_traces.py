"""What torch.export does is done once for each graph: tests of what happens to it share it.

Tracing takes seconds, and most tests that compile or export are not about it. A model of the same
class, configuration, parameters and example inputs gets the graph of the first one, over its own
weights; the same graph gets the same ONNX operators, over its own weights. Tests of capturing and of
translating call the real functions, and so does every other process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zeroskip.ir.capture import capture
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.weights import Weights

if TYPE_CHECKING:
    import onnx_ir

    from zeroskip.runtime.onnx.skeleton import Skeleton


def keep_captures() -> Callable[..., Program]:
    """Returns a function that stands in for `capture`, with graphs of its own to keep."""
    kept: dict[Hashable, Program] = {}

    def kept_capture(
        model: nn.Module,
        example_inputs: Batch,
        *,
        dynamic_shapes: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        trace_inputs: Batch | None = None,
    ) -> Program:
        key = None if dynamic_shapes is not None else _key(model, example_inputs, weights is None)
        if key is None or key not in kept:
            program = capture(
                model,
                example_inputs,
                dynamic_shapes=dynamic_shapes,
                weights=weights,
                trace_inputs=trace_inputs,
            )
            if key is not None:
                kept[key] = program
            return program
        own = Weights(dict(model.named_parameters())) if weights is None else weights
        first = kept[key]
        program = first.with_weights({name: own.source(name) for name in first.read_weights()})
        return dataclasses.replace(
            program, weights=own, example_inputs=dict(example_inputs), model=model
        )

    return kept_capture


capture_once = keep_captures()


def _key(model: nn.Module, inputs: Batch, live: bool) -> Hashable:
    """What a trace depends on; None where that is not known, or where tracing is to fail."""
    config = getattr(model, "config", None)
    if model.training or "forward" in model.__dict__ or not hasattr(config, "to_dict"):
        return None
    if not all(isinstance(value, torch.Tensor) for value in inputs.values()):
        return None
    if any(buffer.is_meta for buffer in model.buffers()):
        return None
    without_place = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    return (
        tuple(type(module) for module in model.modules()),
        json.dumps(without_place, sort_keys=True, default=str),
        live,
        tuple((name, p.shape, p.dtype) for name, p in model.named_parameters()),
        tuple((name, _digest(buffer)) for name, buffer in model.named_buffers()),
        tuple((name, value.shape, value.dtype) for name, value in inputs.items()),
    )


@functools.cache
def keep_translations() -> Callable[..., onnx_ir.Model]:
    """Returns the one function that stands in for `_standard_operators` of `translate`."""
    from zeroskip.runtime.onnx import translate

    real = translate._standard_operators
    kept: dict[Hashable, onnx_ir.Model] = {}

    def kept_translation(skeleton: Skeleton, shapes: Any, *rest: Any) -> onnx_ir.Model:
        module = skeleton.graph_module
        leaves, structure = pytree.tree_flatten(skeleton.example_inputs)
        *settings, table = rest
        key = (
            module.code,
            tuple((name, p.shape, p.dtype) for name, p in module.named_parameters()),
            tuple((name, _digest(buffer)) for name, buffer in module.named_buffers()),
            str(structure),
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
            str(shapes),
            str(settings),
            tuple(table.items()),
        )
        if key not in kept:
            kept[key] = real(skeleton, shapes, *rest)
        return kept[key].clone()

    return kept_translation


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()
