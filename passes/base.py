"""Pass: the contract of everything that may happen to a Program.

A pass is a value. Its fields are its options, its class variables are its contract, and `run` is
the one method to write. Checking, timing and comparing before with after are done here.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, final

import torch

from zeroskip.ir.errors import (
    CalibrationError,
    CompileError,
    EquivalenceError,
    RecipeError,
    RequirementError,
    VerifyError,
)
from zeroskip.ir.facts import Fact, same_facts
from zeroskip.ir.printer import print_program
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.verify import verify
from zeroskip.ir.weights import InMemory, all_finite

Scope = Literal["block", "program"]

# How far the outputs of an exact pass may move, as ||after - before|| / ||before||. Reordering a
# sum costs a few units of the last place; anything an exact pass gets wrong costs far more.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True)
class PassResult:
    """What became of a program in one pass.

    Args:
        program: The new program.
        modified: Whether graph, weights or facts differ from before; computed, never claimed.
        seconds: Time spent in `run`.
        drift: Largest ||after - before|| / ||before|| over the outputs; None when neither graph nor
            weights changed, so that the outputs cannot differ.
    """

    program: Program
    modified: bool
    seconds: float
    drift: float | None


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a compilation.

    Class variables:
        name: kebab-case, the class name in words.
        requires: Facts that must be known before.
        refuses: Facts that must not be known before.
        provides: Facts that are known after.
        invalidates: Facts that no longer hold after; they are dropped unless renewed.
        lossy: Whether it may change what the program computes. An exact pass is proven to be so.
        slack: How many times the tolerance of an exact pass the outputs may move; more than 1 where
            what it brings in is known to round more coarsely than a reordered sum.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type[Fact], ...]] = ()
    refuses: ClassVar[tuple[type[Fact], ...]] = ()
    provides: ClassVar[tuple[type[Fact], ...]] = ()
    invalidates: ClassVar[tuple[type[Fact], ...]] = ()
    lossy: ClassVar[bool] = False
    slack: ClassVar[float] = 1.0

    @property
    def scope(self) -> Scope:
        """`block`: runs stage by stage on propagated activations. `program`: sees all at once."""
        return "program"

    @property
    def uses_dense_outputs(self) -> bool:
        """Whether a stage comes with `Program.dense_outputs`; it costs a second set of activations."""
        return False

    def is_lossy(self, program: Program) -> bool:
        """Whether it may change what this program computes; for most passes, `lossy` says it."""
        return self.lossy

    @abstractmethod
    def run(self, program: Program) -> Program:
        """Returns the edited program; the one given is a fork, whose graph may be changed."""

    def check(self, program: Program) -> None:
        """Raises CompileError when the options do not fit the whole program; runs before any pass."""
        return  # Most passes fit any program.

    def targets(self, program: Program) -> frozenset[str] | None:
        """Names the linears worked on; None means that any part of the program may be."""
        return None

    def propagate(self, program: Program) -> Callable[[Batch], Batch] | None:
        """How a stage that this pass has finished gives the next one its inputs; None: as it runs."""
        return None

    def warning(self, later: Sequence[Pass]) -> str | None:
        """Returns what is amiss with the pass in view of those that come later in the list."""
        return None

    @final
    def _refuse_unless(self, fits: Mapping[str, bool]) -> None:
        """Raises RecipeError for the first option whose value does not fit."""
        for option in (name for name, fit in fits.items() if not fit):
            raise RecipeError(
                f"{option}={getattr(self, option)!r} is out of range",
                pass_name=self.name,
                next_step="leave it out to take the default",
            )

    @final
    def _need_calibration(self, program: Program) -> None:
        """Raises CalibrationError when there is no calibration data."""
        if not program.calibration:
            raise CalibrationError(
                "there is no calibration data",
                pass_name=self.name,
                next_step="pass calibration=[{'input_ids': ..., 'attention_mask': ...}, ...]; on the "
                "command line --calibration TEXT, in a recipe calibration: {text: FILE}",
            )

    @final
    def __call__(self, program: Program) -> PassResult:
        """Runs the pass and proves its contract.

        Raises:
            RequirementError: A required fact is missing.
            VerifyError: The result breaks a rule, lacks a provided fact, or the pass wrote into a
                tensor that it shares with the program it was given.
            EquivalenceError: The pass is exact and the outputs moved.
        """
        missing = [kind.__name__ for kind in self.requires if kind not in program.facts]
        if missing:
            raise RequirementError(
                f"{self.name} needs {', '.join(missing)}",
                pass_name=self.name,
                next_step="put a pass that provides it earlier in the list",
            )
        versions = _versions(program)
        started = time.perf_counter()
        try:
            after = self.run(program.fork())
        except CompileError as error:
            error.pass_name = error.pass_name or self.name
            raise
        seconds = time.perf_counter() - started
        after = self._drop_invalidated(program, after)
        self._check_result(program, after, versions)
        computes_anew = graph_text(program) != graph_text(after) or _weights_differ(program, after)
        drift = None
        if computes_anew:
            if self.is_lossy(program):
                drift = measure_drift(program, after)
                after = dataclasses.replace(after, dense=program.dense or bare(program))
            else:
                drift = prove_equivalent(program, after, self.name, self.slack)
        modified = computes_anew or not same_facts(program.facts, after.facts)
        return PassResult(after, modified, seconds, drift)

    def _drop_invalidated(self, before: Program, after: Program) -> Program:
        stale = [
            kind
            for kind in self.invalidates
            if kind in after.facts and after.facts[kind] is before.facts.get(kind)
        ]
        return after.without_facts(stale) if stale else after

    def _check_result(self, before: Program, after: Program, versions: dict[str, int]) -> None:
        for kind in self.provides:
            if kind not in after.facts:
                raise VerifyError(
                    f"{self.name} promises {kind.__name__} and did not provide it",
                    pass_name=self.name,
                )
        if (before.inputs, before.outputs) != (after.inputs, after.outputs):
            raise VerifyError(
                f"{self.name} changed the signature: {before.inputs} -> {before.outputs} became "
                f"{after.inputs} -> {after.outputs}",
                pass_name=self.name,
            )
        written = [name for name, version in _versions(before).items() if versions[name] != version]
        if written:
            raise VerifyError(
                f"{self.name} wrote into a tensor of its input",
                where=written[0],
                pass_name=self.name,
                next_step="replace tensors with Program.with_weights",
            )
        verify(after, after=self.name)


def prove_equivalent(before: Program, after: Program, name: str, slack: float = 1.0) -> float:
    """Runs two programs on the example inputs and returns the drift of the outputs.

    Args:
        before: What the outputs are compared with.
        after: What may have moved.
        name: Of the pass, for the error.
        slack: How many times the tolerance they may have moved.

    Raises:
        EquivalenceError: The outputs moved by more than the dtype's tolerance; both programs are
            written to a folder that the message names.
    """
    old, new = before.example_outputs, after.run(before.example_inputs)
    drifts = {key: relative_drift(old[key], new[key]) for key in old}
    limit = max((TOLERANCES[t.dtype] for t in old.values() if t.dtype in TOLERANCES), default=0.0)
    limit *= slack
    drift = max(drifts.values(), default=0.0)
    if drift <= limit:
        return drift
    folder = Path(tempfile.mkdtemp(prefix="zeroskip-equivalence-"))
    (folder / "before.txt").write_text(print_program(before))
    (folder / "after.txt").write_text(print_program(after))
    raise EquivalenceError(
        f"{name} is exact, and moved the outputs by {drift:.3g} (limit {limit:.3g})",
        where=max(drifts, key=drifts.__getitem__),
        pass_name=name,
        next_step=f"compare before.txt with after.txt in {folder}",
    )


def measure_drift(before: Program, after: Program, inputs: Batch | None = None) -> float:
    """Returns the largest relative drift over the outputs of two programs on one batch."""
    batch = before.example_inputs if inputs is None else inputs
    old = before.example_outputs if inputs is None else before.run(batch)
    new = after.run(batch)
    return max((relative_drift(old[key], new[key]) for key in old), default=0.0)


def relative_drift(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns ||after - before|| / ||before|| in float64.

    Infinite when the shapes differ or a number became, or ceased to be, finite. Masked attention
    may hold -inf or NaN before; entries that are not finite must stay as they are.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else float("inf")
    old, new = before.double(), after.double()
    if not (all_finite(before) and all_finite(after)):
        finite = torch.isfinite(old)
        if not torch.equal(finite, torch.isfinite(new)):
            return float("inf")
        old, new = old[finite], new[finite]
    scale = float(old.norm())
    change = float((new - old).norm())
    if scale == 0:
        return 0.0 if change == 0 else float("inf")
    return change / scale


def bare(program: Program) -> Program:
    """Returns what it takes to run a program: no facts, which may be large, and no other data."""
    return dataclasses.replace(program, facts={}, calibration=(), dense_outputs=(), dense_inputs=())


def _versions(program: Program) -> dict[str, int]:
    sources = {name: program.weights.source(name) for name in program.weights}
    return {n: s.tensor._version for n, s in sources.items() if isinstance(s, InMemory)}


def graph_text(program: Program) -> str:
    """Returns the canonical text of the graph alone, without facts."""
    return print_program(dataclasses.replace(program, facts={}))


def _weights_differ(before: Program, after: Program) -> bool:
    return any(
        name not in before.weights or not torch.equal(before.weights[name], after.weights[name])
        for name in after.weights.changed_since(before.weights)
    )
