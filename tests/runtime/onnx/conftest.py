"""Makes the zoo importable whichever way pytest is started, and keeps torch on one thread."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo import ZOO

from zeroskip.ir.capture import capture
from zeroskip.ir.weights import Weights
from zeroskip.runtime.onnx.export import OnnxArtifact, export_onnx

torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a model of the zoo, once per session."""
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            entry = ZOO[name]
            model = entry.model()
            target = tmp_path_factory.mktemp("onnx") / name
            if entry.kind == "causal-lm":
                artifact = export_onnx(
                    target, weights=parameters(model), reference=logits_of(model), model=model
                )
            else:
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
            done[name] = Exported(model, artifact)
        return done[name]

    return export


@pytest.fixture(scope="session")
def small_llama() -> nn.Module:
    """One layer, so that a test that exports its own file stays fast."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
