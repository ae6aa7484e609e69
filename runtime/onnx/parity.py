"""Whether the exported file computes what was compiled: the same inputs through both, at many sizes.

The distance of two outputs a and b is ||a - b|| / ||b||, b being the reference. A decoder is run
the way it is used, a prefill and then a step on the cache, against a reference that has no cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from zeroskip.ir.errors import CompileError, ParityError
from zeroskip.runtime.onnx.session import OnnxModel, positions

LIMIT = 1e-4
PARITY_FILE = "zeroskip_parity.json"
SIZES = ((2, 9), (1, 5), (3, 17), (2, 1))
Inputs = Mapping[str, torch.Tensor]
Reference = Callable[[dict[str, torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class CacheCase:
    """One way to cut a sequence: `past` tokens in one call, then `sequence` more with the cache.

    Args:
        batch: Rows.
        past: Tokens of the first call; 0 makes no first call.
        sequence: Tokens of the second call.
        padding: Tokens at the left of the first row that are masked out.
    """

    batch: int
    past: int
    sequence: int
    padding: int = 0


CACHE_CASES = (
    CacheCase(2, 0, 9),
    CacheCase(1, 0, 1),
    CacheCase(1, 6, 1),
    CacheCase(3, 11, 4),
    CacheCase(2, 6, 3, padding=3),
)


@dataclass(frozen=True)
class CaseResult:
    """The distance of every output in one case."""

    case: str
    distances: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.distances.values())


@dataclass(frozen=True)
class Parity:
    """What was compared, how far apart it was, and how far apart it may be."""

    cases: tuple[CaseResult, ...] = field(default=())
    limit: float = LIMIT

    @property
    def worst(self) -> float:
        return max((case.worst for case in self.cases), default=0.0)

    def to_json(self) -> str:
        """Returns the record as JSON text."""
        return json.dumps({**asdict(self), "worst": self.worst}, indent=2) + "\n"


def check_parity(
    model: OnnxModel,
    reference: Reference,
    *,
    cases: Sequence[CacheCase] | Sequence[Inputs],
    limit: float = LIMIT,
    reference_takes_positions: bool = False,
) -> Parity:
    """Compares an exported model with a reference in every case.

    Args:
        model: The opened file.
        reference: Takes the inputs by name and returns the outputs in the file's order; of a
            decoder, only the logits of the whole sequence, from `input_ids` and `attention_mask`.
        cases: For a decoder with cache `CacheCase`s, otherwise the inputs of each call.
        limit: Largest distance that is accepted.
        reference_takes_positions: Whether the reference of a decoder is given `position_ids` too.
            Without it, a padded case may match either convention for positions behind padding.

    Raises:
        ParityError: A distance is above the limit or not a number, or a side cannot run the case.
    """
    results = []
    for case in cases:
        name = str(case) if isinstance(case, CacheCase) else _describe(case)
        try:
            if isinstance(case, CacheCase):
                distances = _cache_distances(model, reference, case, reference_takes_positions)
            else:
                distances = _plain_distances(model, reference, case)
        # Both sides are foreign code; a size that one of them cannot run is a mismatch as well.
        except (RuntimeError, ValueError, CompileError) as error:
            raise ParityError(
                f"{name} cannot be run: {error}",
                where=str(model.path),
                next_step="pass parity_cases that the model supports, or report the model",
            ) from error
        for output, distance in distances.items():
            # Written so that NaN fails.
            if not distance <= limit:
                raise ParityError(
                    f"output {output!r} differs by {distance:.2e} (relative; limit {limit:.0e}) in {name}",
                    where=str(model.path),
                    next_step="compare the weights with the compiled program, or try another opset",
                )
        results.append(CaseResult(name, distances))
    return Parity(tuple(results), limit)


def plain_cases(
    model: OnnxModel, example: Inputs, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[dict[str, torch.Tensor]]:
    """Returns inputs of several sizes, resampled from an example so that every value stays legal.

    Args:
        model: Says which axes are dynamic, and which of them are the same axis.
        example: Inputs by name.
        sizes: (batch, other) sizes; every dynamic axis but `batch_size` takes the second.
    """
    cases = []
    for number, (batch, other) in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        # One choice per axis: tokens and their mask must stay together.
        choices: dict[str, torch.Tensor] = {}
        case = {}
        for name in model.inputs:
            tensor = example[name]
            for axis, dim in enumerate(model.input_shapes[name]):
                if isinstance(dim, str):
                    size = batch if dim.endswith("batch_size") else other
                    draw = torch.randint(tensor.shape[axis], (size,), generator=generator)
                    tensor = tensor.index_select(axis, choices.setdefault(dim, draw))
            case[name] = tensor
        cases.append(case)
    unique = {_describe(case): case for case in cases}
    return list(unique.values())


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ||actual - expected|| / ||expected||; the plain norm where expected is all zero.

    Infinite entries, such as masked logits, count as equal only to themselves.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    if not actual.numel():
        return 0.0
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    same = torch.isinf(expected) & (actual == expected)
    actual, expected = actual.masked_fill(same, 0), expected.masked_fill(same, 0)
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm if norm > 0 else 1.0)


def _plain_distances(model: OnnxModel, reference: Reference, inputs: Inputs) -> dict[str, float]:
    outputs = model.run(inputs)
    expected = reference(dict(inputs))
    if len(expected) != len(outputs):
        raise ValueError(f"the reference returns {len(expected)} outputs, the file {len(outputs)}")
    return {
        name: distance(outputs[name], tensor)
        for name, tensor in zip(model.outputs, expected, strict=True)
    }


def _cache_distances(
    model: OnnxModel, reference: Reference, case: CacheCase, takes_positions: bool
) -> dict[str, float]:
    if not model.has_cache:
        raise ValueError("the file has no cache")
    length = case.past + case.sequence
    generator = torch.Generator().manual_seed(length)
    vocabulary = int(model.output_shapes["logits"][2])
    # Low ids are special tokens; some models derive positions from the padding token.
    ids = torch.randint(
        min(3, vocabulary - 1), vocabulary, (case.batch, length), generator=generator
    )
    mask = torch.ones_like(ids)
    mask[0, : case.padding] = 0
    counted = positions(mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = counted
    expected = reference(inputs)[0]
    conventions = [counted]
    if case.padding and not takes_positions:
        conventions.append(torch.arange(length).repeat(case.batch, 1))
    kept = mask.bool()
    found = []
    for position_ids in conventions:
        logits, past = [], None
        for start, stop in ((0, case.past), (case.past, length)):
            if stop > start:
                step = model.logits(
                    ids[:, start:stop], mask[:, :stop], past, position_ids[:, start:stop]
                )
                logits.append(step.logits)
                past = step.past
        found.append(distance(torch.cat(logits, 1)[kept], expected[kept]))
    return {"logits": min(found, key=lambda value: math.inf if math.isnan(value) else value)}


def _describe(inputs: Inputs) -> str:
    return ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in inputs.items())
