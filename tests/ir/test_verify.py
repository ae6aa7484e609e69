"""Every rule of the verifier is shown to catch a fault, and only that rule."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from zeroskip.ir.capture import capture
from zeroskip.ir.errors import VerifyError
from zeroskip.ir.facts import Roles
from zeroskip.ir.observers import Observer
from zeroskip.ir.program import Program
from zeroskip.ir.verify import RULES, verify
from zeroskip.ir.weights import Weights

aten = torch.ops.aten
Fault = Callable[[Program], Program]
FAULTS: dict[str, list[Fault]] = {}


def plant(rule: str) -> Callable[[Fault], Fault]:
    def register(fault: Fault) -> Fault:
        FAULTS.setdefault(rule, []).append(fault)
        return fault

    return register


def first(program: Program, target: object) -> Node:
    return next(node for node in program.graph.nodes if node.target == target)


def call(program: Program, target: object, *args: object, **kwargs: object) -> Node:
    """Adds a call at the end, with the metadata that a careful pass would give it."""
    with program.graph.inserting_before(program.graph.output_node()):
        node = program.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    node.meta["val"] = first(program, aten.relu.default).meta["val"]
    return node


@plant("structure")
def used_before_defined(program: Program) -> Program:
    relu = first(program, aten.relu.default)
    relu.all_input_nodes[0].prepend(relu)
    return program


@plant("structure")
def node_of_another_graph(program: Program) -> Program:
    relu = first(program.fork(), aten.relu.default)
    first(program, aten.relu.default).args = (relu,)
    return program


@plant("signature")
def unknown_example_input(program: Program) -> Program:
    inputs = {**program.example_inputs, "extra": torch.ones(2)}
    return dataclasses.replace(program, example_inputs=inputs)


@plant("signature")
def renamed_placeholder(program: Program) -> Program:
    (placeholder,) = program.graph.find_nodes(op="placeholder")
    placeholder.target = "other"
    return program


@plant("signature")
def missing_output_name(program: Program) -> Program:
    return dataclasses.replace(program, outputs=())


@plant("signature")
def output_that_is_not_a_tuple(program: Program) -> Program:
    output = program.graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
    return program


@plant("metadata")
def operator_without_shape(program: Program) -> Program:
    del first(program, aten.relu.default).meta["val"]
    return program


@plant("metadata")
def placeholder_without_shape(program: Program) -> Program:
    del program.graph.find_nodes(op="placeholder")[0].meta["val"]
    return program


@plant("attributes")
def weight_of_another_shape(program: Program) -> Program:
    return dataclasses.replace(
        program, weights=program.weights.replace({"up.weight": torch.ones(3, 3)})
    )


@plant("attributes")
def weight_of_another_dtype(program: Program) -> Program:
    half = program.weights["up.weight"].half()
    return dataclasses.replace(program, weights=program.weights.replace({"up.weight": half}))


@plant("attributes")
def bound_parameter_of_another_shape(program: Program) -> Program:
    program.graph_module.up.weight = nn.Parameter(torch.ones(3, 3))  # type: ignore[union-attr]
    return program


@plant("attributes")
def parameter_without_weight(program: Program) -> Program:
    rest = {n: program.weights.source(n) for n in program.weights if n != "norm.bias"}
    return dataclasses.replace(program, weights=Weights(rest))


@plant("level")
def sparse_operator_before_lowering(program: Program) -> Program:
    linear = first(program, aten.linear.default)
    bits = program.graph_module
    bits.register_buffer("bits", torch.ones(44, dtype=torch.uint8))
    with program.graph.inserting_before(linear):
        mask = program.graph.get_attr("bits")
        x, w, b = linear.args
        node = program.graph.call_function(
            torch.ops.zeroskip.masked_linear.default, (x, w, mask, b)
        )
    node.meta = dict(linear.meta)
    linear.replace_all_uses_with(node)
    return program


@plant("level")
def observer_in_a_captured_program(program: Program) -> Program:
    program.graph_module.add_submodule("observer", Observer(27))
    relu = first(program, aten.relu.default)
    with program.graph.inserting_after(relu):
        program.graph.call_module("observer", (relu,)).meta = dict(relu.meta)
    return program


@plant("level")
def other_module_in_an_annotated_program(program: Program) -> Program:
    program.graph_module.add_submodule("module", nn.Identity())
    relu = first(program, aten.relu.default)
    with program.graph.inserting_after(relu):
        program.graph.call_module("module", (relu,)).meta = dict(relu.meta)
    return dataclasses.replace(program, level="annotated")


@plant("level")
def python_function(program: Program) -> Program:
    call(program, plant, first(program, aten.relu.default))
    return program


@plant("level")
def tensor_method(program: Program) -> Program:
    relu = first(program, aten.relu.default)
    with program.graph.inserting_after(relu):
        program.graph.call_method("sum", (relu,)).meta = dict(relu.meta)
    return program


@plant("purity")
def writes_into_an_input(program: Program) -> Program:
    call(program, aten.add_.Tensor, program.graph.find_nodes(op="placeholder")[0], 1)
    return program


@plant("purity")
def writes_into_a_weight(program: Program) -> Program:
    call(program, aten.mul_.Tensor, first(program, "up.weight"), 0)
    return program


@plant("purity")
def writes_into_a_view_of_a_weight(program: Program) -> Program:
    rows = call(program, aten.slice.Tensor, first(program, "up.weight"), 0, 0, 3)
    call(program, aten.zero_.default, call(program, aten.t.default, rows))
    return program


@plant("purity")
def writes_into_a_part_of_an_input(program: Program) -> Program:
    parts = call(program, aten.split.Tensor, program.graph.find_nodes(op="placeholder")[0], 4, -1)
    part = call(program, operator.getitem, parts, 0)
    call(program, aten.add_.Tensor, part, 1)
    return program


@plant("purity")
def writes_its_result_into_a_weight(program: Program) -> Program:
    weight = first(program, "up.weight")
    call(program, aten.relu.out, first(program, "mix.weight"), out=weight)
    return program


@plant("facts")
def false_fact(program: Program) -> Program:
    return program.with_fact(Roles(heads=frozenset({"no.such.linear"})))


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_catches_its_faults_and_no_other_rule_does(
    rule: str, captured: Callable[[str], Program]
) -> None:
    assert FAULTS.get(rule), f"plant a fault for the rule {rule!r}"
    for fault in FAULTS[rule]:
        broken = fault(captured("mlp").fork())
        found = [name for name, check in RULES.items() if check(broken) is not None]
        assert found == [rule], fault.__name__
        with pytest.raises(VerifyError, match=f"breaks the rule '{rule}'") as raised:
            verify(broken, after="my-pass")
        assert raised.value.pass_name == "my-pass"
        assert raised.value.where


def test_every_fault_belongs_to_a_rule() -> None:
    assert FAULTS.keys() == RULES.keys()


def test_clean_programs_pass(arch: str, captured: Callable[[str], Program]) -> None:
    program = captured(arch)
    verify(program)
    verify(program.fork())


def test_two_outputs_are_refused(captured: Callable[[str], Program]) -> None:
    broken = captured("mlp").fork()
    broken.graph.output((first(broken, aten.relu.default),))
    with pytest.raises(VerifyError, match="structure"):
        verify(broken)


def test_writing_into_a_value_of_its_own_is_allowed(captured: Callable[[str], Program]) -> None:
    program = captured("mlp").fork()
    call(program, aten.add_.Tensor, first(program, aten.relu.default), 1)
    verify(program)


def test_lowered_and_annotated_programs_pass(captured: Callable[[str], Program]) -> None:
    lowered = sparse_operator_before_lowering(captured("mlp").fork())
    verify(dataclasses.replace(lowered, level="lowered"))
    annotated = observer_in_a_captured_program(captured("mlp").fork())
    verify(dataclasses.replace(annotated, level="annotated"))


def test_a_captured_model_that_writes_into_its_input_is_caught() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x.view(-1).add_(1)
            return x * self.w

    program = capture(Writes().eval(), {"x": torch.randn(2, 8)})
    with pytest.raises(VerifyError, match="purity"):
        verify(program)
