"""eliminate-dead-code: what no output depends on goes, the signature and writes stay."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from tests.small import SMALL, small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.passes import EliminateDeadCode

aten = torch.ops.aten


class Relu(nn.Module):
    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return torch.relu(x)


def add_dead(program: Program, target: fx.node.Target, *more: object) -> Program:
    """Returns a program with an operator on its first input that nothing reads."""
    edited = program.fork()
    (first, *_) = edited.graph.find_nodes(op="placeholder")
    with edited.graph.inserting_before(edited.graph.output_node()):
        node = edited.graph.call_function(target, (first, *more))  # type: ignore[arg-type]
    node.meta = {"val": first.meta["val"]}
    edited.graph_module.recompile()
    return edited


def relu() -> Program:
    return capture(Relu().eval(), {"x": torch.randn(3, 8), "unused": torch.randn(3, 8)})


def test_before_and_after() -> None:
    program = add_dead(relu(), aten.neg.default)
    assert "%1 = neg(x)" in print_program(program)
    result = EliminateDeadCode()(program)
    assert result.modified
    assert print_program(result.program) == print_program(relu())
    assert "neg" in print_program(program)


def test_chains_and_reads_go_too() -> None:
    program = small_program("mlp").fork()
    with program.graph.inserting_before(program.graph.output_node()):
        read = program.graph.get_attr("down.weight")
        read.meta = {"val": program.weights["down.weight"]}
        last = read
        for _ in range(3):
            last = program.graph.call_function(aten.exp.default, (last,))
            last.meta = dict(read.meta)
    program.graph_module.recompile()
    result = EliminateDeadCode()(program).program
    assert print_program(result) == print_program(small_program("mlp"))


def test_inputs_stay() -> None:
    result = EliminateDeadCode()(relu()).program
    assert result.inputs == ("x", "unused")


def test_writes_stay() -> None:
    program = relu().fork()
    output = program.graph.output_node()
    (value,) = output.args[0]  # type: ignore[misc]
    with program.graph.inserting_before(output):
        node = program.graph.call_function(aten.neg_.default, (value,))
    node.meta = dict(value.meta)
    program.graph_module.recompile()
    result = EliminateDeadCode()(program)
    assert not result.modified
    x = torch.randn(3, 8)
    assert torch.equal(result.program.run({"x": x, "unused": x})["output_0"], -torch.relu(x))


def test_a_captured_model_has_no_dead_code() -> None:
    for name in SMALL:
        assert not EliminateDeadCode()(small_program(name)).modified, name
