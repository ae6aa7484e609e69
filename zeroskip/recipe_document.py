"""What may stand in a recipe, as dataclasses: the reader, the writer and the JSON Schema follow them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from zeroskip.gate_options import SIZE, Gates
from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.streams import parse_bytes

MEMORY = "4GiB"


@dataclass(frozen=True)
class CalibrationOptions:
    """What text a compilation sees: how many windows, how long, and which ones.

    Args:
        samples: Number of windows.
        sequence_length: Tokens in each.
        seed: Chooses the windows.
        text: A UTF-8 file, relative to the recipe file. `--calibration` takes its place.
        generated: Windows of the same length besides those, written by the dense model itself.
    """

    samples: Annotated[int, Field(ge=1)] = 32
    sequence_length: Annotated[int, Field(ge=1)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    text: str | None = None
    generated: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Budget:
    """What a compilation may use.

    Args:
        memory: For the activations between two stages; what goes beyond is on disk.
    """

    memory: Annotated[str, WithJsonSchema(SIZE["anyOf"][1])] = MEMORY

    shorthand: ClassVar[str] = "memory"

    def __post_init__(self) -> None:
        try:
            parse_bytes(self.memory)
        except CompileError as error:
            raise RecipeError(f"memory: {error.problem}.", next_step=error.next_step) from error


@dataclass(frozen=True)
class RecipeDocument:
    """A recipe for zeroskip: passes, the data they see, what they may use, what has to come out.

    Args:
        passes: In the order in which they run: `name`, or `name: {option: value}`.
        pattern: What to prune to, such as `2:4` or `50%`: for every pass with such an option that
            does not set it. `--pattern` takes its place.
        targets: Shell-style patterns of linears to work on: `include` of every pass that does not
            set it.
        ignore: Patterns of linears to leave alone: `exclude` of every pass that does not set it.
        seed: For the choice of calibration windows and every pass with a seed that does not set it.
        calibration: What text the passes see.
        budget: What the compilation may use.
        gates: What has to come out.
        memory: The same as `budget: {memory: ...}`.
    """

    passes: tuple[Any, ...]
    pattern: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0)] | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    budget: Budget = field(default_factory=Budget)
    gates: Gates = field(default_factory=Gates)
    memory: Annotated[str, WithJsonSchema(SIZE["anyOf"][1])] | None = None
