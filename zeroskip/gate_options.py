"""What a recipe can demand of its result: the gates, their limits and how they are measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from zeroskip.ir.errors import CompileError, RecipeError
from zeroskip.ir.streams import parse_bytes

# What an editor is told; the reader below says the same in better words.
_RATIO = {"type": "string", "pattern": r"^\s*[0-9.]+\s*[%x]\s*$", "examples": ["5%", "1.05x"]}
_FACTOR = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^\s*[0-9.]+\s*x?\s*$"}]}
SIZE: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9.]+\s*(([kKmMgGtT][iI]?)?[bB])?\s*$"},
    ],
    "examples": ["80MiB"],
}


@dataclass(frozen=True)
class PerplexityGate:
    """How much worse than the dense model the compiled one may predict a text.

    Args:
        limit: `5%` (at most 5 percent above the dense model's perplexity) or `1.05x` (at most 1.05
            times that), which is the same. A number without a unit is refused.
        text: The text to measure on: a UTF-8 file, relative to the recipe file. `--evaluation`
            takes its place.
        sequence_length: Tokens in a window.
        max_tokens: Score at most so many; null for all.
    """

    limit: Annotated[str | float, WithJsonSchema(_RATIO)]
    text: str | None = None
    sequence_length: Annotated[int, Field(ge=1)] = 1024
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    shorthand: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        _ = self.ratio

    @property
    def ratio(self) -> float:
        """The limit as perplexity over the dense model's perplexity."""
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([%x])\s*", str(self.limit))
        if found is None:
            raise RecipeError(
                f"max_perplexity_increase: {self.limit} says not what it means.",
                next_step="write `5%` (at most 5 percent more) or `1.05x` (at most 1.05 times)",
            )
        number = float(found[1])
        ratio = 1 + number / 100 if found[2] == "%" else number
        if ratio <= 0:
            raise RecipeError(
                f"max_perplexity_increase: {self.limit} can never hold.",
                next_step="write `5%` (at most 5 percent more) or `1.05x` (at most 1.05 times)",
            )
        return ratio


@dataclass(frozen=True)
class SpeedupGate:
    """How many times as fast as dense float32 the exported model has to run in ONNX Runtime here.

    Args:
        limit: `1.2` or `1.2x`: at least so many times as fast, at each of the lengths.
        tokens: Lengths of input. 1 is a step of decoding behind 32 tokens, where the model has a
            cache; others are a prompt of so many.
        threads: Of ONNX Runtime; null for every core.
        rounds: How often both are timed, in turns; the median of the ratios counts.
    """

    limit: Annotated[str | float, WithJsonSchema(_FACTOR)]
    tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 128)
    threads: Annotated[int, Field(ge=1)] | None = None
    rounds: Annotated[int, Field(ge=3)] = 15

    shorthand: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        _ = self.factor

    @property
    def factor(self) -> float:
        """The limit as a number."""
        return _positive("min_speedup", str(self.limit).strip().removesuffix("x"), "1.2x")


@dataclass(frozen=True)
class BytesGate:
    """How large what is deployed may be.

    Args:
        limit: Of all files of the ONNX folder, or where the recipe exports none, of the checkpoint:
            `80MiB`, or a number of bytes.
    """

    limit: Annotated[str | int, WithJsonSchema(SIZE)]

    shorthand: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        _ = self.bytes

    @property
    def bytes(self) -> int:
        """The limit as a number."""
        try:
            return parse_bytes(self.limit)
        except CompileError as error:
            raise RecipeError(
                f"max_bytes: {error.problem}.", next_step='write "80MiB", or a number of bytes'
            ) from error


@dataclass(frozen=True)
class ParityGate:
    """How far the exported model may be from the compiled one.

    Args:
        limit: Largest ||onnx - program|| / ||program|| over all outputs and sizes that the export
            compares. The export itself stops beyond `parity_limit`: this is for a stricter one.
    """

    limit: Annotated[float, Field(gt=0)]

    shorthand: ClassVar[str] = "limit"

    def __post_init__(self) -> None:
        _positive("parity", str(self.limit), "1e-5")


@dataclass(frozen=True)
class Gates:
    """What the result has to be, or the compilation ends with exit code 3.

    Args:
        max_perplexity_increase: Of the compiled model over the dense one, on a text.
        min_speedup: Of the ONNX model over its dense float32 form, measured on this machine.
        max_bytes: Of the files to deploy.
        parity: Of the ONNX model with the compiled program.
    """

    max_perplexity_increase: PerplexityGate | None = None
    min_speedup: SpeedupGate | None = None
    max_bytes: BytesGate | None = None
    parity: ParityGate | None = None


def _positive(name: str, text: str, example: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise RecipeError(
            f"{name}: {text} is not a number above 0.", next_step=f"write it like {example}"
        )
    return number
