"""Rewrite rules: fire where they match, refuse with a reason, leave their input alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroskip.ir.capture import capture
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Match, Refusal, RewriteRule, apply_rules
from zeroskip.ir.verify import verify

aten = torch.ops.aten


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor, nn.Linear], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.fc)


def program_of(function: Callable[[Tensor, nn.Linear], Any]) -> Program:
    return capture(Wrapped(function).eval(), {"x": torch.randn(3, 8)})


def targets(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


RELU_AS_CLAMP = RewriteRule(
    "relu as clamp",
    pattern=lambda x, w, b: aten.relu.default(aten.linear.default(x, w, b)),
    rewrite=lambda editor, x, w, b: editor.call(
        aten.clamp_min.default, editor.call(aten.linear.default, x, w, b), 0
    ),
)
DOUBLE_NEGATION = RewriteRule(
    "double negation",
    pattern=lambda x: aten.neg.default(aten.neg.default(x)),
    rewrite=lambda editor, x: x,
)


def same_outputs(a: Program, b: Program) -> bool:
    x = {"x": torch.randn(5, 8)}
    return all(torch.equal(u, v) for u, v in zip(a.run(x).values(), b.run(x).values(), strict=True))


def test_a_rule_fires_and_computes_the_same() -> None:
    program = program_of(lambda x, fc: fc(fc(x).relu()).relu())
    rewritten, count, refusals = apply_rules(program, [RELU_AS_CLAMP])
    assert (count, refusals) == (2, [])
    assert targets(rewritten) == ["aten.linear.default", "aten.clamp_min.default"] * 2
    assert same_outputs(program, rewritten)
    verify(rewritten)


def test_the_input_is_untouched() -> None:
    program = program_of(lambda x, fc: fc(x).relu())
    text, code = print_program(program), program.graph_module.code
    rewritten, _, _ = apply_rules(program, [RELU_AS_CLAMP])
    assert (print_program(program), program.graph_module.code) == (text, code)
    assert rewritten.graph is not program.graph
    program.graph.lint()


def test_a_rewrite_that_raises_leaves_the_input_usable() -> None:
    def fails(editor: Any, x: Any, w: Any, b: Any) -> Any:
        editor.constant("left.over", torch.ones(2))
        raise ValueError("planted")

    program = program_of(lambda x, fc: fc(x).relu())
    text = print_program(program)
    with pytest.raises(ValueError, match="planted"):
        apply_rules(program, [RewriteRule("fails", RELU_AS_CLAMP.pattern, fails)])
    assert print_program(program) == text
    assert not hasattr(program.graph_module, "left")
    verify(program)


def test_new_nodes_have_metadata_with_the_same_symbols() -> None:
    program = program_of(lambda x, fc: fc(x).relu())
    rewritten, _, _ = apply_rules(program, [RELU_AS_CLAMP])
    (old,) = [n for n in program.graph.nodes if n.target is aten.relu.default]
    for node in [n for n in rewritten.graph.nodes if n.op == "call_function"]:
        value = node.meta["val"]
        assert str(value.shape) == str(old.meta["val"].shape)
        assert isinstance(value.shape[0], torch.SymInt)
        assert value.dtype == torch.float32
        assert "nn_module_stack" in node.meta


def test_a_check_refuses_with_reason_and_node() -> None:
    def check(match: Match) -> str | None:
        width = match.program.weights.source(match.values["w"].target).shape[0]
        return f"the width {width} is odd luck" if match.values["x"].op == "placeholder" else None

    rule = RewriteRule("picky", RELU_AS_CLAMP.pattern, RELU_AS_CLAMP.rewrite, check)
    program = program_of(lambda x, fc: fc(fc(x).relu()).relu())
    rewritten, count, refusals = apply_rules(program, [rule])
    first = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    assert count == 1
    assert refusals == [Refusal("picky", "the width 8 is odd luck", first.name)]
    assert targets(rewritten).count("aten.relu.default") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, fc: (lambda h: h.relu() + h)(fc(x)),
        lambda x, fc: (lambda h: (h.relu(), h))(fc(x)),
    ],
    ids=["another-operator", "an-output"],
)
def test_an_inner_value_that_is_read_elsewhere_refuses(function: Any) -> None:
    program = program_of(function)
    rewritten, count, (refusal,) = apply_rules(program, [RELU_AS_CLAMP])
    assert count == 0
    assert refusal.rule == "relu as clamp"
    assert "is also read by" in refusal.reason
    assert print_program(rewritten) == print_program(program)


def test_the_root_may_be_read_many_times() -> None:
    program = program_of(lambda x, fc: (lambda h: (h + h, h))(fc(x).relu()))
    rewritten, count, refusals = apply_rules(program, [RELU_AS_CLAMP])
    assert (count, refusals) == (1, [])
    assert same_outputs(program, rewritten)


@pytest.mark.parametrize(("negations", "left"), [(1, 1), (2, 0), (3, 1), (4, 0), (5, 1)])
def test_matches_do_not_overlap(negations: int, left: int) -> None:
    def chain(x: Tensor, fc: nn.Linear) -> Tensor:
        hidden = fc(x)
        for _ in range(negations):
            hidden = -hidden
        return hidden

    program = program_of(chain)
    rewritten, count, _ = apply_rules(program, [DOUBLE_NEGATION])
    assert count == negations // 2
    assert targets(rewritten).count("aten.neg.default") == left
    assert same_outputs(program, rewritten)
    verify(rewritten)


def test_the_first_rule_that_takes_a_node_wins() -> None:
    other = RewriteRule(
        "never", RELU_AS_CLAMP.pattern, lambda editor, x, w, b: editor.call(aten.neg.default, x)
    )
    program = program_of(lambda x, fc: fc(x).relu())
    rewritten, count, _ = apply_rules(program, [RELU_AS_CLAMP, other])
    assert count == 1
    assert "aten.neg.default" not in targets(rewritten)
    refuses = RewriteRule("no", other.pattern, other.rewrite, lambda match: "not today")
    rewritten, count, refusals = apply_rules(program, [refuses, RELU_AS_CLAMP])
    assert count == 1
    assert [r.rule for r in refusals] == ["no"]
    assert "aten.clamp_min.default" in targets(rewritten)


def test_a_repeated_value_must_be_the_same_node() -> None:
    square = RewriteRule(
        "square",
        pattern=lambda x: aten.mul.Tensor(x, x),
        rewrite=lambda editor, x: editor.call(aten.square.default, x),
    )
    program = program_of(lambda x, fc: (lambda h: (h * h, h * x))(fc(x)))
    rewritten, count, _ = apply_rules(program, [square])
    assert count == 1
    assert sorted(targets(rewritten))[-2:] == ["aten.mul.Tensor", "aten.square.default"]


@pytest.mark.parametrize(("scale", "count"), [(2.0, 1), (3.0, 0)])
def test_literals_must_be_equal(scale: float, count: int) -> None:
    doubled = RewriteRule(
        "doubled",
        pattern=lambda x: aten.mul.Tensor(x, 2.0),
        rewrite=lambda editor, x: editor.call(aten.add.Tensor, x, x),
    )
    program = program_of(lambda x, fc: fc(x) * scale)
    rewritten, found, _ = apply_rules(program, [doubled])
    assert found == count
    assert same_outputs(program, rewritten)


def test_arguments_beyond_the_pattern_do_not_match() -> None:
    rule = RewriteRule(
        "plain add",
        pattern=lambda x, y: aten.add.Tensor(x, y),
        rewrite=lambda editor, x, y: editor.call(aten.sub.Tensor, x, y),
    )
    program = program_of(lambda x, fc: torch.add(fc(x), x, alpha=3))
    assert apply_rules(program, [rule])[1] == 0
    without_bias = capture(nn.Linear(8, 8, bias=False).eval(), {"input": torch.randn(3, 8)})
    assert apply_rules(without_bias, [RELU_AS_CLAMP])[1] == 0


def test_a_literal_can_be_bound_and_a_constant_added() -> None:
    rule = RewriteRule(
        "scale by a buffer",
        pattern=lambda x, s: aten.mul.Tensor(x, s),
        check=lambda match: None if isinstance(match.values["s"], float) else "not a number",
        rewrite=lambda editor, x, s: editor.call(
            aten.mul.Tensor, x, editor.constant("rules.scale", torch.full((8,), s))
        ),
    )
    program = program_of(lambda x, fc: fc(x) * 1.5)
    rewritten, count, _ = apply_rules(program, [rule])
    assert count == 1
    assert same_outputs(program, rewritten)
    assert "rules.scale" not in rewritten.weights
    assert not hasattr(program.graph_module, "rules")
    verify(rewritten)
    assert "@rules.scale" in print_program(rewritten)
    _, count, (refusal,) = apply_rules(program_of(lambda x, fc: fc(x) * x), [rule])
    assert (count, refusal.reason) == (0, "not a number")
