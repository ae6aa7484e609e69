"""Sources of the tensors of 2:4 weights: packed when they are loaded, so that lowering copies none.

Several weights may be packed as one, the rows of each below those of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import GROUP, SemiStructuredWeight, pack_semi_structured
from zeroskip.ir.weights import Source, unpack_bits


@dataclass(frozen=True, eq=False)
class Weight24:
    """A dense weight and a mask that keeps at most two of four along its input dimension.

    Args:
        name: Of the parameter, for messages.
        source: The dense tensor.
        bits: `pack_bits` of the mask [rows, columns], which need not have the layout of the tensor.
        transposed: The tensor is stored [columns, rows].
    """

    name: str
    source: Source
    bits: torch.Tensor
    transposed: bool

    @property
    def rows(self) -> int:
        return self.source.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        return self.source.shape[0 if self.transposed else 1]

    def keep(self) -> torch.Tensor:
        """Returns the mask, bool [rows, columns]."""
        return unpack_bits(self.bits, (self.rows, self.columns))

    def pack(self) -> SemiStructuredWeight:
        """Loads the weight and packs it.

        Raises:
            LoweringError: A kept weight is not finite; names the parameter.
        """
        stored = self.source.load()
        weight = stored.T if self.transposed else stored
        try:
            return pack_semi_structured(weight, self.keep())
        except LoweringError as error:
            error.where = error.where or self.name
            raise


@dataclass(frozen=True, eq=False)
class Values24:
    """The values of 2:4 weights of one width, [sum of rows, columns / 2]."""

    weights: Sequence[Weight24]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([_rows(self.weights), self.weights[0].columns // 2])

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].source.dtype

    def load(self) -> torch.Tensor:
        return _stack([weight.pack().values for weight in self.weights])


@dataclass(frozen=True, eq=False)
class Codes24:
    """The codes of 2:4 weights of one width, uint8 [sum of rows, columns / 8]; made of masks alone."""

    weights: Sequence[Weight24]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([_rows(self.weights), -(-self.weights[0].columns // (2 * GROUP))])

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def load(self) -> torch.Tensor:
        keeps = [weight.keep() for weight in self.weights]
        return _stack([pack_semi_structured(keep.half(), keep).codes for keep in keeps])


@dataclass(frozen=True, eq=False)
class Stacked:
    """Vectors one after another, such as the biases of linears that are computed as one."""

    sources: Sequence[Source]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([sum(source.shape[0] for source in self.sources)])

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    def load(self) -> torch.Tensor:
        return torch.cat([source.load() for source in self.sources])


def _rows(weights: Sequence[Weight24]) -> int:
    return sum(weight.rows for weight in weights)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
