"""Medians of what enters each linear; unlike moments, they need the values themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.observers import Observer, insert_observers
from zeroskip.ir.program import Program

# Rows of an edge that are kept: the median of so many is as good as that of all.
MOST_ROWS = 4096


class RowObserver(Observer):
    """An observer that also keeps rows, spread evenly over the batches.

    Args:
        width: Channels.
        experts: As for `Observer`.
        rows_per_call: How many rows of one batch are kept at most.
    """

    def __init__(self, width: int, experts: int, rows_per_call: int) -> None:
        super().__init__(width, experts)
        self._rows_per_call = rows_per_call
        self._kept: list[list[torch.Tensor]] = [[] for _ in range(experts)]

    def _add(self, expert: int, rows: torch.Tensor) -> None:
        super()._add(expert, rows)
        if rows.shape[0]:
            step = -(-rows.shape[0] // self._rows_per_call)
            self._kept[expert].append(rows[::step].float())

    def median(self, expert: int) -> torch.Tensor:
        """Returns the median of each channel, float64 [in]; of an even number the lower one."""
        if not self._kept[expert]:
            return torch.zeros_like(self.total[expert])
        return torch.cat(self._kept[expert]).median(0).values.double()


def medians_and_means(
    program: Program, linears: Iterable[Linear]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Runs the calibration batches and returns the median and the mean of each linear's inputs.

    Args:
        program: With calibration batches.
        linears: Which ones; of a linear that is used several times, its first use.

    Returns:
        By linear, float64 [in] both; padding is left out.
    """
    wanted = list(linears)
    observed = insert_observers(program, wanted)
    rows_per_call = max(1, MOST_ROWS // max(1, len(program.calibration)))
    by_use: dict[str, RowObserver] = {}
    for node in list(observed.graph.find_nodes(op="call_module")):
        plain = observed.graph_module.get_submodule(str(node.target))
        if isinstance(plain, Observer):
            experts, width = plain.total.shape
            keeper = RowObserver(width, experts, rows_per_call)
            observed.graph_module.set_submodule(str(node.target), keeper)
            by_use.update({user.name: keeper for user in node.users})
    running = observed.loaded()
    for batch in program.calibration:
        running.run({name: batch[name] for name in observed.inputs})
    found = {}
    for linear in wanted:
        observer, expert = by_use[linear.uses[0].node.name], linear.expert or 0
        statistics = observer.statistics(expert)
        found[linear.name] = (observer.median(expert), statistics.mean())
    return found
