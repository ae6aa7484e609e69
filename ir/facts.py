"""Facts: claims about a Program that can be checked again after every pass."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from zeroskip.ir.formats import Rounded, ValueFormat
from zeroskip.ir.patterns import SparsityPattern
from zeroskip.ir.weights import Masked, Source, is_zero_outside, unpack_bits

if TYPE_CHECKING:
    from zeroskip.ir.linears import Linear
    from zeroskip.ir.program import Program

Self = TypeVar("Self", bound="Fact")


@dataclass(frozen=True)
class Fact(ABC):
    """A claim about a Program.

    Facts are keyed by linear, so that those of a stage and those of the whole program are the same
    thing: `restrict` takes a part, `merge` puts parts together.
    """

    @abstractmethod
    def check(self, program: Program) -> str | None:
        """Returns why the claim does not hold for this program, or None when it does."""

    @abstractmethod
    def restrict(self: Self, linears: Iterable[str]) -> Self:
        """Returns the part of the fact that is about these linears."""

    def within(self: Self, program: Program) -> Self:
        """Returns the part of the fact that is about parameters of this program: most is, or none."""
        return self

    @abstractmethod
    def merge(self: Self, other: Self) -> Self:
        """Returns the fact that holds both; what the other says wins."""


@dataclass(frozen=True)
class Roles(Fact):
    """Which linears play a part that pruning leaves alone unless asked; found from the graph.

    Args:
        heads: Linears that produce the vocabulary-sized output.
        routers: Linears whose output is ranked by top-k to choose experts.
        shared: Linears whose weight something else than a linear reads too (tied embeddings).
    """

    heads: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()

    def role(self, linear: str) -> str | None:
        """Returns what a linear is, in words, or None when it is an ordinary one."""
        if linear in self.heads:
            return "output head"
        if linear in self.routers:
            return "expert router"
        return "shared weight" if linear in self.shared else None

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        known = {linear.name for linear in find_linears(program)}
        missing = sorted((self.heads | self.routers | self.shared) - known)
        return f"role given to {missing[0]}, which is not a linear" if missing else None

    def restrict(self, linears: Iterable[str]) -> Roles:
        names = set(linears)
        return Roles(self.heads & names, self.routers & names, self.shared & names)

    def merge(self, other: Roles) -> Roles:
        return Roles(
            self.heads | other.heads, self.routers | other.routers, self.shared | other.shared
        )


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights of one linear are kept.

    Args:
        bits: `pack_bits` of a boolean [out, in] tensor; True keeps the weight.
        shape: (out, in).
        pattern: The pattern that the mask obeys.
        score: The name of the criterion that chose it.
        error: How far the output of the linear moved when it was pruned, relative to its size, on
            the calibration data; None where nothing was known of its inputs.
    """

    bits: torch.Tensor
    shape: tuple[int, int]
    pattern: SparsityPattern
    score: str
    error: float | None = None

    def keep(self) -> torch.Tensor:
        """Returns the boolean [out, in] tensor."""
        return unpack_bits(self.bits, self.shape)

    def same_as(self, other: Mask | None) -> bool:
        """Whether both keep the same weights under the same pattern."""
        return (
            other is not None
            and self.shape == other.shape
            and self.pattern == other.pattern
            and torch.equal(self.bits, other.bits)
        )


@dataclass(frozen=True, eq=False)
class Masks(Fact):
    """A decision to prune: the mask of each linear. No number has changed yet."""

    masks: Mapping[str, Mask] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        shapes = {
            linear.name: (linear.out_features, linear.in_features)
            for linear in find_linears(program)
        }
        for name, mask in self.masks.items():
            if shapes.get(name) != mask.shape:
                return f"mask of {name} is {mask.shape}, the linear is {shapes.get(name)}"
            reason = mask.pattern.violation(mask.keep())
            if reason is not None:
                return f"mask of {name} breaks {mask.pattern}: {reason}"
        return None

    def restrict(self, linears: Iterable[str]) -> Masks:
        names = set(linears)
        return Masks({n: m for n, m in self.masks.items() if n in names})

    def merge(self, other: Masks) -> Masks:
        return Masks({**self.masks, **other.masks})


@dataclass(frozen=True, eq=False)
class SparseWeights(Fact):
    """The masks have been applied: each weight is zero wherever its mask is False."""

    masks: Mapping[str, Mask] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        linears = {linear.name: linear for linear in find_linears(program)}
        for name, mask in self.masks.items():
            linear = linears.get(name)
            if linear is None:
                return f"{name} is said to be sparse and is not a linear"
            if linear.shape != mask.shape:
                return f"mask of {name} is {mask.shape}, the linear is {linear.shape}"
            if _masked_by(program.weights.source(linear.parameter), linear, mask):
                continue
            if not is_zero_outside(linear.weight(program), mask.keep()):
                return f"{name} has a non-zero weight outside its mask"
        return None

    def restrict(self, linears: Iterable[str]) -> SparseWeights:
        names = set(linears)
        return SparseWeights({n: m for n, m in self.masks.items() if n in names})

    def merge(self, other: SparseWeights) -> SparseWeights:
        return SparseWeights({**self.masks, **other.masks})


def _masked_by(source: Source, linear: Linear, mask: Mask) -> bool:
    """Whether a weight is zero outside the mask because that very mask is put on it when it loads."""
    same_layout = linear.expert is None and not linear.transposed
    if isinstance(source, Rounded):
        source = source.source  # Rounding keeps zeros.
    return isinstance(source, Masked) and same_layout and torch.equal(source.bits, mask.bits)


@dataclass(frozen=True, eq=False)
class QuantizedValues(Fact):
    """The kept weights have been rounded: each is exactly what its format can store."""

    formats: Mapping[str, ValueFormat] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        linears = {linear.name: linear for linear in find_linears(program)}
        for name, form in self.formats.items():
            linear = linears.get(name)
            if linear is None:
                return f"{name} is said to be rounded and is not a linear"
            source = program.weights.source(linear.parameter)
            if isinstance(source, Rounded) and source.format is form:
                continue
            weight = linear.weight(program)
            if not torch.equal(form.round(weight), weight):
                return f"{name} has a weight that {form.dtype} values cannot hold"
        return None

    def restrict(self, linears: Iterable[str]) -> QuantizedValues:
        names = set(linears)
        return QuantizedValues({n: f for n, f in self.formats.items() if n in names})

    def merge(self, other: QuantizedValues) -> QuantizedValues:
        return QuantizedValues({**self.formats, **other.formats})


@dataclass(frozen=True)
class Lowered(Fact):
    """Which linears run as a sparse operator, and why the others do not.

    Args:
        operators: Operator by linear, such as `zeroskip::masked_linear`.
        refusals: Reason by linear that was left as it is.
        verdicts: What was measured or looked up before choosing, by linear, as plain values.
    """

    operators: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def check(self, program: Program) -> str | None:
        from zeroskip.ir.linears import find_linears

        linears = {linear.name: linear for linear in find_linears(program)}
        for name, operator in self.operators.items():
            if name not in linears:
                return f"{name} is said to be lowered and is not a linear"
            for use in linears[name].uses:
                schema = getattr(use.node.target, "_schema", None)
                if schema is None or schema.name != operator:
                    return f"{name} is said to run as {operator}, {use.node.name} does not"
        return None

    def restrict(self, linears: Iterable[str]) -> Lowered:
        names = set(linears)
        return Lowered(
            {n: o for n, o in self.operators.items() if n in names},
            {n: r for n, r in self.refusals.items() if n in names},
            {n: v for n, v in self.verdicts.items() if n in names},
        )

    def merge(self, other: Lowered) -> Lowered:
        return Lowered(
            {**self.operators, **other.operators},
            {**self.refusals, **other.refusals},
            {**self.verdicts, **other.verdicts},
        )


def same_facts(first: Mapping[type[Fact], Fact], second: Mapping[type[Fact], Fact]) -> bool:
    """Whether two sets of facts claim the same, tensors compared by value."""
    return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b
