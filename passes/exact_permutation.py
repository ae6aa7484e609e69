"""Permuting channels, proven on inputs drawn at random, and undone group by group where it fails."""

from __future__ import annotations

from collections.abc import Sequence

from zeroskip.ir.channel_permutation import Move, permute_channels
from zeroskip.ir.errors import CompileError
from zeroskip.ir.program import Program
from zeroskip.passes.exact_folding import Reference, tolerance


def permute_exactly(
    program: Program, moves: Sequence[Move]
) -> tuple[Program, list[Move], dict[str, str]]:
    """Permutes the channels of groups; one whose permutation moves the outputs is left as it was.

    A permutation only reorders sums, so outputs may move by what every exact pass may, on inputs
    drawn at random and on the example inputs.

    Returns:
        The program, what was permuted, and by group why the others were not.
    """
    if not moves:
        return program, [], {}
    try:
        reference = Reference.of(program)
    except CompileError as error:
        return program, [], {group.name: error.problem for group, _ in moves}
    limit = tolerance(program)
    together = permute_channels(program, moves)
    if reference.drift(together) <= limit:
        return together, list(moves), {}
    kept: list[Move] = []
    permuted, refused = program, {}
    for move in moves:
        trial = permute_channels(program, [*kept, move])
        moved = reference.drift(trial)
        if moved <= limit:
            permuted = trial
            kept.append(move)
        else:
            refused[move[0].name] = f"the outputs moved by {moved:.3g}, beyond {limit:.3g}"
    return permuted, kept, refused
