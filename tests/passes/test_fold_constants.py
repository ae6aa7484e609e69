"""fold-constants: what is folded, and what stays because of a size, a name or chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.small import small_program
from zeroskip.ir.capture import capture
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Program, attribute
from zeroskip.passes import EliminateDeadCode, FoldConstants


class Folding(nn.Module):
    """Runs a function of the input, a buffer of 8 and a parameter of 8."""

    angle: Tensor

    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("angle", torch.linspace(0, 1, 8))
        self.gain = nn.Parameter(torch.linspace(1, 2, 8))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.angle, self.gain)


def program_of(body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Program:
    return capture(Folding(body).eval(), {"x": torch.randn(3, 8)})


def text_after(program: Program, step: FoldConstants | None = None) -> str:
    return print_program((step or FoldConstants())(program).program)


def test_before_and_after() -> None:
    program = program_of(lambda x, angle, gain: x * torch.cos(angle))
    assert print_program(program) == (
        "program(x: f32[s0, 8]) captured\n"
        "  %0 = cos(@angle) : f32[8]\n"
        "  %1 = mul(x, %0) : f32[s0, 8]\n"
        "  return output_0=%1\n"
        "  fact Roles\n"
    )
    result = FoldConstants()(program)
    assert result.modified
    assert result.drift == 0
    assert print_program(result.program) == (
        "program(x: f32[s0, 8]) captured\n"
        "  %0 = mul(x, @folded_0) : f32[s0, 8]\n"
        "  return output_0=%0\n"
        "  fact Roles\n"
    )
    held = attribute(result.program.graph_module, "folded_0")
    assert torch.equal(held, torch.cos(torch.linspace(0, 1, 8)))
    assert not hasattr(program.graph_module, "folded_0")


def test_a_chain_becomes_one_value_and_a_branch_two() -> None:
    program = program_of(lambda x, angle, gain: x * torch.cos(angle).exp() + torch.cos(angle).neg())
    text = text_after(program)
    assert "@folded_0" in text
    assert "@folded_1" in text
    assert "cos" not in text
    assert "folded_2" not in text


def test_a_value_read_inside_and_outside_is_kept_once() -> None:
    def body(x: Tensor, angle: Tensor, gain: Tensor) -> Tensor:
        shared = torch.cos(angle)
        return x * shared + shared.exp()

    text = text_after(program_of(body))
    assert text.count("@folded_") == 2
    assert "exp" not in text


def test_a_second_run_takes_new_names() -> None:
    program = program_of(lambda x, angle, gain: x * torch.cos(angle))
    once = FoldConstants()(program).program
    again = FoldConstants()(once)
    assert not again.modified


def test_expressions_over_parameters_stay() -> None:
    program = program_of(lambda x, angle, gain: x * torch.exp(gain) * (gain * torch.cos(angle)))
    text = text_after(program)
    assert "exp(@gain)" in text
    assert "mul(@gain, @folded_0)" in text


def test_large_results_stay() -> None:
    program = program_of(lambda x, angle, gain: x + angle.repeat(4, 8).cos().sum(0)[:8])
    whole = text_after(program)
    assert "@folded_0" in whole
    assert "cos" not in whole
    limited = text_after(program, FoldConstants(limit=16))
    assert "cos(" in limited
    assert not FoldConstants(limit=0)(program).modified


def test_random_numbers_stay_random() -> None:
    program = program_of(lambda x, angle, gain: x + 0 * torch.rand_like(angle) + torch.cos(angle))
    result = FoldConstants().run(program.fork())
    text = print_program(result)
    assert "rand_like(@angle" in text
    assert "cos" not in text


def test_writes_in_place_stay() -> None:
    def body(x: Tensor, angle: Tensor, gain: Tensor) -> Tensor:
        fresh = torch.zeros(8)
        fresh[2:4] = angle[2:4]
        return x + fresh

    program = program_of(body)
    result = FoldConstants()(program).program
    x = torch.randn(3, 8)
    expected = x.clone()
    expected[:, 2:4] += torch.linspace(0, 1, 8)[2:4]
    for _ in range(2):
        assert torch.equal(result.run({"x": x})["output_0"], expected)


def test_dynamic_sizes_stay() -> None:
    program = program_of(lambda x, angle, gain: x + torch.arange(x.shape[0])[:, None])
    assert not FoldConstants()(program).modified


def test_a_transformer_computes_the_same() -> None:
    program = small_program("llama")
    result = FoldConstants()(program)
    assert result.modified
    assert result.drift == 0
    assert "@folded_0" in print_program(result.program)
    assert not EliminateDeadCode()(result.program).modified
