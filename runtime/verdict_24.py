"""Whether the zeros of a 2:4 weight pay on a CUDA device: eligible or not, why, and how fast.

What needs no device is decided without one. Speeds come from the tables that `linear_24` itself
goes by, or are measured now; then they decide in this process too, and `table_of` finds them again
in the verdicts of a report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroskip.ir.errors import RequirementError
from zeroskip.ir.semi_structured import GROUP, SemiStructuredWeight
from zeroskip.runtime import gpu_dispatch
from zeroskip.runtime.candidates24 import DENSE
from zeroskip.runtime.gpu_dispatch import Entry, Table, describe, key_of
from zeroskip.runtime.kernels import linear_24 as kernels

DTYPES = (torch.float16, torch.bfloat16)
WIDTH = 32
"""Columns that one sparse instruction takes."""


def refusal_of_shape(columns: int, dtype: torch.dtype) -> str | None:
    """Returns why no CUDA device has a kernel for a weight of that width and dtype, or None."""
    if dtype not in DTYPES:
        return f"its weight is {_name(dtype)}; the kernels take float16 and bfloat16"
    if columns % WIDTH:
        return f"eligible: no, K={columns} is not a multiple of {WIDTH}"
    return None


def refusal_of_mask(keep: torch.Tensor) -> str | None:
    """Returns where a mask [rows, columns] first keeps more than two of four, or None."""
    counts = keep.reshape(keep.shape[0], -1, GROUP).sum(-1)
    if not (counts > 2).any():
        return None
    row, group = (counts > 2).nonzero()[0].tolist()
    first = GROUP * group
    return (
        f"its mask keeps {int(counts[row, group])} of the {GROUP} weights of row {row}, "
        f"columns {first} to {first + GROUP - 1}"
    )


def find_device(target: str, why: str) -> torch.device:
    """Returns a CUDA device.

    Args:
        target: `cuda`, or `cuda:` and a number.
        why: What it is needed for, for the message.

    Raises:
        RequirementError: There is none, or no such one.
    """
    device = torch.device(target)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < count:
        return device
    raise RequirementError(
        f"{why} needs a CUDA device, and there is {f'no {target}' if count else 'none'}",
        next_step="compile on the machine that will run the model, or use tune='table'",
    )


def device_if_any(target: str) -> torch.device | None:
    """Returns a CUDA device, or None where there is none."""
    try:
        return find_device(target, target)
    except RequirementError:
        return None


@dataclass(frozen=True)
class Verdict24:
    """What is known of the speed of one product.

    Args:
        rows: Of W, those of all linears that it computes.
        columns: Of W.
        dtype: Of W.
        found: The winner by number of tokens, by name of the device; empty where nothing is known.
        source: `measured`, `table`, or `always` where nobody asked.
        fused: The linears that the product computes, if they are several.
        reason: Overrides what the speeds say.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    found: Mapping[str, Mapping[int, Entry]]
    source: str
    fused: tuple[str, ...] = ()
    reason: str = ""

    @property
    def pays(self) -> bool:
        """Whether anything is faster than dense for any number of tokens."""
        entries = [entry for by_tokens in self.found.values() for entry in by_tokens.values()]
        return self.source == "always" or any(entry.choice != DENSE for entry in entries)

    def of(self, names: tuple[str, ...]) -> Verdict24:
        """Returns the same verdict of a product that computes these linears."""
        return dataclasses.replace(self, fused=names)

    def us(self) -> dict[int, float]:
        """Returns the microseconds by number of tokens, on the device of which least is expected."""
        return self._worst(lambda entry: entry.us)

    def explain(self) -> str:
        """Returns what is to be said to a person: `sparse 1.84x at m=1, dense at m=32`."""
        texts = [f"on {device}: {describe(found)}" for device, found in self.found.items()]
        text = self.reason or ("; ".join(texts) if texts else "not timed")
        # The last words alone: the report puts layers that fared alike on one line.
        names = [name.removesuffix(".weight").rpartition(".")[2] for name in self.fused]
        return f"{text}; one product of {', '.join(names)}" if names and self.pays else text

    def to_json(self, rows: int) -> dict[str, object]:
        """Returns plain values, with the keys that reports know of `dispatch.Verdict`.

        Args:
            rows: Of the one linear that it is written down for.
        """
        speedups = self._worst(lambda entry: -entry.speedup)
        size = self.dtype.itemsize
        return {
            "rows": rows,
            "columns": self.columns,
            "value_type": _name(self.dtype),
            "accuracy_level": 0,
            "dense_bytes": size * rows * self.columns,
            "packed_bytes": rows * (size * self.columns // 2 + -(-self.columns // 8)),
            "layout": 0,
            "speedup": {str(tokens): round(-value, 3) for tokens, value in speedups.items()},
            "choice": "sparse" if self.pays else "dense",
            "reason": self.explain(),
            "source": self.source,
            "rival": f"PyTorch on {' or '.join(self.found)}" if self.found else "PyTorch",
            "threads": 0,
            "fused": list(self.fused),
        }

    def _worst(self, of: Callable[[Entry], float]) -> dict[int, float]:
        worst: dict[int, float] = {}
        for by_tokens in self.found.values():
            for tokens, entry in by_tokens.items():
                worst[tokens] = max(worst.get(tokens, float("-inf")), of(entry))
        return worst


@dataclass(frozen=True)
class Judge:
    """Finds verdicts.

    Args:
        tokens: Numbers of tokens that matter.
        device: The device to measure on, or whose measurements are looked up.
        device_name: A device that need not be here, as CUDA reports it. With neither, all that are
            in the tables count.
        measured: What was measured so far, by shape.
    """

    tokens: Sequence[int]
    device: torch.device | None = None
    device_name: str = ""
    measured: Table = field(default_factory=Table)

    def look_up(self, rows: int, columns: int, dtype: torch.dtype) -> Verdict24:
        """Returns what the tables say of a product, the latest that knows the shape on a device."""
        found: dict[str, dict[int, Entry]] = {}
        wanted = self.device_name
        if not wanted and self.device is not None:
            wanted = key_of(rows, columns, dtype, self.device).device
        for table in kernels.known_tables():
            for key in table.entries:
                same = (key.rows, key.columns, key.dtype) == (rows, columns, _name(dtype))
                if same and wanted in ("", key.device) and key.device not in found:
                    found[key.device] = _entries(table, key, self.tokens)
        unknown = f"a product of {rows} x {columns} in {_name(dtype)} was never measured on "
        reason = "" if found else unknown + (wanted or "any device")
        return Verdict24(rows, columns, dtype, found, "table", reason=reason)

    def measure(
        self, rows: int, columns: int, dtype: torch.dtype, load: Callable[[], SemiStructuredWeight]
    ) -> Verdict24:
        """Measures a product, each shape once.

        Args:
            rows: Of W.
            columns: Of W.
            dtype: Of W.
            load: Makes a weight of that shape, on any device.
        """
        assert self.device is not None
        key = key_of(rows, columns, dtype, self.device)
        if key not in self.measured.entries:
            weight = load()
            moved = SemiStructuredWeight(
                weight.values.to(self.device), weight.codes.to(self.device)
            )
            self.measured.put(key, gpu_dispatch.tune(moved, self.tokens))
        return Verdict24(rows, columns, dtype, {key.device: self.measured.entries[key]}, "measured")

    def measured_of(self, rows: set[int], columns: int, dtype: torch.dtype) -> dict[str, Any]:
        """Returns what was measured for weights of these sizes as plain values: `{"table": ...}`."""
        table = Table()
        for key, found in self.measured.entries.items():
            if key.rows in rows and (key.columns, key.dtype) == (columns, _name(dtype)):
                table.put(key, found)
        return {"table": table.to_json()} if table.entries else {}


def allow_same_kernels(rows: Sequence[int], columns: int) -> bool:
    """Whether weights one below the other are served by all that serve each: cuSPARSELt takes rows by 32."""
    return columns % 64 != 0 or sum(rows) % 32 == 0 or all(count % 32 for count in rows)


def is_not_slower(fused: Verdict24, apart: Iterable[Verdict24]) -> bool:
    """Whether one product takes no longer than several, for each number of tokens."""
    several = [verdict.us() for verdict in apart]
    return all(us <= sum(each[tokens] for each in several) for tokens, us in fused.us().items())


def table_of(verdicts: Iterable[Mapping[str, Any] | None]) -> Table:
    """Returns what was measured for the verdicts of a `Lowered` fact or a report.

    A later process makes it decide there: `kernels.linear_24.use_table(table_of(...))`.
    """
    table = Table()
    for verdict in verdicts:
        if verdict and "table" in verdict:
            for key, found in Table.from_json(verdict["table"]).entries.items():
                table.put(key, found)
    return table


def _entries(table: Table, key: gpu_dispatch.Key, tokens: Sequence[int]) -> dict[int, Entry]:
    """Returns what a table makes run for each number of tokens, with the times nearest to it."""
    known = table.entries[key]
    found = {}
    for count in tokens:
        entry = known[min((each for each in known if each >= count), default=max(known))]
        is_taken = table.find(key, count) == entry.choice
        found[count] = entry if is_taken else Entry(DENSE, entry.dense_us, entry.dense_us)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
