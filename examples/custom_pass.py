"""Two passes of your own: a pruner and a rewrite, run on a tiny GPT-2.

The pruner scores weights by a blend of the typical and the largest activation of each channel. The
rewrite removes dropouts that do nothing. docs/writing-a-pass.md walks through this file.

    python examples/custom_pass.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import fx
from transformers import GPT2Config, GPT2LMHeadModel

from zeroskip import compile_sparse
from zeroskip.ir.errors import CompileError, RequirementError
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.rewrite import Editor, Match, RewriteRule, apply_rules
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import ApplyMasks, Observe, Pass, Pruner, PruneWanda

aten = torch.ops.aten


@dataclass(frozen=True)
class PrunePeak(Pruner):
    """Scores a weight by its magnitude times a blend of its channel's typical and largest input.

    S_ij = |W_ij| * rms_j^(1 - peak) * max_j^peak, so `peak=0` is Wanda.

    Args:
        peak: Share of the largest |x| in the blend, in [0, 1].
    """

    peak: float = 0.5

    name = "prune-peak"
    requires = (Statistics,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.peak <= 1:
            raise CompileError(f"peak is {self.peak}, outside [0, 1]", pass_name=self.name)

    def scores(self, program: Program, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        edge = program.fact(Statistics).edges.get(linear.name)
        if edge is None:
            raise RequirementError(
                "there are no calibration statistics for this linear", where=linear.name
            )
        typical, largest = edge.root_mean_square(), edge.abs_max
        return weight.abs() * typical.pow(1 - self.peak) * largest.pow(self.peak)


def found(x: fx.Node, p: float, train: bool) -> object:
    return aten.dropout.default(x, p, train)


def check(match: Match) -> str | None:
    return "it is active, and random" if match.values["train"] else None


def put(editor: Editor, x: fx.Node, p: float, train: bool) -> fx.Node:
    return x


IDLE_DROPOUT = RewriteRule("dropout(x, p, False) = x", found, put, check)


@dataclass(frozen=True)
class RemoveIdleDropout(Pass):
    """Removes the dropouts that evaluation mode leaves in the graph, where they hand x on.

    Refuses, and leaves as it is, a dropout that is active.

    Before::

        %1 = dropout(x, 0.1, False) : f32[s0, 8]
        %2 = relu(%1) : f32[s0, 8]

    After::

        %1 = relu(x) : f32[s0, 8]
    """

    name = "remove-idle-dropout"

    def run(self, program: Program) -> Program:
        rewritten, _, _ = apply_rules(program, [IDLE_DROPOUT])
        return rewritten


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of two layers with random weights, the same each time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    model.train(False)
    return model


def main() -> None:
    """Runs both passes, and Wanda for comparison."""
    calibration = [{"input_ids": torch.randint(256, (2, 32))} for _ in range(4)]

    def weight_after(pruner: Pruner) -> torch.Tensor:
        model = tiny_gpt2()
        passes = [RemoveIdleDropout(), Observe(), pruner, ApplyMasks()]
        compiled = compile_sparse(model, passes, calibration=calibration)
        dropouts = compiled.program.graph.find_nodes(
            op="call_function", target=aten.dropout.default
        )
        report = compiled.report
        print(
            f"{pruner.name}: density {report.density:.2f}, output drift {report.drift:.3f}, "
            f"dropouts left {len(dropouts)}"
        )
        return model.get_parameter("transformer.h.1.mlp.c_fc.weight").detach()

    wanda = weight_after(PruneWanda("2:4"))
    blend = weight_after(PrunePeak("2:4"))
    plain = weight_after(PrunePeak("2:4", peak=0.0))
    differ = ((wanda == 0) != (blend == 0)).float().mean()
    print(f"the blend decides differently from Wanda for {differ:.1%} of the weights")
    if not torch.equal(wanda, plain):
        sys.exit("peak=0 is not Wanda.")
    print("with peak=0 it is Wanda")


if __name__ == "__main__":
    main()
