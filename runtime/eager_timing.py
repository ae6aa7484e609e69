"""Times linears in chains as a Program runs them in eager PyTorch: operator calls, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zeroskip.ir.formats import BitmaskWeight
from zeroskip.runtime.kernels import sparse_linear as _kernels  # noqa: F401  (registers them)
from zeroskip.runtime.timing import clock


class EagerDenseChain:
    """Dense products of one input with one weight after another.

    Args:
        rows: out_features.
        columns: in_features.
        copies: How many weights there are.
        threads: PyTorch's, which the caller sets.
        dtype: Of weights and input.
    """

    def __init__(
        self, rows: int, columns: int, copies: int, threads: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        self._weights = [weight.clone() for _ in range(copies)]
        self._clock = clock(threads)

    def seconds(self, x: torch.Tensor) -> float:
        """Runs all on x, [m, columns]; returns the time of one."""
        linear = torch.ops.aten.linear.default
        with torch.no_grad():
            begin = self._clock()
            for weight in self._weights:
                linear(x, weight)
            return (self._clock() - begin) / len(self._weights)


class EagerSparseChain:
    """Packed weights that are multiplied one after another by `zeroskip::sparse_linear`.

    Args:
        weights: Copies of one weight, each in memory of its own.
        layout: As of the operator.
        accuracy_level: As of the operator.
        threads: PyTorch's, which the caller sets.
    """

    def __init__(
        self, weights: Sequence[BitmaskWeight], layout: int, accuracy_level: int, threads: int
    ) -> None:
        options = (accuracy_level, layout)
        self._operands = [
            (w.bitmask, w.row_offsets, w.values, w.scales, None, w.columns, w.block_size, *options)
            for w in weights
        ]
        self._clock = clock(threads)

    def seconds(self, x: torch.Tensor) -> float:
        """Runs all on x, [m, columns]; returns the time of one."""
        linear = torch.ops.zeroskip.sparse_linear.default
        with torch.no_grad():
            begin = self._clock()
            for operands in self._operands:
                linear(x, *operands)
            return (self._clock() - begin) / len(self._operands)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Lets PyTorch use so many threads within."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
