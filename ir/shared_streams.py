"""Streams whose batches are spread over the processes of one compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from zeroskip.ir import process_group
from zeroskip.ir.program import Batch
from zeroskip.ir.streams import Stream


class SharedStream(Stream):
    """A stream of which each process holds the batches with its own indices.

    Reading any batch by its index is something that all processes do together: its owner sends it to
    the others. `own_batches` reads what lies here, and sends nothing. With one process it is a
    `Stream`.
    """

    def __getitem__(self, index: Any) -> Any:
        if process_group.count() == 1:
            return super().__getitem__(index)
        source = process_group.owner(range(len(self))[index])
        return _Sent(self.own(index) if process_group.rank() == source else None, source)

    def own(self, index: int) -> Batch:
        """Returns a batch that lies in this process."""
        found: Batch = super().__getitem__(index)
        return found


class _Sent(Mapping[str, torch.Tensor]):
    """A batch that its owner has and the others are given, value by value as they are read."""

    def __init__(self, values: Batch | None, source: int) -> None:
        self._values = values
        self._source = source

    def __getitem__(self, name: str) -> torch.Tensor:
        sent = None if self._values is None else {name: self._values[name]}
        return process_group.sent_values(sent, self._source)[name]

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the names of a shared batch are known to its owner alone")

    def __len__(self) -> int:
        raise TypeError("the names of a shared batch are known to its owner alone")


def own_batches(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yields (index, batch) for each batch that this process works on; nothing is exchanged.

    Args:
        batches: The calibration data of a program or of a stage.
    """
    own = getattr(batches, "own", batches.__getitem__)
    for index in process_group.mine(len(batches)):
        yield index, own(index)
