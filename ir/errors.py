"""Every error that zeroskip raises on purpose: what broke, where, and what to do next."""

from __future__ import annotations


class CompileError(Exception):
    """A compilation stopped: names the pass, the node or file, and the next step to take.

    Args:
        problem: One sentence: what is wrong, with the offending value.
        where: The node, parameter, module or file it is wrong at.
        pass_name: The pass that was running; filled in by `Pass.__call__` when left empty.
        next_step: What the user can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        pass_name: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.pass_name = pass_name
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [self.problem]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.pass_name:
            lines.append(f"  pass:  {self.pass_name}")
        if self.next_step:
            lines.append(f"  next:  {self.next_step}")
        return "\n".join(lines)


class CaptureError(CompileError):
    """The model could not become a Program."""


class RequirementError(CompileError):
    """A fact that a pass needs is missing; names the passes that provide it."""


class VerifyError(CompileError):
    """The Program broke a rule after a pass."""


class EquivalenceError(CompileError):
    """An exact pass changed what the Program computes."""


class CalibrationError(CompileError):
    """The calibration data is empty, of the wrong shape or dtype, or leads to non-finite numbers."""


class PatternError(CompileError):
    """A sparsity pattern is malformed, or does not fit the weight it is asked of."""


class RecipeError(CompileError):
    """A recipe names a pass, an option or a value that does not exist."""


class LoweringError(CompileError):
    """No kernel, or no ONNX form, for this operator on this target."""


class KernelLibraryError(LoweringError):
    """The library of CPU kernels is not there and cannot be built, or cannot be loaded."""


class ParityError(CompileError):
    """What was exported does not compute what was compiled."""


class ArtifactError(CompileError):
    """A file is missing, truncated, already there, not writable, or not what its manifest says."""


class EvaluationError(CompileError):
    """A text cannot be scored, or a model gives numbers that are no probabilities."""
