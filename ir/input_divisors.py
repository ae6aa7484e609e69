"""What the inputs of linears were divided by, of all scales that were folded so far."""

from __future__ import annotations

import torch

from zeroskip.ir.folding import FoldedScales, spread
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import ScaleGroups


def input_divisors(program: Program, linear: str) -> torch.Tensor | None:
    """Returns what folds divided each input of a linear by, float64 [in]; None where none did.

    Args:
        program: With the groups that scales were folded into; without them nothing is known.
        linear: Its name.
    """
    folded = program.facts.get(FoldedScales)
    known = program.facts.get(ScaleGroups)
    if not isinstance(folded, FoldedScales) or not isinstance(known, ScaleGroups):
        return None
    found: torch.Tensor | None = None
    for name, fold in folded.folds.items():
        group = known.groups.get(name)
        for consumer in () if group is None else group.consumers:
            if consumer.linear == linear:
                divisor = spread(fold.scales, consumer)
                found = divisor if found is None else found * divisor
    return found
