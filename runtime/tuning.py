"""Times packed linears against ONNX Runtime's dense ones on this machine, side by side.

Both run as a model runs them: a chain of linears of one shape, each with its own copy of the
weight, as many as the real model's weights take room, so that caches help as much as they will
there. Dense and sparse take turns; what is compared are medians.
"""

from __future__ import annotations

import ctypes
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.formats import VALUE_TYPES, BitmaskWeight, pack_bitmask
from zeroskip.runtime.kernels.library import CpuLinear, ThreadPool, load_library
from zeroskip.runtime.kernels.location import library_path
from zeroskip.runtime.timing import DenseChain, SparseChain, compare, standard_error
from zeroskip.runtime.tuning_cache import TuningCache, cpu_name

STREAMED_BYTES = 1 << 28
"""Weights beyond this are taken to come from memory at every step, whatever their size."""
SWEEP_OPERATIONS = 4e9
"""Where arithmetic dominates, fewer copies do: one pass over them stays below this."""
MOST_COPIES = 256
NODE_SECONDS = 0.6e-6
"""What a custom operator costs ONNX Runtime beyond a MatMul, per call."""
UNUSABLE = 0.1
"""Measurements noisier than this are taken again the next time."""


@dataclass(frozen=True)
class Measured:
    """How one layout of a weight fared against dense.

    Args:
        speedup: m to dense time / sparse time.
        noise: The largest standard error among them, relative.
        extra_bytes: Memory that the layout takes besides the packed tensors.
        kernels: m to the kernel that ran.
    """

    speedup: Mapping[int, float]
    noise: float
    extra_bytes: int
    kernels: Mapping[int, str]


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
        self._dense: dict[tuple[int, ...], DenseChain] = {}

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
        only_known: bool = False,
    ) -> dict[int, Measured]:
        """Times a weight in each layout; what the cache knows is not timed again.

        Args:
            weight: Its pattern of zeros is used as it is.
            m_values: Rows of x.
            threads: With 1, thread CPU time is taken: other processes hardly disturb it.
            accuracy_level: 4 rounds activations to 8 bits (int8 values only).
            layouts: A layout that runs the same kernels as the one before it is left out.
            working_set_bytes: Size of all dense linears of the model, float32; None for this alone.
            only_known: Times nothing.

        Returns:
            Layout to what was seen; without those of which something is not known.
        """
        seen = self._circumstances(weight, threads, accuracy_level, working_set_bytes)
        cells: dict[tuple[int, int], dict[str, Any]] = {}
        for layout in layouts:
            for m in m_values:
                known = self.cache.get(seen.key(layout, m))
                if known is not None and known["noise"] <= UNUSABLE:
                    cells[layout, m] = known
        missing = [(layout, m) for layout in layouts for m in m_values if (layout, m) not in cells]
        if missing and not only_known:
            made = self._time(weight, missing, threads, accuracy_level, working_set_bytes)
            self.cache.put({seen.key(*where): cell for where, cell in made.items()})
            cells.update(made)
        return _by_layout(cells, layouts, m_values)

    def _circumstances(
        self, weight: BitmaskWeight, threads: int, level: int, working_set_bytes: int | None
    ) -> _Circumstances:
        machine = (
            f"{cpu_name()} | {' '.join(self.instruction_sets)} | {_digest(self.library._name)} | "
            f"onnxruntime {onnxruntime.__version__}"
        )
        return _Circumstances(
            machine=machine,
            threads=threads,
            rows=weight.rows,
            columns=weight.columns,
            density=round_density(weight),
            value_type=type_name(weight),
            block_size=weight.block_size,
            accuracy_level=level,
            working_set=_class_of(_working_set(weight, working_set_bytes)),
        )

    def _time(
        self,
        weight: BitmaskWeight,
        missing: Sequence[tuple[int, int]],
        threads: int,
        level: int,
        working_set_bytes: int | None,
    ) -> dict[tuple[int, int], dict[str, Any]]:
        room = _working_set(weight, working_set_bytes)
        # What streams when dense is taken to stream when packed, too: the model may be far larger.
        packed_room = (
            room if room >= STREAMED_BYTES else room * weight.nbytes // _dense_bytes(weight)
        )
        wanted = max(1, min(packed_room // max(1, weight.nbytes), MOST_COPIES))
        pool = ThreadPool(self.library, threads) if threads > 1 else None
        chains: dict[int, SparseChain] = {}
        for layout in dict.fromkeys(layout for layout, _ in missing):
            copies = min(
                wanted, max(_most_copies(weight, m) for each, m in missing if each == layout)
            )
            linears = self._linears(weight, copies, layout, level)
            if linears:
                chains[layout] = SparseChain(linears, pool)
        overheads = self._overhead(threads)
        cells: dict[tuple[int, int], dict[str, Any]] = {}
        for m in dict.fromkeys(m for _, m in missing):
            dense = self._dense_chain(weight, m, room, threads)
            asked = [layout for layout, each in missing if each == m and layout in chains]
            x = torch.randn(m, weight.columns, generator=torch.Generator().manual_seed(m))
            runs: list[Callable[[], float]] = [partial(dense.seconds, x)]
            for layout in asked:
                runs.append(partial(chains[layout].seconds, x, _most_copies(weight, m)))
            times = compare(runs, self.seconds)
            for layout, samples in zip(asked, times[1:], strict=True):
                cell = _cell(times[0], samples, *overheads)
                linear = chains[layout].linears[0]
                cell["extra_bytes"] = linear.nbytes
                cell["kernel"] = linear.kernel(m)
                cells[layout, m] = cell
        return cells

    def _linears(
        self, weight: BitmaskWeight, copies: int, layout: int, level: int
    ) -> list[CpuLinear]:
        try:
            return [
                CpuLinear(
                    self.library,
                    copied(weight),
                    layout=layout,
                    accuracy_level=level,
                    instruction_set=self.instruction_set,
                )
                for _ in range(copies)
            ]
        except LoweringError:
            return []  # No kernel of this layout serves the weight.

    def _dense_chain(self, weight: BitmaskWeight, m: int, room: int, threads: int) -> DenseChain:
        copies = min(room // _dense_bytes(weight), MOST_COPIES, _most_copies(weight, m))
        key = (weight.rows, weight.columns, max(1, copies), threads)
        if key not in self._dense:
            while len(self._dense) >= 2:  # Each may hold STREAMED_BYTES.
                self._dense.pop(next(iter(self._dense)))
            self._dense[key] = DenseChain(*key)
        return self._dense[key]

    def _overhead(self, threads: int) -> tuple[float, float]:
        """What Python adds to one dense and one sparse linear, from the smallest there are."""
        dense = DenseChain(8, 8, 16, threads)
        tiny = pack_bitmask(torch.ones(8, 8))
        sparse = SparseChain([CpuLinear(self.library, tiny) for _ in range(16)], None)
        x = torch.ones(1, 8)
        times = compare([partial(dense.seconds, x), partial(sparse.seconds, x, 16)], 0.02)
        return min(times[0]), min(times[1])


def round_density(weight: BitmaskWeight) -> float:
    """Returns the share of kept weights, to the nearest 0.05, as measurements are kept by."""
    elements = weight.rows * weight.columns
    return round(round(weight.kept / elements * 20) / 20, 2) if elements else 0.0


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


def _cell(
    dense: Sequence[float], sparse: Sequence[float], dense_overhead: float, sparse_overhead: float
) -> dict[str, Any]:
    def without(seconds: float, overhead: float) -> float:
        return max(seconds - overhead, seconds / 10)

    dense_seconds = without(statistics.median(dense), dense_overhead)
    sparse_seconds = without(statistics.median(sparse), sparse_overhead) + NODE_SECONDS
    return {
        "dense_seconds": dense_seconds,
        "sparse_seconds": sparse_seconds,
        "noise": standard_error(dense, sparse),
    }


def _by_layout(
    cells: Mapping[tuple[int, int], Mapping[str, Any]],
    layouts: Sequence[int],
    m_values: Sequence[int],
) -> dict[int, Measured]:
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
            speedup={m: cell["dense_seconds"] / cell["sparse_seconds"] for m, cell in own.items()},
            noise=max(cell["noise"] for cell in own.values()),
            extra_bytes=extra,
            kernels=kernels,
        )
    return found


def _dense_bytes(weight: BitmaskWeight) -> int:
    return max(1, weight.rows * weight.columns * 4)


def _working_set(weight: BitmaskWeight, working_set_bytes: int | None) -> int:
    """What competes for the caches: all dense linears of the model, or this one alone."""
    own = _dense_bytes(weight)
    return min(max(own, working_set_bytes or 0), max(own, STREAMED_BYTES))


def _class_of(size: int) -> str:
    """A power of two: models of about the same size share their measurements."""
    if size >= STREAMED_BYTES:
        return "streamed"
    return f"{2 ** (size.bit_length() - 1) / 2**20:g} MiB"


def _most_copies(weight: BitmaskWeight, m: int) -> int:
    return max(1, int(SWEEP_OPERATIONS / max(1, 2 * m * weight.rows * weight.columns)))


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
