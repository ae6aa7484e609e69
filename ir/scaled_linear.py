"""A linear under the scales of the groups around it, without the scaled weight ever being stored.

Scales multiply whole rows and whole columns, so the logarithm of what multiplies W_ij is a_i + b_j.
Training moves a and b; the weight stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.linears import Linear
from zeroskip.ir.program import Program
from zeroskip.ir.scale_groups import Member, ScaleGroup, input_axis

# Stands for log 0: below the logarithm of any float32 that is not zero.
LOG_OF_ZERO = -150.0


@dataclass(frozen=True, eq=False)
class _Part:
    """What one group does to the rows, or to the columns, of a linear.

    Args:
        group: Its name.
        is_input: Whether it scales columns, which meet the inputs; else rows.
        channels: The channel of the group for each of them, int64; 0 where there is none.
        exponents: See `Member`; 0 where there is none; float32.
    """

    group: str
    is_input: bool
    channels: torch.Tensor
    exponents: torch.Tensor


@dataclass(frozen=True, eq=False)
class ScaledLinear:
    """One linear and how the groups scale it.

    Args:
        linear: Which one.
        weight: Its weight, float32 [out, in].
        log_weight: log |weight|, natural; `LOG_OF_ZERO` for zeros.
        parts: What the groups do to it.
    """

    linear: Linear
    weight: torch.Tensor
    log_weight: torch.Tensor
    parts: tuple[_Part, ...]

    def rows(self, logs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logarithm of what multiplies each row, [out].

        Args:
            logs: Logarithms of the scales by group, [size] each, natural.
        """
        return self._sum(logs, is_input=False)

    def columns(self, logs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logarithm of what multiplies each column, [in]."""
        return self._sum(logs, is_input=True)

    def _sum(self, logs: Mapping[str, torch.Tensor], *, is_input: bool) -> torch.Tensor:
        total = torch.zeros(self.weight.shape[1 if is_input else 0])
        for part in self.parts:
            if part.is_input == is_input:
                chosen = logs[part.group].index_select(0, part.channels)
                total = total + chosen * part.exponents
        return total


def scaled_linears(
    program: Program, linears: Iterable[Linear], groups: Sequence[ScaleGroup]
) -> list[ScaledLinear]:
    """Returns the linears as the groups scale them; weights are loaded, one float32 copy each."""
    found = []
    for linear in linears:
        weight = linear.weight(program).detach().float().contiguous()
        parts = [
            _part(linear, member, group.name)
            for group in groups
            for member in group.members
            if member.parameter == linear.parameter
        ]
        log_weight = weight.abs().log_().clamp_(min=LOG_OF_ZERO)
        found.append(ScaledLinear(linear, weight, log_weight, tuple(parts)))
    return found


def scales_rows_and_columns(group: ScaleGroup, linears: Iterable[Linear]) -> bool:
    """Whether a group scales linears by whole rows and columns, as `ScaledLinear` needs it."""
    parameters = {linear.parameter for linear in linears}
    return all(m.axis is not None or m.parameter not in parameters for m in group.members)


def _part(linear: Linear, member: Member, group: str) -> _Part:
    channels, exponents = member.channels, member.exponents
    is_input = member.axis == input_axis(linear)
    if linear.expert is not None and (member.stacked or member.axis == 0):
        channels, exponents = channels[linear.expert], exponents[linear.expert]
        if not member.stacked:  # One scale for all of an expert.
            channels = channels.expand(linear.out_features)
            exponents = exponents.expand(linear.out_features)
    return _Part(group, is_input, channels.clamp(min=0), exponents.float())


def stacked_weights(
    program: Program, weights: Sequence[tuple[Linear, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Puts weights of linears into the shape of their parameters; gradients flow through.

    Args:
        program: Gives the shape and dtype of each parameter, and experts that are not named.
        weights: [out, in] each.

    Returns:
        By parameter, in its own dtype.
    """
    by_parameter: dict[str, dict[int | None, torch.Tensor]] = {}
    for linear, weight in weights:
        stored = weight.T if linear.transposed else weight
        by_parameter.setdefault(linear.parameter, {})[linear.expert] = stored
    stacked = {}
    for name, found in by_parameter.items():
        dtype = program.weights.source(name).dtype
        if None in found:
            stacked[name] = found[None].to(dtype)
            continue
        original = program.weights[name].detach()
        matrices = [found[e].to(dtype) if e in found else m for e, m in enumerate(original)]
        stacked[name] = torch.stack(matrices)
    return stacked
