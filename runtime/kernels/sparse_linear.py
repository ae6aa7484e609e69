"""`zeroskip::sparse_linear` on the CPU: the kernels in place of the reference, in eager PyTorch.

Importing this module registers it. What was made ready for a weight is remembered as long as its
tensor of values lives.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from zeroskip.ir.formats import BitmaskWeight
from zeroskip.ir.ops import sparse_linear, sparse_linear_reference
from zeroskip.ir.weights import version_of
from zeroskip.runtime.kernels.library import CpuLinear, ThreadPool, load_library
from zeroskip.runtime.kernels.location import try_library_path


class _Ready(NamedTuple):
    """A linear, and the operands it needs besides the values, which are the key it is found by."""

    versions: tuple[int, ...]
    linear: CpuLinear
    bitmask: torch.Tensor
    row_offsets: torch.Tensor
    scales: torch.Tensor | None


_ready: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


@sparse_linear.register_kernel("cpu")
def _(
    x: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    block_size: int = 0,
    accuracy_level: int = 0,
    layout: int = 0,
) -> torch.Tensor:
    weight = BitmaskWeight(bitmask, row_offsets, values, scales, in_features, block_size)
    path = try_library_path()
    if path is None:
        return sparse_linear_reference(x, weight, bias, accuracy_level)
    options = (layout, accuracy_level)
    with _lock:
        known: dict[tuple[int, int], _Ready] = _ready.get(values, {})  # type: ignore[no-untyped-call]
        ready = known.get(options)
        versions = tuple(map(version_of, (values, bitmask, row_offsets, scales)))
        if ready is None or not _same(ready, versions, bitmask, row_offsets, scales):
            linear = CpuLinear(
                load_library(path), weight, layout=layout, accuracy_level=accuracy_level
            )
            # A reference to the values would keep them, the key, alive for ever.
            linear.borrow()
            ready = _Ready(versions, linear, bitmask, row_offsets, scales)
            _ready[values] = {**known, options: ready}
    threads = torch.get_num_threads()
    pool = _pool(path, threads) if threads > 1 else None
    offset = None if bias is None else bias.float()
    return ready.linear(x.float(), offset, pool).to(x.dtype)


def _same(ready: _Ready, versions: tuple[int, ...], *operands: torch.Tensor | None) -> bool:
    same = all(a is b for a, b in zip(ready[2:], operands, strict=True))
    return same and ready.versions == versions


@cache
def _pool(path: Path, threads: int) -> ThreadPool:
    return ThreadPool(load_library(path), threads)
