"""What the tests of the ONNX export share: weights and references of live models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO

from tests.kept_traces import capture_once as capture
from zeroskip.ir.weights import Weights
from zeroskip.runtime.onnx.export import OnnxArtifact, export_onnx


@dataclass(frozen=True, eq=False)
class Exported:
    """A model of the zoo and what its export wrote."""

    model: nn.Module
    artifact: OnnxArtifact


def parameters(model: nn.Module) -> Weights:
    """Returns the parameters of a live model, tied ones once."""
    return Weights({name: value.detach() for name, value in model.named_parameters()})


def logits_of(model: nn.Module) -> Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Returns the model without its cache, as a reference for `check_parity`."""

    def reference(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**inputs, use_cache=False).logits]

    return reference


def export_entry(name: str, target: Path) -> Exported:
    """Exports a model of the zoo as it was captured, compared with its program."""
    entry = ZOO[name]
    model = entry.model()
    program = capture(model, entry.inputs())
    artifact = export_onnx(
        target,
        weights=program.weights,
        reference=lambda inputs: list(program.run(inputs).values()),
        model=model,
        graph_module=program.graph_module,
        example_inputs=program.example_inputs,
        output_names=program.outputs,
    )
    return Exported(model, artifact)


def small_llama() -> nn.Module:
    """Returns one layer with grouped attention and two end tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    return LlamaForCausalLM(config).eval()


def without_data(model: nn.Module) -> nn.Module:
    """Returns a copy whose parameters are FakeTensors on the CPU; buffers stay."""
    skeleton = copy.deepcopy(model)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for module in skeleton.modules():
        for name, value in module._parameters.items():
            if value is not None:
                with mode:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return skeleton
