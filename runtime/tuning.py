"""Times packed linears against dense ones on this machine, side by side.

Both run as a model runs them, in ONNX Runtime or in eager PyTorch: a chain of linears of one shape,
each with its own copy of the weight, as many as the real model's weights take room, so that caches
help as much as they will there. Dense and sparse take turns; what is compared are medians.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import VALUE_TYPES, BitmaskWeight
from zeroskip.runtime.eager_timing import EagerDenseChain, EagerSparseChain, torch_threads
from zeroskip.runtime.kernels.library import CpuLinear, load_library
from zeroskip.runtime.kernels.location import library_path, try_library_path
from zeroskip.runtime.machine import cpu_instruction_sets, cpu_name
from zeroskip.runtime.onnx_timing import OnnxSparseChain
from zeroskip.runtime.rivals import ONNX_RUNTIME, Rival, class_of, most_copies
from zeroskip.runtime.timing import DenseChain, compare, standard_error
from zeroskip.runtime.tuning_cache import TuningCache

UNUSABLE = 0.1
"""Measurements noisier than this are taken again the next time."""
AGAIN_LONGER = 3
"""A second measurement, which settles a doubt, takes so many times as long as the first."""


@dataclass(frozen=True)
class Measured:
    """How one layout of a weight fared against dense.

    Args:
        speedup: m to dense time / sparse time.
        noise: The largest standard error among them, relative.
        extra_bytes: Memory that the layout takes besides the packed tensors.
        kernels: m to the kernel that ran.
        times: How often each m was measured, at least; the slowest result is the one that counts.
    """

    speedup: Mapping[int, float]
    noise: float
    extra_bytes: int
    kernels: Mapping[int, str]
    times: int = 1


@dataclass(frozen=True)
class _Circumstances:
    """All that a measurement depends on; its text is the key in the cache."""

    machine: str
    threads: int
    rows: int
    columns: int
    density: float
    value_type: str
    block_size: int
    accuracy_level: int
    working_set: str

    def key(self, layout: int, m: int) -> str:
        form = f"{self.value_type}/{self.block_size}/{self.accuracy_level}/layout {layout}"
        shape = f"{self.rows}x{self.columns} at {self.density:.2f}"
        return f"{self.machine} | {self.threads} | {shape} | {form} | {self.working_set} | m={m}"


class Tuner:
    """Measures, and remembers in the cache what it measured.

    Args:
        library: The loaded kernel library; by default the one of this installation.
        cache: Where measurements are kept; by default the file of this user.
        seconds: The time for one comparison, building the candidates not counted.
        instruction_set: The most that kernels may use; by default all there is.

    Raises:
        KernelLibraryError: There is no kernel library and none can be built.
    """

    def __init__(
        self,
        library: ctypes.CDLL | None = None,
        cache: TuningCache | None = None,
        *,
        seconds: float = 0.3,
        instruction_set: str | None = None,
    ) -> None:
        self.library = load_library(library_path()) if library is None else library
        self.cache = TuningCache() if cache is None else cache
        self.seconds = seconds
        self.instruction_set = instruction_set
        self._dense: dict[tuple[object, ...], DenseChain | EagerDenseChain] = {}
        # A noisy measurement is taken again by the next process, not for the next linear.
        self._taken: dict[str, dict[str, Any]] = {}

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """What the kernels may use here, best first."""
        names = tuple(self.library.zs_instruction_sets().decode().split())
        if self.instruction_set is None:
            return names
        return names[names.index(self.instruction_set) :]

    def measure(
        self,
        weight: BitmaskWeight,
        *,
        m_values: Sequence[int],
        threads: int,
        accuracy_level: int = 0,
        layouts: Sequence[int] = (0, 1),
        working_set_bytes: int | None = None,
        rival: Rival = ONNX_RUNTIME,
        only_known: bool = False,
        again: bool = False,
    ) -> dict[int, Measured]:
        """Times a weight in each layout; what the cache knows is not timed again.

        What is known of another weight of this shape and of about this density serves, too: where
        this one is denser, it is taken to be slower by as much.

        Args:
            weight: Its pattern of zeros is used as it is.
            m_values: Rows of x.
            threads: With 1, thread CPU time is taken: other processes hardly disturb it.
            accuracy_level: 4 rounds activations to 8 bits (int8 values only).
            layouts: A layout that runs the same kernels as the one before it is left out.
            working_set_bytes: Size of all linears of the model in the rival's dtype; None for this
                alone.
            rival: Whose dense product is the measure.
            only_known: Times nothing.
            again: Times what is known, too, and longer; the slower result of both is kept.

        Returns:
            Layout to what was seen; without those of which something is not known.

        Raises:
            LoweringError: PyTorch is the rival, and its operator does not run on this library.
        """
        room = rival.working_set(weight, working_set_bytes)
        this = _Circumstances(
            machine=self._machine(rival),
            threads=threads,
            rows=weight.rows,
            columns=weight.columns,
            density=round_density(weight),
            value_type=type_name(weight),
            block_size=weight.block_size,
            accuracy_level=accuracy_level,
            working_set=class_of(room),
        )
        keys = {(layout, m): this.key(layout, m) for layout in layouts for m in m_values}
        known = {where: cell for where, key in keys.items() if (cell := self._known(key))}
        missing = [where for where in keys if again or where not in known]
        if missing and not only_known:
            seconds = self.seconds * (AGAIN_LONGER if again else 1)
            made = self._time(weight, missing, threads, accuracy_level, rival, room, seconds)
            cells = {where: _slower(known.get(where), cell) for where, cell in made.items()}
            known.update(cells)
            stored = {keys[where]: cell for where, cell in cells.items()}
            self._taken.update(stored)
            self.cache.put(stored)
        return _by_layout(known, layouts, m_values, _density(weight))

    def _machine(self, rival: Rival) -> str:
        kernels = f"kernels {_digest(self.library._name)} for {' '.join(self.instruction_sets)}"
        # The rival chooses by instruction sets that the kernels here do not know.
        return " | ".join((cpu_name(), " ".join(cpu_instruction_sets()), kernels, rival.version))

    def _known(self, key: str) -> dict[str, Any] | None:
        cell = self._taken.get(key)
        if cell is None:
            cell = self.cache.get(key)
            if cell is None or cell["noise"] > UNUSABLE or "density" not in cell:
                return None
        return cell

    def _time(
        self,
        weight: BitmaskWeight,
        missing: Sequence[tuple[int, int]],
        threads: int,
        level: int,
        rival: Rival,
        room: int,
        seconds: float,
    ) -> dict[tuple[int, int], dict[str, Any]]:
        if rival.is_eager:
            self._check_operator()
        described = {
            layout: linear
            for layout in dict.fromkeys(layout for layout, _ in missing)
            if (linear := self._linear(weight, layout, level))
        }
        wanted = rival.packed_copies(weight, room)
        chains: dict[int, tuple[int, OnnxSparseChain | EagerSparseChain]] = {}
        cells: dict[tuple[int, int], dict[str, Any]] = {}
        with torch_threads(threads) if rival.is_eager else nullcontext():
            for m in dict.fromkeys(m for _, m in missing):
                dense = self._dense_chain(weight, m, room, threads, rival)
                asked = [layout for layout, each in missing if each == m and layout in described]
                copies = min(wanted, most_copies(weight, m))
                for layout in asked:
                    if layout not in chains or chains[layout][0] != copies:
                        chains.pop(layout, None)  # Both at once could be too large.
                        made = self._sparse_chain(weight, layout, level, copies, threads, rival)
                        chains[layout] = (copies, made)
                x = torch.randn(m, weight.columns, generator=torch.Generator().manual_seed(m))
                x = x.to(rival.dtype)
                runs: list[Callable[[], float]] = [partial(dense.seconds, x)]
                runs += [partial(chains[layout][1].seconds, x) for layout in asked]
                times = compare(runs, seconds)
                for layout, samples in zip(asked, times[1:], strict=True):
                    cells[layout, m] = {
                        "dense_seconds": statistics.median(times[0]),
                        "sparse_seconds": statistics.median(samples),
                        "noise": standard_error(times[0], samples),
                        "extra_bytes": described[layout].nbytes,
                        "kernel": described[layout].kernel(m),
                        "density": _density(weight),
                    }
        return cells

    def _check_operator(self) -> None:
        path = try_library_path()
        same = path is not None and os.fspath(path) == self.library._name
        if not same or self.instruction_set is not None:
            raise LoweringError(
                "the operator in PyTorch runs on the library of this installation, not on another",
                where=str(self.library._name),
                next_step="measure against PyTorch with a Tuner() as it is by default",
            )

    def _linear(self, weight: BitmaskWeight, layout: int, level: int) -> CpuLinear | None:
        """The weight as it will run; None where no kernel of this layout serves it."""
        try:
            return CpuLinear(
                self.library,
                weight,
                layout=layout,
                accuracy_level=level,
                instruction_set=self.instruction_set,
            )
        except LoweringError:
            return None

    def _sparse_chain(
        self,
        weight: BitmaskWeight,
        layout: int,
        level: int,
        copies: int,
        threads: int,
        rival: Rival,
    ) -> OnnxSparseChain | EagerSparseChain:
        if rival.is_eager:
            own = [copied(weight) for _ in range(copies)]
            return EagerSparseChain(own, layout, level, threads)
        library, most = self.library._name, self.instruction_set
        return OnnxSparseChain(weight, layout, level, copies, threads, library, most)

    def _dense_chain(
        self, weight: BitmaskWeight, m: int, room: int, threads: int, rival: Rival
    ) -> DenseChain | EagerDenseChain:
        size = (weight.rows, weight.columns, rival.dense_copies(weight, room, m), threads)
        key = (rival, *size)
        if key not in self._dense:
            while len(self._dense) >= 2:  # Each may hold STREAMED_BYTES.
                self._dense.pop(next(iter(self._dense)))
            made = EagerDenseChain(*size, rival.dtype) if rival.is_eager else DenseChain(*size)
            self._dense[key] = made
        return self._dense[key]


def round_density(weight: BitmaskWeight) -> float:
    """Returns the share of kept weights, to the nearest 0.05, as measurements are kept by."""
    return round(round(_density(weight) * 20) / 20, 2)


def type_name(weight: BitmaskWeight) -> str:
    """Returns the type of the values, such as "bfloat16"."""
    return next(name for name, dtype in VALUE_TYPES.items() if dtype == weight.values.dtype)


def copied(weight: BitmaskWeight) -> BitmaskWeight:
    """Returns the same weight in memory of its own."""
    return replace(
        weight,
        bitmask=weight.bitmask.clone(),
        row_offsets=weight.row_offsets.clone(),
        values=weight.values.clone(),
        scales=None if weight.scales is None else weight.scales.clone(),
    )


def _slower(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The one of two measurements that speaks more for dense, as one of both weights."""
    if old is None:
        return {**new, "times": 1}
    slower = min(old, new, key=lambda cell: cell["dense_seconds"] / cell["sparse_seconds"])
    return {
        **slower,
        "density": max(old["density"], new["density"]),
        "times": int(old.get("times", 1)) + 1,
    }


def _by_layout(
    cells: Mapping[tuple[int, int], Mapping[str, Any]],
    layouts: Sequence[int],
    m_values: Sequence[int],
    density: float,
) -> dict[int, Measured]:
    def speedup(cell: Mapping[str, Any]) -> float:
        # No kernel takes longer by more than there is more to do.
        denser = max(1.0, density / cell["density"]) if cell["density"] else 1.0
        return float(cell["dense_seconds"] / cell["sparse_seconds"] / denser)

    found: dict[int, Measured] = {}
    for layout in layouts:
        own = {m: cells[layout, m] for m in m_values if (layout, m) in cells}
        if len(own) < len(m_values):
            continue
        kernels = {m: str(cell.get("kernel", "")) for m, cell in own.items()}
        extra = max(int(cell.get("extra_bytes", 0)) for cell in own.values())
        if any(kernels == other.kernels for other in found.values()):
            continue  # The same kernels: the difference would be noise.
        found[layout] = Measured(
            speedup={m: speedup(cell) for m, cell in own.items()},
            noise=max(cell["noise"] for cell in own.values()),
            extra_bytes=extra,
            kernels=kernels,
            times=min(int(cell.get("times", 1)) for cell in own.values()),
        )
    return found


def _density(weight: BitmaskWeight) -> float:
    elements = weight.rows * weight.columns
    return weight.kept / elements if elements else 0.0


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
