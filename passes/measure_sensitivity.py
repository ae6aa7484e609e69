"""How much the output of each linear suffers at several sparsities: measured, nothing is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroskip.ir.budgets import Measurements
from zeroskip.ir.errors import CalibrationError, PatternError
from zeroskip.ir.patterns import SparsityPattern, Unstructured, parse_pattern
from zeroskip.ir.program import Program
from zeroskip.ir.selection import check_selection, select_linears
from zeroskip.ir.sensitivity import pattern_errors
from zeroskip.ir.statistics import Statistics
from zeroskip.passes.base import Scope
from zeroskip.passes.manager import PassManager
from zeroskip.passes.observe import Observe
from zeroskip.passes.pattern_pass import PatternPass, saw_too_little
from zeroskip.passes.record_passes import Instrument


def measure_sensitivity(
    program: Program,
    patterns: Sequence[SparsityPattern],
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    memory: str | int = "4GiB",
    instruments: Sequence[Instrument] = (),
) -> dict[str, tuple[float, ...]]:
    """Returns ||Y' - Y|| / ||Y|| of each linear under each pattern, alone, as Wanda would prune it.

    The calibration data runs once through the program as it is, stage by stage: no more than one
    stage's Gram matrices are in memory.

    Args:
        program: With calibration batches.
        patterns: N:M, or shares of each row.
        include: Patterns of names, as for pruners.
        exclude: Patterns of names to leave out.
        memory: Budget for activations in memory.
        instruments: Watchers.

    Returns:
        By linear one error for each pattern, NaN where it does not fit; linears of which calibration
        says too little are left out.

    Raises:
        CalibrationError: There is no calibration data.
        PatternError: A pattern compares beyond a row.
        CompileError: The names match nothing.
    """
    if not program.calibration:
        raise CalibrationError(
            "sensitivity is measured on calibration data, and there is none",
            next_step="give a text with --calibration",
        )
    for pattern in patterns:
        if isinstance(pattern, Unstructured) and pattern.comparison != "row":
            raise PatternError(
                f"{pattern} compares weights of different rows",
                next_step='name shares of each row, such as "50%"',
            )
    check_selection(program, include, exclude)
    steps = [
        Observe(True, include, exclude),
        _Measure("50%", include, exclude, tuple(map(str, patterns))),
    ]
    bare = program.without_facts([Statistics, Measurements])
    result = PassManager(steps, memory, tuple(instruments))(bare)
    return dict(result.program.fact(Measurements).values)


@dataclass(frozen=True)
class _Measure(PatternPass):
    """Measures the linears of one stage and drops their statistics."""

    patterns: tuple[str, ...] = ()

    name = "sensitivity"
    requires = (Statistics,)
    provides = (Measurements,)
    invalidates = (Statistics,)

    @property
    def scope(self) -> Scope:
        return "block"

    def run(self, program: Program) -> Program:
        statistics = program.fact(Statistics)
        found = [parse_pattern(pattern) for pattern in self.patterns]
        values = {}
        for linear in select_linears(program, self.include, self.exclude):
            if saw_too_little(linear, statistics.of(linear.name)):
                continue
            weight = self.finite_weight(program, linear)
            values[linear.name] = pattern_errors(weight, statistics.gram_of(linear.name), found)
        return program.with_fact(Measurements(values))
