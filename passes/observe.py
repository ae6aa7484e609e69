"""observe: run the calibration data and record what enters each linear."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.ir.observers import insert_observers, read_observers, run_observed
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import Pass, Scope


@dataclass(frozen=True)
class Observe(Pass):
    """Observes the inputs of linears while the calibration batches run through the program.

    An observer is inserted on every edge that feeds a linear, the batches are run, the observers
    are removed again, and what they saw becomes a fact. One observer serves all linears that share an input (query, key and value; gate and up). Padding
    is left out, also for tokens that are routed to experts. Count, sum and sum of squares are
    float64; the largest magnitude and the Gram matrix float32.

    Refuses activations that hold NaN or inf, and a program without calibration data.

    Args:
        gram: Also record sum x x^T of each edge: 4 * in^2 bytes each.
        include: Patterns of linears to observe, as for the pruners.
        exclude: Patterns of linears not to observe.
        keep: Leave the observers in the graph, to look at; such a program cannot be exported.

    Before::

        %1 = relu(x) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]

    While it runs::

        %1 = relu(x) : f32[s0, 8]
        %2 = @observer_0(%1, None, None) : f32[s0, 8]
        %3 = linear(%2, @fc.weight, @fc.bias) : f32[s0, 8]

    After::

        %1 = relu(x) : f32[s0, 8]
        %2 = linear(%1, @fc.weight, @fc.bias) : f32[s0, 8]
        fact Statistics
    """

    gram: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: bool = False

    name = "observe"
    provides = (Statistics,)

    @property
    def scope(self) -> Scope:
        return "block"

    def check(self, program: Program) -> None:
        check_selection(program, self.include, self.exclude)
        self._need_calibration(program)

    def targets(self, program: Program) -> frozenset[str] | None:
        return frozenset(n.name for n in select_linears(program, self.include, self.exclude))

    def run(self, program: Program) -> Program:
        linears = select_linears(program, self.include, self.exclude)
        if not linears:
            return program.with_fact(Statistics())
        observed = insert_observers(program, linears, self.gram)
        run_observed(observed, program.calibration)
        statistics = read_observers(observed, linears, program)
        return (observed if self.keep else program).with_fact(statistics)
