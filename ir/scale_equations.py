"""Equalities between multiples of unknown log-scales, solved by connected components.

Every number that might be scaled has a variable: the unknown logarithm of its scale. Operators say
which variables must be equal, which must be opposite, and which must be zero. Variables are
positive integers; `-v` is the opposite of `v`, and 0 is a scale that cannot change. Squares have
twice the logarithm: a label may also say 2 v, 4 v or v / 2, in bits above those of the variable.

A tensor of variables, one for each element of a value, is called its labels. Most values have the
same labels in every row, so labels are kept with strides of 0 along the dimensions in which they
do not vary: they cost as much as one row.
"""

from __future__ import annotations

import numpy as np
import torch

from zeroskip.ir.scale_values import Refused

# Where the power of two that multiplies a variable stands in a label: 5 bits, two's complement.
_POWER_BITS = 48
# Exponents of one variable beyond 2 ** 3 are not followed.
MOST_DOUBLINGS = 3


def variables_of(labels: torch.Tensor) -> torch.Tensor:
    """Returns the variable of each label, 0 where there is none."""
    return labels.abs() & ((1 << _POWER_BITS) - 1)


def exponents_of(labels: torch.Tensor) -> torch.Tensor:
    """Returns what multiplies the variable of each label: plus or minus a power of two, float64."""
    return torch.ldexp(labels.sign().double(), _doublings(labels))


def raised(scales: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Returns scales to exponents that are 0 or plus or minus a power of two, by squaring.

    Args:
        scales: Float.
        exponents: One for each scale.
    """
    power, left = torch.where(exponents < 0, 1 / scales, scales), exponents.abs()
    while bool((left > 1).any()):
        power, left = torch.where(left > 1, power.square(), power), left // 2
    return torch.where(exponents == 0, torch.ones_like(power), power)


def _doublings(labels: torch.Tensor) -> torch.Tensor:
    return ((labels.abs() >> _POWER_BITS) ^ 16) - 16


def _doubled(labels: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Labels of 2 ** times as much."""
    power = (_doublings(labels) + times) & 31
    variables = variables_of(labels)
    doubled = labels.sign() * (variables | (power << _POWER_BITS))
    return torch.where(variables == 0, 0, doubled)


def squeeze_repeats(labels: torch.Tensor) -> torch.Tensor:
    """Returns labels with one entry along each dimension in which they are known not to vary."""
    for axis in range(labels.dim()):
        if labels.stride(axis) == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def find_repeats(labels: torch.Tensor) -> torch.Tensor:
    """Returns the same labels with a stride of 0 along every dimension in which they do not vary."""
    shape, kept = labels.shape, squeeze_repeats(labels)
    for axis in range(kept.dim()):
        if kept.shape[axis] > 1:
            first = kept.narrow(axis, 0, 1)
            if bool((kept == first).all()):
                kept = first
    return kept.expand(shape)


def broadcast(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both labels at the shape that they broadcast to."""
    shape = np.broadcast_shapes(first.shape, second.shape)
    return first.expand(shape), second.expand(shape)


def count_runs(ordered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the values of a sorted vector, each once; where each begins; how often it occurs."""
    begins = torch.ones(len(ordered), dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = begins.nonzero().flatten()
    ends = torch.cat([first[1:], torch.tensor([len(ordered)])])
    return ordered[first], first, ends - first


class ScaleEquations:
    """Collects equations between variables, and solves them.

    Solving is repeated: what is known so far (`canonical`) decides which equations the next round
    adds. Each round can only join more variables, so the rounds end.
    """

    def __init__(self) -> None:
        self._count = 1
        # What each variable is known to equal; entry 0 is the scale that cannot change. Longer
        # than the number of variables, so that adding some does not copy all.
        self._known = torch.arange(1024)
        # Why it cannot change, as an index into `_whys`; -1 where it can, or nobody said.
        self._why = torch.full((1024,), -1)
        self._whys: list[str] = []
        self._number_of_why: dict[str, int] = {}
        self._equalities: list[torch.Tensor] = []
        self._pins: list[tuple[torch.Tensor, int]] = []
        self._positive = torch.zeros(1024, dtype=torch.bool)

    def new_variables(self, count: int) -> torch.Tensor:
        """Returns variables that nothing is known of, [count]."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._known):
            more = 2 * self._count
            self._known = torch.cat([self._known, torch.arange(len(self._known), more)])
            self._why = torch.cat([self._why, torch.full((more - len(self._why),), -1)])
            padding = torch.zeros(more - len(self._positive), dtype=torch.bool)
            self._positive = torch.cat([self._positive, padding])
        fresh = torch.arange(first, self._count)
        return fresh

    def canonical(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns labels in which variables known to be equal are the same."""
        kept = squeeze_repeats(labels)
        found = self._known[variables_of(kept)] * kept.sign()
        times = _doublings(kept)
        if bool(times.any()):
            found = _doubled(found, times)
        return found.expand(labels.shape)

    def doubled(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the labels of squares.

        Raises:
            Refused: Some would have too high an exponent.
        """
        kept = self.canonical(squeeze_repeats(labels))
        if bool((_doublings(kept) >= MOST_DOUBLINGS).any()):
            raise Refused("raises to too high a power")
        return _doubled(kept, torch.ones_like(kept)).expand(labels.shape)

    def equate(self, first: torch.Tensor, second: torch.Tensor, why: str) -> None:
        """Demands that labels be equal, after broadcasting.

        Args:
            first: Labels.
            second: Labels.
            why: The operator and the node that demand it; the reason where one of the two is zero.
        """
        pair = broadcast(squeeze_repeats(first), squeeze_repeats(second))
        a, b = (self.canonical(labels).reshape(-1) for labels in pair)
        differ = (variables_of(a) != variables_of(b)) & (a != 0) & (b != 0)
        if bool(differ.any()):
            self._equalities.append(torch.stack([a[differ], b[differ]], 1))
        self.pin(torch.where(a == b, 0, torch.where(a == 0, b, a))[~differ], why)

    def pin(self, labels: torch.Tensor, why: str) -> None:
        """Demands that labels be zero.

        Args:
            labels: Of any shape.
            why: The operator and the node that do not allow a scale.
        """
        variables = variables_of(self.canonical(squeeze_repeats(labels)))
        variables = variables[variables != 0]
        if len(variables):
            number = self._number_of_why.setdefault(why, len(self._whys))
            if number == len(self._whys):
                self._whys.append(why)
            self._pins.append((variables, number))

    def require_positive(self, labels: torch.Tensor) -> None:
        """Demands that the scales of labels be greater than zero."""
        self._positive[variables_of(squeeze_repeats(labels))] = True

    def is_positive(self, variables: torch.Tensor) -> torch.Tensor:
        """Returns for each class of equal variables whether its scale must be greater than zero."""
        demanded = variables_of(self._known[self._positive.nonzero().flatten()])
        return torch.isin(variables_of(self.canonical(variables)), demanded)

    def why_pinned(self, variables: torch.Tensor) -> list[str]:
        """Returns the reasons for which variables cannot change, most frequent first."""
        found = self._why[variables_of(variables).flatten()]
        numbers, _, counts = count_runs(found[found >= 0].sort().values)
        return [self._whys[int(n)] for n in numbers[counts.argsort(descending=True)]]

    def solve(self) -> bool:
        """Applies all equations since the last call; returns whether they told anything new."""
        if not self._equalities and not self._pins:
            return False
        pairs = torch.cat([torch.zeros((0, 2), dtype=torch.long), *self._equalities])
        edges, factors = variables_of(pairs), exponents_of(pairs)
        ratios = factors[:, 1] / factors[:, 0]
        root, factor = _components(len(self._known), edges, ratios)
        first, second = edges[:, 0], edges[:, 1]
        why = torch.full((len(root),), -1)  # of each component
        # The first reason given counts: it is the one nearest to the inputs.
        for variables, number in reversed(self._pins):
            why[root[variables]] = number
        pinned = why >= 0
        pinned[root[first[factor[first] != ratios * factor[second]]]] = True
        pinned[0] = True
        # A variable that stands for others passes on to them what is found.
        standing, before = variables_of(self._known), self._known
        doublings = _doublings(before) + factor[standing].abs().log2().long()
        roots = root[standing]
        pinned[roots[doublings.abs() > MOST_DOUBLINGS]] = True
        self._note_reasons(pinned[roots], why[roots])
        signs = before.sign() * factor[standing].sign().long()
        self._known = torch.where(pinned[roots], 0, _doubled(roots, doublings) * signs)
        self._equalities, self._pins = [], []
        return not torch.equal(before, self._known)

    def _note_reasons(self, pinned: torch.Tensor, why: torch.Tensor) -> None:
        new = pinned & (self._why < 0) & (self._known != 0)
        self._why[new] = why[new]


def _components(
    count: int, edges: torch.Tensor, ratios: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the smallest vertex of the connected component of each vertex, and how often it is it.

    Along each edge the first vertex is `ratio` times the second. Where edges contradict each other,
    some of them hold.

    Args:
        count: Number of vertices.
        edges: Pairs of vertices, int64 [edges, 2].
        ratios: Plus or minus a power of two each, float64 [edges].
    """
    smallest, factor = torch.arange(count), torch.ones(count, dtype=torch.float64)
    first, second = edges[:, 0], edges[:, 1]
    while True:
        a, b = smallest[first], smallest[second]
        unlike = a != b
        if not bool(unlike.any()):
            return smallest, factor
        first, second, a, b = first[unlike], second[unlike], a[unlike], b[unlike]
        ratios = ratios[unlike]
        step = ratios * factor[second] / factor[first]  # a is so many times b.
        lower, higher = torch.minimum(a, b), torch.maximum(a, b)
        smallest.scatter_reduce_(0, higher, lower, "amin")
        won = smallest[higher] == lower
        factor[higher[won]] = torch.where(a > b, step, 1 / step)[won]
        # Follow the chains to their ends, so that every vertex names a root.
        while True:
            shorter = smallest[smallest]
            if torch.equal(shorter, smallest):
                break
            factor = factor * factor[smallest]
            smallest = shorter
