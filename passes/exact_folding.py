"""Folding scales into groups, each fold proven on inputs drawn at random, and undone if it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeroskip.ir.errors import CompileError
from zeroskip.ir.folding import FoldedScales, check_scales, find_group, fold_groups
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.scale_groups import ScaleGroup, ScaleGroups
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import TOLERANCES, relative_drift

# Powers of two do not round, so outputs do not move at all, but for sums that are reordered and
# numbers too small for their type.
_WITHOUT_ROUNDING = 1e-6
# Types in which a factor of 4 does not leave the range of normal numbers.
_WIDE = (torch.float64, torch.float32, torch.bfloat16)


def fold_exactly(program: Program, scales: Mapping[str, torch.Tensor]) -> Program:
    """Folds scales into groups; one whose fold moves the outputs is left as it was.

    Two questions are asked, both on inputs drawn at random (`Reference`). Do scales cancel in this
    group at all? Random powers of two, which do not round, must leave the outputs as they are, in
    every type. And does rounding the weights move the outputs no further than an exact pass may?

    Args:
        program: Knows its `ScaleGroups`.
        scales: By group, [size]; multiplied by what was folded before.

    Returns:
        The program, whose `FoldedScales` holds what was folded, and why the other groups were not.

    Raises:
        CompileError: There is no such group, or a scale is none that can be folded
            (`zeroskip.ir.folding.check_scales`).
    """
    known = program.facts.get(FoldedScales, FoldedScales())
    assert isinstance(known, FoldedScales)
    groups = program.fact(ScaleGroups).groups
    for name, each in scales.items():
        check_scales(find_group(groups, name), each)
    if not scales:
        return program.with_fact(known)
    try:
        reference = Reference.of(program)
    except CompileError as error:
        refused = dict.fromkeys(scales, error.problem)
        return program.with_fact(known.merge(FoldedScales({}, refused)))
    probed = {
        name: _powers_of_two(scales[name], number)
        for number, name in enumerate(scales)
        if _is_without_rounding(program, groups[name])
    }
    bare = program.without_facts([Statistics])
    _, refused = _fold(bare, groups, probed, reference, _WITHOUT_ROUNDING)
    sound = {name: scales[name] for name in scales if name not in refused}
    folded, rounded = _fold(program, groups, sound, reference, tolerance(program))
    refused |= rounded
    for name in sound:
        if name not in refused:
            known = known.after(groups[name], sound[name])
    return folded.with_fact(known.merge(FoldedScales({}, refused)))


def _fold(
    program: Program,
    groups: Mapping[str, ScaleGroup],
    scales: Mapping[str, torch.Tensor],
    reference: Reference,
    limit: float,
) -> tuple[Program, dict[str, str]]:
    """Folds all at once; where that moves the outputs, adds them one by one, but for those that do."""
    folds = [(groups[name], each) for name, each in scales.items()]
    try:
        folded = fold_groups(program, folds)
        if reference.drift(folded) <= limit:
            return folded, {}
    except CompileError:
        pass  # One of them cannot be folded: below, it is found.
    folded, refused = program, {}
    kept: list[tuple[ScaleGroup, torch.Tensor]] = []
    for group, each in folds:
        try:
            trial = fold_groups(program, [*kept, (group, each)])
            moved = reference.drift(trial)
        except CompileError as error:
            refused[group.name] = f"{error.problem} ({error.where})"
            continue
        if moved <= limit:
            folded = trial
            kept.append((group, each))
        elif limit == _WITHOUT_ROUNDING:
            refused[group.name] = (
                f"scales do not cancel: powers of two moved the outputs by {moved:.3g}"
            )
        else:
            refused[group.name] = f"the outputs moved by {moved:.3g}, beyond {limit:.3g}"
    return folded, refused


def _is_without_rounding(program: Program, group: ScaleGroup) -> bool:
    """Whether powers of two can be folded into a group without rounding."""
    dtypes = {program.weights.source(name).dtype for name in group.parameters}
    return dtypes <= set(_WIDE) and all(member.offset == 0 for member in group.members)


def _powers_of_two(scales: torch.Tensor, seed: int) -> torch.Tensor:
    """Random powers of two with the signs of scales; none is 1, so that every channel takes part."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    chosen = torch.randint(0, 4, scales.shape, generator=generator)
    return exponents[chosen].exp2() * scales.sign()


@dataclass(frozen=True)
class Reference:
    """What a program computes on some inputs.

    Args:
        cases: Batches, and what came of each.
    """

    cases: tuple[tuple[Batch, Mapping[str, torch.Tensor]], ...]

    @classmethod
    def of(cls, program: Program) -> Reference:
        """Runs a program on random inputs and on its example inputs, where those tell something.

        The example inputs are what the pass as a whole is judged on.

        Raises:
            CompileError: Neither gives finite outputs that are not all zero.
        """
        cases = []
        for inputs in (random_inputs(program), program.example_inputs):
            try:
                outputs = program.run(inputs)
            except CompileError:
                continue  # Not every number is a legal input.
            if all(_tells(value) for value in outputs.values() if value.is_floating_point()):
                cases.append((inputs, outputs))
        if not cases:
            raise CompileError(
                "the outputs are not finite, or all zero, so nothing can be proven on them",
                next_step="pass example inputs on which the model computes something",
            )
        return cls(tuple(cases))

    def drift(self, program: Program) -> float:
        """Returns the largest relative drift of another program's outputs."""
        drifts = [0.0]
        for inputs, expected in self.cases:
            found = program.run(inputs)
            drifts += [relative_drift(expected[name], found[name]) for name in expected]
        return max(drifts)


def _tells(output: torch.Tensor) -> bool:
    """Whether most of an output is finite, and not all of it zero."""
    finite = torch.isfinite(output)
    return bool(finite.float().mean() > 0.5) and bool(output[finite].any())


def random_inputs(program: Program, seed: int = 0) -> Batch:
    """Returns inputs like the example inputs, but others.

    Floats are drawn anew with the same spread, integers are shuffled, and the first row begins with
    padding where the program takes a padding mask. What has fewer than three values, such as a mask
    that is added, stays.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = {}
    for name, value in program.example_inputs.items():
        if name in program.padding_masks:
            drawn[name] = _padded(value)
        elif value.is_floating_point() and _is_drawn(value):
            spread = float(value.double().std()) or 1.0
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            drawn[name] = (noise * spread).to(value.dtype)
        elif value.dtype == torch.int64 and value.numel() > 1:
            order = torch.randperm(value.numel(), generator=generator)
            drawn[name] = value.flatten()[order].reshape(value.shape)
        else:
            drawn[name] = value
    return drawn


def _is_drawn(value: torch.Tensor) -> bool:
    """Whether floats are data, not a mask: many values, or one and the same, all finite."""
    if value.numel() < 2 or not bool(torch.isfinite(value).all()):
        return False
    low, high = value.min(), value.max()
    return bool(low == high) or not bool(((value == low) | (value == high)).all())


def _padded(mask: torch.Tensor) -> torch.Tensor:
    """A padding mask whose first row begins with padding, if it is longer than two tokens."""
    padded = mask.clone()
    if mask.dim() == 2 and bool(mask[0].all()):
        padded[0, : mask.shape[1] // 3] = 0
    return padded


def tolerance(program: Program) -> float:
    """Returns how far outputs may move in an exact pass, for the types of this program's outputs."""
    (output,) = program.graph.find_nodes(op="output")
    dtypes = [n.meta["val"].dtype for n in output.all_input_nodes if "val" in n.meta]
    return max((TOLERANCES[d] for d in dtypes if d in TOLERANCES), default=0.0)
