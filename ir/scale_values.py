"""What flows through a graph when scales are looked for: labels, and views of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# Labels of a tensor (see `zeroskip.ir.scale_equations`), a view of a parameter, a number, or lists
# of these.
Value = Any


class Refused(Exception):  # noqa: N818  (not an error: the answer is "no scale here")
    """An operator allows no scale on its inputs; the message says why."""


class TooFewRows(Exception):  # noqa: N818
    """The shapes looked at are too small to tell experts apart; the argument says by what factor."""


@dataclass(frozen=True)
class ParameterView:
    """A matrix parameter, or a stack of matrices, up to the order of its dimensions.

    Args:
        name: Fully qualified name.
        shape: Of the view.
        axes: The parameter's axis that each dimension of the view is.
        variables: By axis of the parameter: [size], or [experts, size] for a stack.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    variables: Mapping[int, torch.Tensor]

    @property
    def is_stack(self) -> bool:
        return next(iter(self.variables.values())).dim() == 2

    def along(self, dimension: int) -> torch.Tensor:
        """Returns the variables along a dimension of the view."""
        return self.variables[self.axes[dimension]]

    def permuted(self, order: Sequence[int]) -> ParameterView:
        """Returns the view with its dimensions in another order."""
        shape, axes = (tuple(values[d] for d in order) for values in (self.shape, self.axes))
        return ParameterView(self.name, shape, axes, self.variables)


@dataclass(frozen=True)
class GainView:
    """`slope * p + offset` of a parameter p that is read element by element, such as a norm's gain.

    Args:
        name: Fully qualified name.
        slope: See above.
        offset: See above.
        labels: Variables of the expression's own scale, one for each element.
    """

    name: str
    slope: float
    offset: float
    labels: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.labels.shape


@dataclass(frozen=True)
class VariableKey:
    """What variables belong to: an axis of a parameter, or its elements under an affine map.

    Args:
        parameter: Fully qualified name.
        axis: The axis, or None for all elements.
        stacked: Whether there is a set of variables for each entry of axis 0.
        slope: Of the affine map, for elements.
        offset: Of the affine map, for elements.
    """

    parameter: str
    axis: int | None
    stacked: bool = False
    slope: float = 1.0
    offset: float = 0.0


@dataclass
class Call:
    """One operator of the graph, with labels and numbers for its arguments."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Returns an argument by position or name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def why(self) -> str:
        """The operator and the node, for reasons."""
        return f"{getattr(self.node.target, '_opname', self.node.target)} at {self.node.name}"


def fixed(shape: Sequence[int]) -> torch.Tensor:
    """Returns the labels of a value that cannot scale."""
    return torch.zeros((), dtype=torch.long).expand(tuple(shape))
