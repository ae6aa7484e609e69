"""The canonical text of a program: readable, complete, and the same on every machine."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch
import transformers as hf
from torch import fx

from tests.golden import check_golden, golden_path
from tests.zoo import GROUPED, ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.printer import _Printer, print_program
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import RewriteRule, apply_rules

aten = torch.ops.aten


@pytest.fixture(scope="module")
def one_layer() -> Program:
    config = hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})
    return capture(hf.LlamaForCausalLM(config).eval(), ZOO["llama"].inputs())


# x * sigmoid(x) written out, to see a rewrite in a golden.
SWISH = RewriteRule(
    "silu as a product",
    pattern=lambda x: aten.silu.default(x),
    rewrite=lambda editor, x: editor.call(aten.mul.Tensor, x, editor.call(aten.sigmoid.default, x)),
)


def test_mlp(golden: Callable[[str], None], captured: Callable[[str], Program]) -> None:
    golden(print_program(captured("mlp")))


def test_one_llama_layer(golden: Callable[[str], None], one_layer: Program) -> None:
    golden(print_program(one_layer))


def test_one_llama_layer_rewritten(golden: Callable[[str], None], one_layer: Program) -> None:
    rewritten, count, _ = apply_rules(one_layer, [SWISH])
    assert count == 1
    golden(print_program(rewritten))


def test_two_captures_print_the_same(captured: Callable[[str], Program]) -> None:
    for name in ("llama_tied", "mlp"):
        again = capture(ZOO[name].model(seed=1), ZOO[name].inputs(3, 7))
        assert print_program(again) == print_program(captured(name))


def test_symbols_that_look_like_new_names_are_told_apart(one_layer: Program) -> None:
    # The second symbol of torch is called as the first is printed.
    printer = _Printer(one_layer)
    first, second = sympy.symbols("s77 s0", integer=True)
    sizes = [types.SimpleNamespace(node=types.SimpleNamespace(expr=e)) for e in (first, second)]
    assert [printer._size(size) for size in (*sizes, sizes[0])] == ["s0", "s1", "s0"]
    both = types.SimpleNamespace(node=types.SimpleNamespace(expr=first + 2 * second))
    assert printer._size(both) in ("s0 + 2*s1", "2*s1 + s0")


def test_names_of_nodes_do_not_show(captured: Callable[[str], Program]) -> None:
    program = captured("mixtral")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(program.graph.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op != "output":
            copies[node].name = f"zz{997 * (i + 1) % 1009}"
    renamed = dataclasses.replace(program, graph_module=fx.GraphModule(program.graph_module, graph))
    assert {n.name for n in renamed.graph.nodes} != {n.name for n in program.graph.nodes}
    assert print_program(renamed) == print_program(program)


def test_text_is_complete_and_clean(arch: str, captured: Callable[[str], Program]) -> None:
    program = captured(arch)
    text = print_program(program)
    assert text == print_program(program.fork())
    assert "%undefined" not in text
    assert not re.search(r"0x[0-9a-f]{4}|FakeTensor|Parameter containing|<.*>", text)
    calls = [n for n in program.graph.nodes if n.op in ("call_function", "call_module")]
    lines = text.splitlines()
    assert len([line for line in lines if re.match(r"  %\d+ = ", line)]) == len(calls)
    for line in lines:  # Every value is defined on a line above the one that uses it.
        if match := re.match(r"  %(\d+) = (.*)", line):
            used = [int(n) for n in re.findall(r"%(\d+)", match[2])]
            assert all(n < int(match[1]) for n in used), line
    for name in program.read_weights():
        assert f"@{name}" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda p: dataclasses.replace(p, level="lowered"),
        lambda p: dataclasses.replace(p, outputs=("other",)),
        lambda p: p.without_facts(p.facts),
        lambda p: edited(p, lambda n: setattr(n, "target", aten.gelu.default)),
        lambda p: edited(p, lambda n: n.replace_all_uses_with(n.all_input_nodes[0])),
    ],
)
def test_text_changes_with_the_program(
    change: Callable[[Program], Program], captured: Callable[[str], Program]
) -> None:
    assert print_program(change(captured("mlp"))) != print_program(captured("mlp"))


def edited(program: Program, edit: Callable[[fx.Node], object]) -> Program:
    fork = program.fork()
    edit(next(n for n in fork.graph.nodes if n.target is aten.relu.default))
    return fork


# The golden files themselves


def test_a_missing_golden_fails_and_says_how_to_make_it(tmp_path: Path) -> None:
    path = golden_path("tests/ir/test_printer.py::test_x[a/b-1]", tmp_path)
    assert path == tmp_path / "ir" / "test_printer" / "test_x-a-b-1.txt"
    with pytest.raises(AssertionError, match="--update-goldens"):
        check_golden(path, "text\n", update=False)
    assert not path.exists()
    check_golden(path, "text\n", update=True)
    check_golden(path, "text\n", update=False)
    with pytest.raises(AssertionError, match=r"-text\n\+other"):
        check_golden(path, "other\n", update=False)
