"""ScaleGroups: the channel scales that a program does not feel, and what each of them touches.

Multiply the members of a group by any scales, each to the exponent it has there, and the program
computes what it did before, in exact arithmetic. A norm's gain against the linears behind it is a
group; so are values against the output projection, and one half of a gated MLP against the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import Linear, find_linears
from zeroskip.ir.program import Program
from zeroskip.ir.scale_equations import count_runs, exponents_of, raised, variables_of
from zeroskip.ir.scale_flow import ScaleFlow
from zeroskip.ir.scale_products import MOST_GROWTH
from zeroskip.ir.scale_values import TooFewRows, VariableKey
from zeroskip.ir.shift_flow import ShiftFlow


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter's part in a group.

    Args:
        parameter: Fully qualified name.
        axis: The axis whose entries are scaled; None when every element has a scale of its own.
        stacked: The parameter is a stack of matrices, and each of them has scales of its own.
        slope: What scales is `slope * p + offset`; 1 unless the program reads the parameter so.
        offset: See `slope`; 1 for the gain of a norm that multiplies by `1 + p`.
        channels: The channel of the group that each entry belongs to, int64, -1 for none.
            [size of axis], or [stack, size of axis], or the parameter's own shape.
        exponents: For each entry, 0 for none; of the shape of `channels`. +1 or -1, or a power of two
            more where squares lie between: behind a squared ReLU +2 against -1 in front of it.
    """

    parameter: str
    axis: int | None
    stacked: bool
    slope: float
    offset: float
    channels: torch.Tensor
    exponents: torch.Tensor

    def factors(self, scales: torch.Tensor, rank: int) -> torch.Tensor:
        """Returns what multiplies the parameter, in the dtype of the scales.

        Args:
            scales: One for each channel of the group, [size].
            rank: Dimensions of the parameter; the result broadcasts against it.
        """
        factors = raised(scales[self.channels.clamp(min=0)], self.exponents)
        if self.axis is None:
            return factors
        shape = [1] * rank
        shape[self.axis] = self.channels.shape[-1]
        if self.stacked:
            shape[0] = self.channels.shape[0]
        return factors.reshape(shape)

    def scaled(self, parameter: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns the parameter with the scales folded in, computed in float64, rounded once.

        Args:
            parameter: The tensor as it is.
            scales: One for each channel of the group, [size]; not zero.
        """
        factors = self.factors(scales.double(), parameter.dim())
        value = parameter.double()
        if self.offset == 0:
            return (value * factors).to(parameter.dtype)
        value = (self.slope * value + self.offset) * factors
        return ((value - self.offset) / self.slope).to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear whose inputs a group scales.

    Args:
        linear: Its name.
        channels: The channel of the group for each input, int64 [in]; -1 where none.
        exponents: For each input +1 where its weights are multiplied by the scale, so that the input
            shrinks; +2 where by its square, and so on, see `Member`; less than 0 the other way round,
            as in a head whose weight is an embedding too; else 0.
    """

    linear: str
    channels: torch.Tensor
    exponents: torch.Tensor


@dataclass(frozen=True, eq=False)
class Shift:
    """A bias whose elements may be lowered: the inputs of the group's consumers are, by as much.

    Args:
        parameter: Fully qualified name of the bias, or of a norm's.
        channels: The channel of the group for each element, int64 [size]; -1 where none.
    """

    parameter: str
    channels: torch.Tensor


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Scales that cancel.

    Args:
        name: The parameters at both ends.
        size: Number of channels, each of which may have a scale of its own.
        positive: Whether scales must be greater than zero, as behind a ReLU. Else any but zero.
        members: What is to be multiplied. Inputs of the first linear have exponents greater than 0,
            what produces them less. The smallest of a channel is 1.
        consumers: The linears whose inputs are scaled, in the order of the program.
        linears: All linears that members are weights of.
        shifts: Biases that can absorb a shift of every channel, if each consumer's bias b becomes
            b + W d; empty where the inputs of the consumers cannot be shifted.
    """

    name: str
    size: int
    positive: bool
    members: tuple[Member, ...]
    consumers: tuple[Consumer, ...]
    linears: tuple[str, ...]
    shifts: tuple[Shift, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that members are parts of, each once."""
        return tuple(dict.fromkeys(member.parameter for member in self.members))


@dataclass(frozen=True)
class Refusal:
    """Why the inputs or the outputs of a linear cannot be scaled.

    Args:
        linear: Its name.
        side: `inputs` or `outputs`.
        reason: The operator and the node that do not allow it.
    """

    linear: str
    side: str
    reason: str


@dataclass(frozen=True)
class ScaleGroups(Fact):
    """Every group of a program, by name, and what was refused."""

    groups: Mapping[str, ScaleGroup]
    refusals: tuple[Refusal, ...] = field(default=())

    def check(self, program: Program) -> str | None:
        for group in self.groups.values():
            for member in group.members:
                if member.parameter not in program.weights:
                    return f"group {group.name} scales {member.parameter}, which does not exist"
                shape = tuple(program.weights.source(member.parameter).shape)
                if member.axis is None:
                    expected = shape
                elif member.stacked:
                    expected = (shape[0], shape[member.axis])
                else:
                    expected = (shape[member.axis],)
                if tuple(member.channels.shape) != expected:
                    return f"group {group.name} does not fit {member.parameter} of shape {shape}"
        return None

    def restrict(self, linears: Iterable[str]) -> ScaleGroups:
        names = set(linears)
        groups = {n: g for n, g in self.groups.items() if g.linears and names.issuperset(g.linears)}
        return ScaleGroups(groups, tuple(r for r in self.refusals if r.linear in names))

    def within(self, program: Program) -> ScaleGroups:
        """Leaves out groups of which a gain lies elsewhere, such as the norm that ends a layer."""
        groups = {
            name: group
            for name, group in self.groups.items()
            if all(parameter in program.weights for parameter in group.parameters)
        }
        return ScaleGroups(groups, self.refusals)

    def merge(self, other: ScaleGroups) -> ScaleGroups:
        refusals = dict.fromkeys([*self.refusals, *other.refusals])
        return ScaleGroups({**self.groups, **other.groups}, tuple(refusals))


def find_scale_groups(program: Program) -> ScaleGroups:
    """Finds every group of channel scales under which a program computes the same.

    Args:
        program: At level `captured`. What its inputs and outputs are is left alone: a graph with a
            KV cache among them has fewer groups than one without.

    Returns:
        The groups in the order of the program; channels in the order of their first parameter.
    """
    flow = _flow(program)
    shifted = ShiftFlow(program, flow.growth)
    linears = find_linears(program)
    groups: dict[str, ScaleGroup] = {}
    for members, size in _components(flow):
        group = _group(flow, members, size, linears)
        name, number = group.name, 2
        while name in groups:
            name, number = f"{group.name} ({number})", number + 1
        groups[name] = dataclasses.replace(
            group, name=name, shifts=_shifts(shifted, group.consumers, group.size)
        )
    return ScaleGroups(groups, tuple(_refusals(flow, linears)))


def _flow(program: Program) -> ScaleFlow:
    growth = 1
    while True:
        try:
            return ScaleFlow(program, growth)
        except TooFewRows as few:
            growth = min(growth * int(few.args[0]), MOST_GROWTH)


# A key, and for its variables: the class that each is in, with a sign.
_Found = list[tuple[VariableKey, torch.Tensor]]


def _components(flow: ScaleFlow) -> Iterator[tuple[_Found, torch.Tensor]]:
    """Yields the keys that share free variables, and these variables."""
    keys = [key for key in flow.variables if not key.parameter.startswith("?")]
    known = [flow.equations.canonical(flow.variables[key]) for key in keys]
    classes = [count_runs(variables_of(values).sort().values) for values in known]
    variables = torch.cat([found for found, _, _ in classes])
    counts = torch.cat([count for _, _, count in classes])
    key_of = torch.cat([torch.full((len(f),), n) for n, (f, _, _) in enumerate(classes)])
    by_variable = torch.argsort(variables, stable=True)
    names, first, total = count_runs(variables[by_variable])
    occurrences = torch.zeros(len(names), dtype=torch.long).index_add_(
        0, torch.repeat_interleave(torch.arange(len(names)), total), counts[by_variable]
    )
    together: dict[tuple[int, ...], list[int]] = {}
    touched = key_of[by_variable]
    # A variable that nothing answers to belongs to what is never used.
    wanted = ((names != 0) & (occurrences > 1)).nonzero().flatten()
    starts, ends = first[wanted].tolist(), (first + total)[wanted].tolist()
    flat = touched.tolist()
    for variable, start, end in zip(names[wanted].tolist(), starts, ends, strict=True):
        together.setdefault(tuple(flat[start:end]), []).append(variable)
    for numbers in sorted(together):
        yield [(keys[n], known[n]) for n in numbers], torch.tensor(together[numbers])


def _group(
    flow: ScaleFlow, found: _Found, variables: torch.Tensor, linears: list[Linear]
) -> ScaleGroup:
    members = []
    places = [torch.searchsorted(variables, variables_of(known)) for _, known in found]
    places = [place.clamp(max=len(variables) - 1) for place in places]
    insides = [variables[p] == variables_of(k) for p, (_, k) in zip(places, found, strict=True)]
    # Whole exponents, so that scales may have any sign, and powers of two stay such.
    least = torch.full((len(variables),), torch.inf, dtype=torch.float64)
    for place, inside, (_, known) in zip(places, insides, found, strict=True):
        least.scatter_reduce_(0, place[inside], exponents_of(known[inside]).abs(), "amin")
    for place, inside, (key, known) in zip(places, insides, found, strict=True):
        channels = torch.where(inside, place, -1)
        exponents = torch.where(inside, exponents_of(known) / least[place], 0.0).to(torch.int8)
        shape = tuple(flow.program.weights.source(key.parameter).shape)
        if key.axis is None:
            channels, exponents = channels.reshape(shape), exponents.reshape(shape)
        elif key.stacked:
            channels, exponents = (t.reshape(shape[0], -1) for t in (channels, exponents))
        members.append(
            Member(key.parameter, key.axis, key.stacked, key.slope, key.offset, channels, exponents)
        )
    if _first_sign(members, linears) < 0:
        members = [_inverted(member) for member in members]
    consumers = tuple(_consumers(members, linears))
    parameters = {member.parameter for member in members}
    return ScaleGroup(
        name=_name(members),
        size=len(variables),
        positive=bool(flow.equations.is_positive(variables).any()),
        members=tuple(members),
        consumers=consumers,
        linears=tuple(linear.name for linear in linears if linear.parameter in parameters),
    )


def _inverted(member: Member) -> Member:
    return Member(
        member.parameter,
        member.axis,
        member.stacked,
        member.slope,
        member.offset,
        member.channels,
        -member.exponents,
    )


def _first_sign(members: list[Member], linears: list[Linear]) -> int:
    """The exponent of the first linear's inputs; without one, of the first member."""
    for linear in linears:
        for member in members:
            if _is_input(member, linear):
                return _sign(member)
    return _sign(members[0])


def _sign(member: Member) -> int:
    exponents = member.exponents[member.exponents != 0]
    return int(exponents[0])


def _is_input(member: Member, linear: Linear) -> bool:
    """Whether a member scales the inputs of a linear."""
    return member.parameter == linear.parameter and member.axis == input_axis(linear)


def input_axis(linear: Linear) -> int:
    """Returns the axis of the parameter along which a linear's inputs lie."""
    first = 0 if linear.expert is None else 1
    return first if linear.transposed else first + 1


def _consumers(members: list[Member], linears: list[Linear]) -> Iterator[Consumer]:
    for linear in linears:
        for member in members:
            if not _is_input(member, linear):
                continue
            channels, exponents = member.channels, member.exponents
            if member.stacked:
                channels, exponents = channels[linear.expert], exponents[linear.expert]
            if bool((channels >= 0).any()):
                yield Consumer(linear.name, channels, exponents)


def _shifts(flow: ShiftFlow, consumers: tuple[Consumer, ...], size: int) -> tuple[Shift, ...]:
    """The biases that shift every channel of a group; none unless all of it can be shifted."""
    label_of = torch.zeros(size, dtype=torch.long)  # of each channel
    for consumer in consumers:
        arrivals = flow.arrivals.get(consumer.linear, [])
        inside = consumer.channels >= 0
        for labels in arrivals:
            label_of[consumer.channels[inside]] = labels[inside]
        if not arrivals or any(
            not torch.equal(label_of[consumer.channels[inside]], labels[inside])
            for labels in arrivals
        ):
            return ()
    wanted = set(label_of.tolist())
    if 0 in wanted or not consumers or not wanted.isdisjoint(flow.lost):
        return ()
    readers = flow.readers([consumer.linear for consumer in consumers])
    if not torch.equal(readers[label_of], flow.readers()[label_of]):
        return ()  # Another linear would feel the shift too.
    channel_of = {label: channel for channel, label in enumerate(label_of.tolist())}
    if len(channel_of) < size:
        return ()  # Two channels that one element shifts could not be shifted apart.
    shifts = []
    for name, labels in flow.biases.items():
        channels = torch.tensor([channel_of.get(label, -1) for label in labels.tolist()])
        if bool((channels >= 0).any()):
            shifts.append(Shift(name, channels))
    return tuple(shifts)


def _name(members: list[Member]) -> str:
    producers = [m.parameter for m in members if _sign(m) < 0] or [members[0].parameter]
    consumers = [m.parameter for m in members if _sign(m) > 0] or [members[-1].parameter]
    return f"{producers[0]} -> {consumers[0]}"


def _refusals(flow: ScaleFlow, linears: list[Linear]) -> Iterator[Refusal]:
    for linear in linears:
        inner = input_axis(linear)
        first = 0 if linear.expert is None else 1
        for side, axis in (("inputs", inner), ("outputs", 2 * first + 1 - inner)):
            key = VariableKey(linear.parameter, axis, linear.expert is not None)
            variables = flow.variables.get(key)
            if variables is None:
                yield Refusal(linear.name, side, "its weight is not read as a matrix")
                continue
            if linear.expert is not None:
                count = len(variables) // flow.program.weights.source(linear.parameter).shape[0]
                variables = variables[linear.expert * count : (linear.expert + 1) * count]
            pinned = flow.equations.canonical(variables) == 0
            if bool(pinned.any()):
                why = flow.equations.why_pinned(variables[pinned])
                part = "" if bool(pinned.all()) else f"{int(pinned.sum())} of {len(pinned)}: "
                unknown = "its channels would have to grow and shrink at once"
                yield Refusal(linear.name, side, part + (why[0] if why else unknown))
