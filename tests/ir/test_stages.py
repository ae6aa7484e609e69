"""Stages run one after the other, or stitched together, compute what the whole program computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.facts import Roles
from zeroskip.ir.linears import find_linears
from zeroskip.ir.partition import find_stages
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.stages import extract_stage, merge_facts, stitch_stages
from zeroskip.ir.statistics import EdgeStatistics, Statistics
from zeroskip.ir.verify import verify


def run_stages(program: Program, inputs: Batch) -> dict[str, Tensor]:
    """Every value that the stages give out, by name, each stage fed by the ones before."""
    values = dict(inputs)
    for stage in find_stages(program):
        part = extract_stage(program, stage, [values])
        assert part.inputs[: len(stage.inputs)] == tuple(node.name for node in stage.inputs)
        values.update(part.run(part.calibration[0]))
    return values


def assert_equal_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def parts_of(program: Program, inputs: Batch | None = None) -> list[Program]:
    stages = find_stages(program)
    batches = [] if inputs is None else [inputs]
    return [extract_stage(program, stage, batches) for stage in stages]


@pytest.mark.parametrize("padded", [False, True])
def test_stages_in_sequence_equal_the_whole_bitwise(
    arch: str, captured: Callable[[str], Program], padded: bool
) -> None:
    program = captured(arch)
    inputs = ZOO[arch].inputs(3, 6, padded)
    values = run_stages(program, inputs)
    results: Any = program.graph.output_node().args[0]
    found = {name: values[n.name] for name, n in zip(program.outputs, results, strict=True)}
    assert_equal_outputs(found, program.run(inputs))


def test_a_stage_is_a_valid_program_with_its_own_weights(
    arch: str, captured: Callable[[str], Program]
) -> None:
    program = captured(arch)
    values: dict[str, Tensor] = dict(ZOO[arch].inputs())
    owners: list[set[str]] = []
    for stage in find_stages(program):
        part = extract_stage(program, stage, [values])
        verify(part, after="extract_stage")
        assert set(part.weights) == set(part.read_weights())
        assert part.model is None
        for name in part.weights:
            assert part.weights.source(name) is program.weights.source(name)
        owners.append({linear.name for linear in find_linears(part)})
        values.update(part.run(part.example_inputs))
    names = [linear.name for linear in find_linears(program)]
    assert sorted(name for owner in owners for name in owner) == sorted(names)


def test_stitched_stages_equal_the_whole_bitwise(
    arch: str, captured: Callable[[str], Program]
) -> None:
    program = captured(arch)
    whole = stitch_stages(program, parts_of(program))
    verify(whole, after="stitch_stages")
    inputs = ZOO[arch].inputs(3, 6, padded=True)
    assert_equal_outputs(whole.run(inputs), program.run(inputs))
    assert (whole.inputs, whole.outputs) == (program.inputs, program.outputs)
    # Masks and positions, copied into every stage, are computed once again.
    assert len(whole.graph.nodes) <= len(program.graph.nodes)
    targets = [n.target for n in whole.graph.find_nodes(op="get_attr")]
    assert len(set(targets)) == len(targets)
    assert all(whole.weights.source(n) is program.weights.source(n) for n in program.weights)


def test_masks_are_computed_again_inside_a_stage(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    second = parts_of(program)[2]
    assert second.inputs[1:] == ("attention_mask",)
    assert second.padding_masks == ("attention_mask",)
    whole = sum(len(part.graph.nodes) for part in parts_of(program))
    assert whole > len(program.graph.nodes)


def test_a_changed_weight_of_a_part_reaches_the_whole(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    parts = parts_of(program)
    name = "model.layers.1.mlp.down_proj.weight"
    (index,) = [i for i, part in enumerate(parts) if name in part.weights]
    parts[index] = parts[index].with_weights({name: torch.zeros_like(program.weights[name])})
    whole = stitch_stages(program, parts)
    expected = program.with_weights({name: torch.zeros_like(program.weights[name])})
    inputs = ZOO["llama"].inputs(2, 5, padded=True)
    assert_equal_outputs(whole.run(inputs), expected.run(inputs))
    assert not torch.equal(whole.run(inputs)["logits"], program.run(inputs)["logits"])
    verify(whole)


class Odd(nn.Module):
    """Gives out an input, a side computation and a value computed from weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        hidden = x
        for layer in self.layers:
            hidden = hidden + layer(hidden).relu()
        return {
            "y": hidden,
            "again": hidden,
            "x": x,
            "side": x * 2,
            "constant": self.layers[0].weight + 1,
        }


def test_outputs_that_no_stage_computes() -> None:
    program = capture(Odd().eval(), {"x": torch.randn(2, 8)})
    assert program.outputs == ("y", "again", "x", "side", "constant")
    whole = stitch_stages(program, parts_of(program))
    verify(whole)
    inputs = {"x": torch.randn(4, 8)}
    assert_equal_outputs(whole.run(inputs), program.run(inputs))


def test_batches_are_seen_through_the_inputs_of_the_stage(
    captured: Callable[[str], Program],
) -> None:
    program = captured("llama")
    loads: list[str] = []

    class Watched(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            loads.append(name)
            return super().__getitem__(name)

    inputs = ZOO["llama"].inputs()
    batches = [Watched({**inputs, "more": inputs["input_ids"]}) for _ in range(3)]
    first = extract_stage(program, find_stages(program)[0], batches)
    # Embeddings need no mask; statistics do.
    assert set(loads) == set(first.inputs) == {"input_ids", "attention_mask"}
    assert first.padding_masks == ("attention_mask",)
    assert len(first.calibration) == 3
    loads.clear()
    assert set(first.calibration[2]) == {"input_ids", "attention_mask"}
    assert sorted(loads) == ["attention_mask", "input_ids"]


def edge(width: int) -> EdgeStatistics:
    return EdgeStatistics(1, torch.ones(width), torch.ones(width), torch.ones(width))


def test_facts_are_split_and_merged(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    known = Statistics({n.name: edge(n.in_features) for n in find_linears(program)})
    program = program.with_fact(known)
    parts = parts_of(program)
    seen: list[str] = []
    empty = program.without_facts([Statistics, Roles])
    for part in parts:
        mine = part.fact(Statistics).edges
        assert set(mine) == {n.name for n in find_linears(part)}
        seen += mine
        empty = merge_facts(empty, part)
    assert sorted(seen) == sorted(known.edges)
    assert dict(empty.fact(Statistics).edges) == dict(known.edges)
    assert empty.fact(Roles) == program.fact(Roles)
    assert parts[-1].fact(Roles).heads == {"lm_head.weight"}
    assert parts[1].fact(Roles) == Roles()


def test_a_part_without_calibration_cannot_be_run(captured: Callable[[str], Program]) -> None:
    part = parts_of(captured("llama"))[1]
    assert part.example_inputs == {}
    assert len(part.calibration) == 0
    with pytest.raises(Exception, match="the inputs do not fit: missing"):
        part.run({})
