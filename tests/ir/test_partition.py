"""Stages are the layers of a model, found from its dataflow and from no name."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import Node

from tests.renaming import rename_modules
from tests.zoo import GROUPED, TRANSLATION, VOCABULARY, ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.dataflow import find_dependence
from zeroskip.ir.linears import find_linears
from zeroskip.ir.partition import Stage, find_stages
from zeroskip.ir.program import Program


def layers(*prefixes: str) -> list[str]:
    return [f"{prefix}.{i}" for prefix in prefixes for i in range(2)]


LAYERS = {
    **dict.fromkeys(["llama", "llama_tied", "qwen2", "qwen3", "mistral"], layers("model.layers")),
    **dict.fromkeys(["gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe"], layers("model.layers")),
    "opt": layers("model.decoder.layers"),
    "gpt2": layers("transformer.h"),
    "falcon": layers("transformer.h"),
    "gpt_neox": layers("gpt_neox.layers"),
    "bert": layers("encoder.layer"),
    "roberta": layers("encoder.layer"),
    "distilbert": layers("transformer.layer"),
    "vit": layers("vit.layers"),
    "whisper_encoder": layers("layers"),
    "t5": layers("encoder.block", "decoder.block"),
    "clip": layers("vision_model.encoder.layers", "text_model.encoder.layers"),
    "mlp": [],
    "convnet": [],
}


def layer_of(node: Node, names: list[str]) -> str | None:
    """Which of the layers a node was traced in, read from the metadata of torch.export."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return next((name for name in names if name in paths), None)


def repeated(stages: list[Stage]) -> list[Stage]:
    """The stages that compute the same as their neighbour."""
    counts = [Counter(str(node.target) for node in stage.nodes) for stage in stages]
    return [
        stage
        for i, stage in enumerate(stages)
        if counts[i] in (counts[i - 1] if i else None, counts[i + 1] if i + 1 < len(counts) else None)
    ]  # fmt: skip


def check_cover(program: Program, stages: list[Stage]) -> None:
    """Every activation is in one stage, and stages need only what earlier ones give out."""
    activations = find_dependence(program).activations
    assert sorted(n.name for s in stages for n in s.nodes) == sorted(n.name for n in activations)
    given: set[Node] = set()
    for stage in stages:
        assert set(stage.inputs) <= given, stage.name
        inside = set(stage.nodes)
        for node in stage.nodes:
            needed = {i for i in node.all_input_nodes if i in activations}
            assert needed <= inside | set(stage.inputs)
            if any(user not in inside for user in node.users):
                assert node in stage.outputs
        given |= set(stage.outputs)
    assert [stage.name for stage in stages] == [f"stage {i}" for i in range(len(stages))]


def test_every_layer_of_the_zoo_is_a_stage(arch: str, captured: Callable[[str], Program]) -> None:
    program = captured(arch)
    stages = find_stages(program)
    expected = LAYERS[arch]
    assert [s.modules for s in stages if s.modules] == [(name,) for name in expected]
    # The label above could be true by luck: compare node by node with the trace's own record.
    for stage in stages:
        inside = {layer_of(node, expected) for node in stage.nodes} - {None}
        assert inside <= set(stage.modules)
    for name in expected:
        home = [s for s in stages if s.modules == (name,)]
        linears = [n for n in find_linears(program) if n.name.startswith(f"{name}.")]
        assert linears
        for use in (use for linear in linears for use in linear.uses):
            assert use.node in home[0].nodes
    check_cover(program, stages)


def test_decoders_carry_one_tensor(arch: str, captured: Callable[[str], Program]) -> None:
    stages = find_stages(captured(arch))
    if ZOO[arch].kind in ("causal-lm", "encoder", "vision"):
        assert [len(stage.inputs) for stage in stages] == [0] + [1] * (len(stages) - 1)
        assert len(stages) == len(LAYERS[arch]) + (1 if arch == "distilbert" else 2)
    elif arch == "t5":
        # A decoder layer also reads what the encoder gave out.
        assert [len(stage.inputs) for stage in stages if stage.modules] == [1, 1, 2, 2]


def small_t5(encoder: int, decoder: int) -> nn.Module:
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_heads=4, vocab_size=VOCABULARY,
        num_layers=encoder, num_decoder_layers=decoder, **TRANSLATION,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).eval()


def test_six_layers() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 6})).eval()
    program = capture(model, ZOO["llama"].inputs())
    stages = find_stages(program)
    assert [s.modules for s in stages] == [(), *((f"model.layers.{i}",) for i in range(6)), ()]
    check_cover(program, stages)


def test_deeper_encoder_and_decoder() -> None:
    encoder, decoder = 4, 3
    program = capture(small_t5(encoder, decoder), ZOO["t5"].inputs())
    stages = find_stages(program)
    expected = [(f"encoder.block.{i}",) for i in range(encoder)]
    expected += [(f"decoder.block.{i}",) for i in range(decoder)]
    assert [s.modules for s in stages if s.modules] == expected
    check_cover(program, stages)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_names_play_no_part(name: str, captured: Callable[[str], Program]) -> None:
    model = ZOO[name].model()
    rename_modules(model)
    program = capture(model, ZOO[name].inputs())
    stages, original = find_stages(program), find_stages(captured(name))
    assert [s.modules for s in stages] == [()] * len(original)
    targets = [[str(n.target) for n in stage.nodes] for stage in stages]
    assert targets == [[str(n.target) for n in stage.nodes] for stage in original]
    check_cover(program, stages)


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


def test_residual_blocks_without_index() -> None:
    names = ["alpha", "beta", "gamma", "delta"]
    blocks = OrderedDict[str, nn.Module]((name, Residual(16, 24)) for name in names)
    model = nn.Sequential(OrderedDict([("stem", nn.Linear(8, 16)), *blocks.items()]))
    program = capture(model.eval(), {"input": torch.randn(2, 8)})
    stages = find_stages(program)
    linears = [
        [n.parameter for n in find_linears(program) if n.uses[0].node in stage.nodes]
        for stage in stages
    ]
    assert linears == [["stem.weight"], *([f"{n}.up.weight", f"{n}.down.weight"] for n in names)]
    assert [stage.modules for stage in stages] == [()] * 5
    check_cover(program, stages)


def test_blocks_of_different_width_do_not_repeat() -> None:
    model = nn.Sequential(Residual(16, 24), Residual(16, 32), Residual(16, 40)).eval()
    program = capture(model, {"input": torch.randn(2, 16)})
    (stage,) = find_stages(program)
    assert stage.inputs == ()
    check_cover(program, [stage])


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_a_model_without_repetition_is_one_stage(
    name: str, captured: Callable[[str], Program]
) -> None:
    program = captured(name)
    (stage,) = find_stages(program)
    assert stage.outputs == tuple(program.graph.output_node().args[0])  # type: ignore[arg-type]


def test_one_layer_is_one_stage() -> None:
    config = hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})
    program = capture(hf.LlamaForCausalLM(config).eval(), ZOO["llama"].inputs())
    (stage,) = find_stages(program)
    check_cover(program, [stage])


def test_a_value_that_jumps_over_layers_is_carried() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual(16, 24) for _ in range(3))
            self.stem = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            start = hidden = self.stem(x)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden + start

    program = capture(Skips().eval(), {"x": torch.randn(2, 8)})
    stages = find_stages(program)
    check_cover(program, stages)
    assert repeated(stages) or len(stages) == 1


def test_a_program_without_parameters_has_no_stages() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.relu() + 1

    assert find_stages(capture(Plain().eval(), {"x": torch.randn(2, 8)})) == []
