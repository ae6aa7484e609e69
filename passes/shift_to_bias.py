"""shift-to-bias: put the mean of what pruning takes away into the bias.

    y = W x + b    becomes    y' = V x + b',    b' = b + d,    d near (W - V) E[x],    V = W * M

Pruning errs by r = (W - V) x, and after the shift by r - d: E[(r - d)^2] falls by 2 d E[r] - d^2,
which is most for d = E[r] and a loss where the sign of E[r] is not what it was thought to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.facts import Mask, Masks, SparseWeights
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.part_means import means_of_parts
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.weights import is_zero_outside, zero_outside
from zeroskip.passes.base import Pass, Scope


@dataclass(frozen=True)
class ShiftToBias(Pass):
    """Adds what pruning by a mask M takes away on average, (W - W * M) E[x], to the bias of a linear.

    Its place is between the pruner and `ApplyMasks`, where the weights are still whole; behind it, W
    comes from the dense program, which is known to the passes of one list. Masks, weights and density
    stay what they are.

    A pruner that changes the weights that stay (SparseGPT) has them make up for what goes, its mean
    included, as far as the data it saw tells. What is left there tells little of other data, and to
    shift by it was no gain on the one model it was measured on (docs/results.md): such a linear is left
    alone unless `updated`.

    The average over the calibration data may be that of no other text, so an output is shifted no
    further than every part of the data agrees to. With r_1, ..., r_n the averages of what it loses in
    each of `parts` parts, it gets 0 where their signs differ, else the r_k that is closest to 0.
    Its squared error then falls in each part, by at least the square of the shift, and so on any
    text whose average lies between those of the parts. Sums are float64, rounded once; rounding never
    turns the gain into a loss, in any dtype.

    An average counts a token x as min(1, m^2 / |x|^2) of one, with m the median of |x|: the few tokens
    of enormous size, such as the first of a window, count by their relative error. How many there are
    depends on the length of the windows.

    Leaves alone, with the reason in the fact `ShiftedBiases`: a 3-D weight (experts), a bias that
    something else reads too, a linear without a bias unless `add`, with `add` one whose module has no
    place for it, and one whose other weights were changed unless `updated`. Refuses masks that were applied where nothing knows the dense weights.

    A bias that is added is one more parameter: of the program, of the module that was compiled, of
    the ONNX file and of the saved checkpoint. `from_pretrained` gives it back only where the
    configuration has an option for it (LLaMA: `attention_bias` and `mlp_bias`), which is then set;
    elsewhere transformers ignores the key, and `compile_sparse` warns.

    Runs the calibration data once more, stage by stage.

    Args:
        add: Also add a bias to linears that have none.
        updated: Also shift where a pruner has changed the weights that stay.
        parts: Into how many parts the calibration data is cut; 1 takes the average, whatever it is.
        include: Shell-style patterns of linears. Empty: every one that has a mask.
        exclude: Patterns of linears to leave as they are.

    Before::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks

    After::

        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Masks
        fact ShiftedBiases

    Source: the shift of Jiang et al., "Sparsity Induction", arXiv 2602.21652, eq. 3, in closed form:
    shifting x by d before pruning is adding (W - W * M) d after, and the best d is E[x]. What all
    parts agree on is the maximin effect of Meinshausen and Buehlmann, arXiv 1406.0596, by output.
    """

    add: bool = False
    updated: bool = False
    parts: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    name = "shift-to-bias"
    requires = (Masks,)
    provides = (ShiftedBiases,)
    invalidates = (ScaleGroups,)  # A bias that is added belongs to the group of its linear's rows.
    lossy = True

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise RecipeError(
                f"parts={self.parts} is out of range",
                pass_name=self.name,
                next_step="leave it out to take the default",
            )

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)

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
        chosen = []
        dense = _dense_linears(program)
        for linear in self._chosen(program):
            if linear.name not in masks:
                continue
            reason = self._refusal(linear, program)
            if reason is not None:
                refusals[linear.name] = reason
                continue
            before = known.shifts.get(linear.name)
            if before is None:
                self._check_order(program, linear, masks[linear.name], dense)
                if not self.updated and _was_updated(program, linear, masks[linear.name], dense):
                    refusals[linear.name] = "the weights that stay make up for those that went"
                    continue
            # Taking a shift off and adding it again would not give the same bias to the last bit.
            if before is None or not before.mask.same_as(masks[linear.name]):
                chosen.append(linear)
        means = self._means(program, chosen, known)
        for linear in chosen:
            mask, before = masks[linear.name], known.shifts.get(linear.name)
            weight = linear.weight(program)
            lost = zero_outside(weight, ~mask.keep()).double()
            if before is None and _is_applied(program, linear, mask):
                assert program.dense is not None
                lost = dense[linear.name].weight(program.dense).double() - weight.double()
            shift = what_all_agree_on(means[linear.name] @ lost.T)
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

    def _means(
        self, program: Program, linears: Sequence[Linear], known: ShiftedBiases
    ) -> dict[str, torch.Tensor]:
        """What entered the linears before anything was shifted, in each part of the data."""
        if not linears:
            return {}
        self._need_calibration(program)
        unshifted = {}
        for linear in find_linears(program):
            if (before := known.shifts.get(linear.name)) is not None:
                more = -_pending(program, linear, before)
                unshifted.update({n: _plus(program.weights[n], more) for n in before.biases})
        return means_of_parts(program.with_weights(unshifted), linears, self.parts)

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
        self, program: Program, linear: Linear, mask: Mask, dense: Mapping[str, Linear]
    ) -> None:
        if _is_applied(program, linear, mask) and linear.name not in dense:
            raise CompileError(
                "its mask was applied already: what it took away is gone",
                where=linear.name,
                pass_name=self.name,
                next_step="put shift-to-bias into one list with the pruner, behind it",
            )


def _is_applied(program: Program, linear: Linear, mask: Mask) -> bool:
    applied = program.facts.get(SparseWeights, SparseWeights())
    assert isinstance(applied, SparseWeights)
    return mask.same_as(applied.masks.get(linear.name))


def _was_updated(program: Program, linear: Linear, mask: Mask, dense: Mapping[str, Linear]) -> bool:
    """Whether weights that stay are not what they were in the dense program."""
    if program.dense is None or not _is_applied(program, linear, mask):
        return False
    kept = zero_outside(dense[linear.name].weight(program.dense), mask.keep())
    return not torch.equal(kept, linear.weight(program))


def _dense_linears(program: Program) -> dict[str, Linear]:
    """The linears of the dense program, by name, that are still of the same shape here."""
    if program.dense is None:
        return {}
    shapes = {linear.name: linear.shape for linear in find_linears(program)}
    dense = find_linears(program.dense)
    return {linear.name: linear for linear in dense if shapes.get(linear.name) == linear.shape}


def what_all_agree_on(averages: torch.Tensor) -> torch.Tensor:
    """Returns the average closest to 0 where all have one sign, else 0: [parts, out] -> [out]."""
    if not len(averages):
        return torch.zeros_like(averages.sum(0))
    low, high = averages.amin(0), averages.amax(0)
    return low.clamp(min=0) + high.clamp(max=0)


def _pending(program: Program, linear: Linear, before: BiasShift | None) -> torch.Tensor:
    """What was added for an earlier mask that was never applied: the new one takes its place."""
    if before is not None and not is_zero_outside(linear.weight(program), before.mask.keep()):
        return before.shift
    return torch.zeros(linear.out_features, dtype=torch.float64)


def _plus(bias: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (bias.double() + shift).to(bias.dtype)


def _same(program: Program, name: str, bias: torch.Tensor) -> bool:
    return torch.equal(program.weights[name], bias)
