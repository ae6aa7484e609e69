"""shift-to-bias: put the mean of what pruning takes away into the bias.

    y = W x + b    becomes    y' = (W * M) x + b',    b' = b + (W - W * M) E[x]

so that E[y' - y] = 0: of E[(y' - y)^2] only the variance is left, for any mask M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroskip.ir.biases import (
    BiasShift,
    ShiftedBiases,
    add_biases,
    find_bias,
    new_bias_name,
    refusal_to_add,
    refusal_to_shift,
)
from zeroskip.ir.errors import CompileError
from zeroskip.ir.facts import Mask, Masks, SparseWeights, Statistics
from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.passes.base import Pass, Scope


@dataclass(frozen=True)
class ShiftToBias(Pass):
    """Adds (W - W * M) E[x] to the bias of each linear that is to be pruned by a mask M.

    It needs W with and without the mask: its place is between the pruner and `ApplyMasks`. Masks,
    weights and density stay what they are. The sum is float64 and rounded once, so no output gets a
    larger squared error on the calibration data than without, in any dtype.

    Leaves alone, with the reason in the fact `ShiftedBiases`: a 3-D weight (experts), a bias that
    something else reads too, a linear without a bias unless `add`, and with `add` one whose module
    has no place for it. Refuses masks that were applied already.

    A bias that is added is one more parameter: of the program, of the module that was compiled, of
    the ONNX file and of the saved checkpoint. `from_pretrained` gives it back only where the
    configuration has an option for it (LLaMA: `attention_bias` and `mlp_bias`), which is then set;
    elsewhere transformers ignores the key, and `compile_sparse` warns.

    Args:
        add: Also add a bias to linears that have none.
        include: Shell-style patterns of linears. Empty: every one that has a mask.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact Statistics

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact ShiftedBiases
        fact Statistics

    Source: the shift of Jiang et al., "Sparsity Induction", arXiv 2602.21652, eq. 3, in closed form:
    shifting x by d before pruning is adding (W - W * M) d after, and the best d is E[x].
    """

    add: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "shift-to-bias"
    requires = (Statistics, Masks)
    provides = (ShiftedBiases,)
    invalidates = (ScaleGroups,)  # A bias that is added belongs to the group of its linear's rows.
    lossy = True

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(linear.name for linear in self._chosen(program))

    def _chosen(self, program: Program) -> list[Linear]:
        return select_linears(program, self.include or ("*",), self.exclude)

    def run(self, program: Program) -> Program:
        masks = program.fact(Masks).masks
        known = program.facts.get(ShiftedBiases, ShiftedBiases())
        assert isinstance(known, ShiftedBiases)
        shifts: dict[str, BiasShift] = {}
        refusals: dict[str, str] = {}
        raised: dict[str, torch.Tensor] = {}
        added: dict[str, torch.Tensor] = {}
        for linear in self._chosen(program):
            if linear.name not in masks:
                continue
            reason = self._refusal(linear, program)
            if reason is not None:
                refusals[linear.name] = reason
                continue
            mask, before = masks[linear.name], known.shifts.get(linear.name)
            self._check_order(program, linear, mask, before)
            shift = _shift(program, linear, mask)
            names = [find_bias(use, program) for use in linear.uses]
            is_new = names[0] is None
            if is_new:
                dtype = program.weights.source(linear.parameter).dtype
                names = [new_bias_name(use, linear) for use in linear.uses]
                biases = dict.fromkeys(names, shift.to(dtype))
            else:
                more = shift - _pending(program, linear, before)
                biases = {n: _plus(program.weights[str(n)], more) for n in names}
            if not all(bias.isfinite().all() for bias in biases.values()):
                refusals[linear.name] = "its bias would overflow"
                continue
            new = {str(name): bias for name, bias in biases.items()}
            if is_new:
                added[linear.name] = next(iter(new.values()))
            else:
                raised.update({n: b for n, b in new.items() if not _same(program, n, b)})
            was_added = is_new or (before is not None and before.added)
            shifts[linear.name] = BiasShift(mask, shift, tuple(new), was_added)
        if raised:
            program = program.with_weights(raised)
        if added:
            program = add_biases(program, added)
        return program.with_fact(known.merge(ShiftedBiases(shifts, refusals)))

    def _refusal(self, linear: Linear, program: Program) -> str | None:
        if linear.expert is not None:
            return "its weight is 3-D, one matrix for each expert"
        biases = [find_bias(use, program) for use in linear.uses]
        if all(biases):
            return refusal_to_shift(linear, program)
        if any(biases):
            return "it has a bias at some of its uses only"
        return refusal_to_add(linear, program) if self.add else "it has no bias, and add is off"

    def _check_order(
        self, program: Program, linear: Linear, mask: Mask, before: BiasShift | None
    ) -> None:
        applied = program.facts.get(SparseWeights, SparseWeights())
        assert isinstance(applied, SparseWeights)
        if before is None and mask.same_as(applied.masks.get(linear.name)):
            raise CompileError(
                "its mask was applied already: what it took away is gone",
                where=linear.name,
                pass_name=self.name,
                next_step="put shift-to-bias between the pruner and apply-masks",
            )


def _shift(program: Program, linear: Linear, mask: Mask) -> torch.Tensor:
    """(W - W * M) E[x], float64 [out]."""
    edge = program.fact(Statistics).of(linear.name)
    lost = linear.weight(program).masked_fill(mask.keep(), 0)
    return lost.double() @ edge.mean()


def _pending(program: Program, linear: Linear, before: BiasShift | None) -> torch.Tensor:
    """What was added for an earlier mask that was never applied: the new one takes its place."""
    if before is not None and linear.weight(program).masked_fill(before.mask.keep(), 0).any():
        return before.shift
    return torch.zeros(linear.out_features, dtype=torch.float64)


def _plus(bias: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (bias.double() + shift).to(bias.dtype)


def _same(program: Program, name: str, bias: torch.Tensor) -> bool:
    return torch.equal(program.weights[name], bias)
