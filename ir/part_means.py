"""Means of what enters each linear, one for each part of the calibration data.

A mean over all of it hides two things. A few tokens may outweigh all others: the first one of a
window has activations a thousand times as large in many models (Sun et al., "Massive Activations",
arXiv 2402.17762). And what is true of the whole may be true of no other text: parts that disagree
tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.observers import Observer, insert_observers, read_observers
from zeroskip.ir.program import Program


class PartObserver(Observer):
    """An observer that also adds rows up piece by piece, large ones at less than their size.

    A row x counts min(1, m^2 / |x|^2) times, with m the median size of the rows of its batch. What
    is weighed by 1 / |x|^2 is an error relative to the size of the row that has it.

    Args:
        width: Channels.
        pieces: How many pieces each batch is cut into, of consecutive rows.
    """

    def __init__(self, width: int, pieces: int) -> None:
        super().__init__(width)
        self._pieces = pieces
        # For each piece the weighed sum, and the sum of weights in front.
        self.sums: list[torch.Tensor] = []

    def _add(self, expert: int, rows: torch.Tensor) -> None:
        super()._add(expert, rows)
        exact = rows.double()
        sizes = exact.square().sum(1, keepdim=True)
        typical = float(sizes.median()) if len(sizes) else 0.0
        weights = typical / sizes.clamp(min=typical) if typical else torch.ones_like(sizes)
        weighed = torch.cat([weights, exact * weights], 1)
        pieces = weighed.tensor_split(self._pieces)
        self.sums += [piece.sum(0) for piece in pieces]


def means_of_parts(
    program: Program, linears: Iterable[Linear], parts: int
) -> dict[str, torch.Tensor]:
    """Runs the calibration batches; returns the mean of each linear's inputs in each part of them.

    Args:
        program: With calibration batches.
        linears: Which ones; none is an expert.
        parts: How many parts. Consecutive batches make up one; if there are fewer of them, each is
            cut into pieces of consecutive tokens.

    Returns:
        By linear, float64 [parts, in]; fewer rows where a part held no token. Padding is left out.

    Raises:
        CalibrationError: An activation was not finite; names the linear.
    """
    wanted = list(linears)
    observed = insert_observers(program, wanted)
    batches = len(program.calibration)
    pieces = -(-parts // max(batches, 1))
    by_use: dict[str, PartObserver] = {}
    for node in list(observed.graph.find_nodes(op="call_module")):
        plain = observed.graph_module.get_submodule(str(node.target))
        if isinstance(plain, Observer):
            keeper = PartObserver(plain.total.shape[-1], pieces)
            observed.graph_module.set_submodule(str(node.target), keeper)
            by_use.update({user.name: keeper for user in node.users})
    running = observed.loaded()
    for batch in program.calibration:
        running.run({name: batch[name] for name in observed.inputs})
    read_observers(observed, wanted, program)  # Names the linear that NaN or inf enters.
    found = {}
    for linear in wanted:
        seen = dict.fromkeys(by_use[use.node.name] for use in linear.uses)
        # A shared weight has several uses; what enters any of them counts.
        sums = torch.stack([torch.stack(observer.sums) for observer in seen]).sum(0)
        in_parts = torch.stack([part.sum(0) for part in sums.tensor_split(parts)])
        in_parts = in_parts[in_parts[:, 0] > 0]
        found[linear.name] = in_parts[:, 1:] / in_parts[:, :1]
    return found
