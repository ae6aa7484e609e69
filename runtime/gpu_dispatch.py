"""Which kernel serves a 2:4 weight on a GPU: by measurement, dense included, never slower than dense.

A table holds, for each (rows, columns, dtype, device name) and number of tokens, the fastest
candidate and its speed-up. A call takes the entry of the smallest number of tokens that is at least
its own, unless dense, whose time for its own number lies between those measured, is expected to be
faster. Where nothing was measured on the device, dense runs, but for what the table of the package
knows of the same device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import SemiStructuredWeight
from zeroskip.runtime import gpu_timing
from zeroskip.runtime.candidates24 import (
    DENSE,
    KERNELS,
    Call,
    Choice,
    Form,
    list_candidates,
    search_cusparselt,
)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Numbers of tokens that are measured unless others are asked."""
LEAST = 1.0
"""A candidate this many times as fast as dense, measured in turn with it, replaces it."""
BETWEEN = 1.05
"""For a number of tokens between two that were measured, by which dense is to be beaten: dense gets
slower in steps, and rows that are added to reach the measured number have to be copied."""
FINALISTS = 3
"""The fastest of the first round are measured again, in turn with dense."""
VERSION = 1


@dataclass(frozen=True)
class Key:
    """What a measurement holds for.

    Args:
        rows: Of W.
        columns: Of W.
        dtype: "float16" or "bfloat16".
        device: Its name, as CUDA reports it.
    """

    rows: int
    columns: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Entry:
    """The winner for one number of tokens.

    Args:
        choice: It; dense where nothing is faster.
        dense_us: Microseconds of dense, measured in turn with the winner.
        us: Microseconds of the winner.
    """

    choice: Choice
    dense_us: float
    us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.us


@dataclass
class Table:
    """Winners by key and number of tokens."""

    entries: dict[Key, dict[int, Entry]] = field(default_factory=dict)

    def put(self, key: Key, found: Mapping[int, Entry]) -> None:
        """Adds winners; those of the same numbers of tokens are replaced."""
        self.entries.setdefault(key, {}).update(found)

    def find(self, key: Key, tokens: int) -> Choice:
        """Returns what to run: dense where nothing is known."""
        known = self.entries.get(key)
        if not known:
            return DENSE
        above = min((each for each in known if each >= tokens), default=None)
        if above is None:
            return known[max(known)].choice
        entry = known[above]
        below = max((each for each in known if each < tokens), default=None)
        if below is not None and tokens != above:
            share = (tokens - below) / (above - below)
            dense_us = known[below].dense_us * (1 - share) + entry.dense_us * share
            if entry.us * BETWEEN > dense_us:
                return DENSE
        return entry.choice

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON, in a fixed order."""
        linears = []
        for key in sorted(
            self.entries, key=lambda key: (key.device, key.dtype, key.rows, key.columns)
        ):
            measured = [
                {
                    "tokens": tokens,
                    **entry.choice.to_json(),
                    "dense_us": round(entry.dense_us, 3),
                    "us": round(entry.us, 3),
                }
                for tokens, entry in sorted(self.entries[key].items())
            ]
            linears.append({**vars(key), "measured": measured})
        return {"version": VERSION, "linears": linears}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Table:
        """Returns what `to_json` wrote.

        Raises:
            LoweringError: It is of another version, or names a kernel that does not exist.
        """
        if stored.get("version") != VERSION:
            raise LoweringError(
                f"a dispatch table of version {stored.get('version')}",
                where="the dispatch table",
                next_step=f"tune again; this is version {VERSION}",
            )
        table = Table()
        for linear in stored["linears"]:
            key = Key(linear["rows"], linear["columns"], linear["dtype"], linear["device"])
            found = {}
            for each in linear["measured"]:
                rest = {k: v for k, v in each.items() if k not in ("tokens", "dense_us", "us")}
                choice = Choice.from_json(rest)
                if choice.kernel not in KERNELS:
                    raise LoweringError(
                        f"no kernel {choice.kernel!r}",
                        where="the dispatch table",
                        next_step=f"tune again; there are {', '.join(KERNELS)}",
                    )
                found[int(each["tokens"])] = Entry(choice, each["dense_us"], each["us"])
            table.put(key, found)
        return table


@cache
def shipped_table() -> Table:
    """Returns what the package knows, measured by `benchmarks/gpu_linear.py`."""
    file = resources.files("zeroskip.runtime.kernels") / "gpu_table.json"
    if not file.is_file():
        return Table()
    return Table.from_json(json.loads(file.read_text()))


def key_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Key:
    """Returns the key of a weight on a device."""
    name = _name_of(device.index) if device.type == "cuda" else device.type
    return Key(rows, columns, str(dtype).removeprefix("torch."), name)


@cache
def _name_of(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@dataclass(frozen=True)
class Trial:
    """One candidate in the first round.

    Args:
        tokens: Rows of x.
        choice: It.
        us: Microseconds; None if it could not run.
        error: Why, then.
    """

    tokens: int
    choice: Choice
    us: float | None
    error: str | None = None


def tune(
    weight: SemiStructuredWeight,
    tokens: Sequence[int] = TOKENS,
    *,
    candidates: Callable[..., Sequence[Choice]] = list_candidates,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> dict[int, Entry]:
    """Measures every candidate for a weight and returns the winners.

    Operands rotate beyond the L2 cache. The fastest candidates of a first round are measured again
    in turn with dense, and only one that is then at least as fast is taken. Must not be called
    while a CUDA graph is captured.

    Args:
        weight: On a CUDA device, float16 or bfloat16.
        tokens: Numbers to measure.
        candidates: Lists them for (dtype, tokens, rows, columns, device).
        on_trial: Is told every candidate's time.

    Raises:
        LoweringError: The weight is not on a CUDA device, or a graph is being captured.
    """
    device = weight.values.device
    if device.type != "cuda":
        raise LoweringError(
            f"a weight on {device} cannot be tuned",
            where="2:4 dispatch",
            next_step="move the model to a CUDA device first",
        )
    if torch.cuda.is_current_stream_capturing():
        raise LoweringError(
            "tuning launches kernels and cannot happen while a CUDA graph is captured",
            where="2:4 dispatch",
            next_step="tune before the capture",
        )
    rotating = _Rotating(weight)
    return {
        count: _tune_one(rotating, count, candidates, on_trial) for count in dict.fromkeys(tokens)
    }


class _Rotating:
    """Copies of each form of one weight, enough of them to leave the cache."""

    def __init__(self, weight: SemiStructuredWeight) -> None:
        self.weight = weight
        self._forms: dict[Any, list[Form]] = {}

    def forms(self, name: str) -> list[Form]:
        make = KERNELS[name].make
        if make not in self._forms:
            form = make(self.weight)
            nbytes = sum(part.numel() * part.element_size() for part in form)
            count = gpu_timing.copies_beyond_cache(nbytes, self.weight.values.device)
            copies = [tuple(part.clone() for part in form) for _ in range(count - 1)]
            self._forms[make] = [form, *copies]
        return self._forms[make]

    def calls(self, choice: Choice, call: Call) -> list[Callable[[], object]]:
        run = KERNELS[choice.kernel].run
        return [_bind(run, form, call, choice.options) for form in self.forms(choice.kernel)]


def _bind(
    run: Callable[..., torch.Tensor], form: Form, call: Call, options: Mapping[str, int]
) -> Callable[[], object]:
    return lambda: run(form, call, options)


def _tune_one(
    rotating: _Rotating,
    tokens: int,
    candidates: Callable[..., Sequence[Choice]],
    on_trial: Callable[[Trial], None],
) -> Entry:
    weight = rotating.weight
    dtype, device = weight.values.dtype, weight.values.device
    x = torch.randn(tokens, weight.columns, device=device).to(dtype)
    call = Call(x, None, weight.rows, {})
    seen: list[tuple[float, Choice]] = []
    for choice in candidates(dtype, tokens, weight.rows, weight.columns, device):
        try:
            if choice.kernel == "cusparselt" and choice.options["algorithm"] < 0:
                padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8))
                form = rotating.forms("cusparselt")[0]
                choice = Choice("cusparselt", {"least": tokens, **search_cusparselt(form, padded)})
            us = gpu_timing.time_call(rotating.calls(choice, call))
        except (RuntimeError, ValueError, LoweringError) as error:
            on_trial(Trial(tokens, choice, None, f"{type(error).__name__}: {error}"))
            continue
        on_trial(Trial(tokens, choice, us))
        seen.append((us, choice))
    seen.sort(key=lambda each: each[0])
    dense = rotating.calls(DENSE, call)
    best: Entry | None = None
    for _, choice in seen[:FINALISTS]:
        dense_us, us = gpu_timing.time_pair(dense, rotating.calls(choice, call))
        entry = Entry(choice, dense_us, us)
        if best is None or entry.speedup > best.speedup:
            best = entry
    if best is None or best.speedup < LEAST:
        us = best.dense_us if best else gpu_timing.time_call(dense)
        return Entry(DENSE, us, us)
    return best


def describe(found: Mapping[int, Entry]) -> str:
    """Returns winners as one line: `sparse 1.84x to 1.60x at m=1..16, dense at m=32`."""
    runs: list[tuple[str, list[int], list[float]]] = []
    for tokens, entry in sorted(found.items()):
        kind = "dense" if entry.choice == DENSE else "sparse"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, [], []))
        runs[-1][1].append(tokens)
        runs[-1][2].append(entry.speedup)
    return ", ".join(_describe_run(*run) for run in runs)


def _describe_run(kind: str, tokens: Iterable[int], speedups: Iterable[float]) -> str:
    counts, ratios = list(tokens), list(speedups)
    span = f"m={counts[0]}" if len(counts) == 1 else f"m={counts[0]}..{counts[-1]}"
    if kind == "dense":
        return f"dense at {span}"
    low, high = min(ratios), max(ratios)
    gain = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
    return f"sparse {gain} at {span}"


def explain_refusal(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Returns why no kernel serves such a weight on a device, or None: `K=1020 is not ...`."""
    sparse = [kernel for name, kernel in KERNELS.items() if name != DENSE.kernel]
    reasons = [kernel.refuse(dtype, rows, columns, device) for kernel in sparse]
    return None if None in reasons else reasons[0]
