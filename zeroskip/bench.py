"""`zeroskip bench`: a folder against its dense form, and one sentence on whether the zeros pay."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.ir.errors import ArtifactError, CompileError
from zeroskip.linear_table import size, table

if TYPE_CHECKING:
    from zeroskip.runtime.onnx.paired_speed import PairedSpeed
    from zeroskip.runtime.resident import Residence

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class Form:
    """What one form of the model takes, apart from time.

    Args:
        path: Of the ONNX file; None where it was made for the measurement.
        bytes: The files of its weights and graph.
        residence: Memory and load time, in a process of its own; None where not measured.
    """

    path: Path | None
    bytes: int
    residence: Residence | None


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Args:
        sparse: The folder that was asked about.
        dense: What it was held against.
        speeds: One for each length of input.
        threads: Within an operator.
        machine: Its processor.
    """

    sparse: Form
    dense: Form
    speeds: tuple[PairedSpeed, ...]
    threads: int
    machine: str

    @property
    def verdict(self) -> str:
        """Whether the zeros pay here, in a sentence or two."""
        by_outcome: dict[str, list[PairedSpeed]] = {}
        for speed in self.speeds:
            by_outcome.setdefault(speed.outcome, []).append(speed)
        faster, slower, open_ = (
            by_outcome.get(each, []) for each in ("faster", "slower", "undecided")
        )
        parts = []
        if faster:
            parts.append(f"The zeros pay here: {_listed(faster)}.")
        if slower:
            start = "They do not pay" if faster else "The zeros do not pay here"
            advice = "" if faster else " Keep dense."
            parts.append(f"{start}: {_listed(slower)}.{advice}")
        if open_:
            parts.append(
                f"Undecided: {_listed(open_)}; the difference is smaller than the noise"
                + (", so there is no reason not to keep dense." if not faster else ".")
            )
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "verdict": self.verdict,
            "pays": [speed.tokens for speed in self.speeds if speed.outcome == "faster"],
            "threads": self.threads,
            "machine": self.machine,
            "speeds": [
                {**asdict(speed), "outcome": speed.outcome, "warnings": list(speed.warnings)}
                for speed in self.speeds
            ],
            **{
                name: {
                    "path": None if form.path is None else str(form.path),
                    "bytes": form.bytes,
                    "memory": None if form.residence is None else asdict(form.residence),
                }
                for name, form in (("sparse", self.sparse), ("dense", self.dense))
            },
        }

    def __str__(self) -> str:
        head = ["tokens", "sparse", "dense", "CPU sparse", "CPU dense", "speed-up", "half within"]
        rows = [
            [
                f"{speed.tokens}" + (f" after {speed.context}" if speed.context else ""),
                *(
                    f"{1000 * spread.median:.3f} ms"
                    for spread in (speed.sparse, speed.dense, speed.sparse_cpu, speed.dense_cpu)
                ),
                f"{speed.speedup.median:.2f}x",
                f"{speed.speedup.low:.2f}-{speed.speedup.high:.2f}x",
            ]
            for speed in self.speeds
        ]
        lines = [*table(head, rows), ""]
        forms = {"sparse": self.sparse, "dense": self.dense}
        head, rows = ["", "files"], [[name, size(form.bytes)] for name, form in forms.items()]
        if all(form.residence for form in forms.values()):
            head += ["in memory after a run", "most while loading", "to load"]
            for row, form in zip(rows, forms.values(), strict=True):
                found = form.residence
                assert found is not None
                row += [size(found.resident), size(found.peak_load), f"{found.load_seconds:.2f} s"]
        plural = "" if self.threads == 1 else "s"
        lines += [*table(head, rows), "", f"{self.machine}, {self.threads} thread{plural}"]
        for speed in self.speeds:
            for warning in speed.warnings:
                lines.append(f"noise at {speed.tokens} tokens: {warning}")
        return "\n".join([*lines, self.verdict])


def find_model(directory: Path) -> Path:
    """Returns the ONNX file of an ONNX folder, or of the folder onnx/ of an artefact.

    Raises:
        ArtifactError: There is none.
    """
    for path in (directory / MODEL_FILE, directory / "onnx" / MODEL_FILE):
        if path.is_file():
            return path
    raise ArtifactError(
        f"there is no {MODEL_FILE} here, nor in onnx/",
        where=str(directory),
        next_step="pass a folder that an ONNX export wrote, or an artefact that holds one",
    )


def check_packed(model: Path) -> None:
    """Refuses a model in which nothing is packed: it is dense already.

    Raises:
        ArtifactError: It is, or is no ONNX file.
    """
    from zeroskip.runtime.onnx.custom_ops import uses_sparse_linear

    if not uses_sparse_linear(model):
        raise ArtifactError(
            "no linear is packed here: ONNX Runtime runs the model as a dense one, zeros and all",
            where=str(model),
            next_step="pack what pays with `zeroskip tune`, or name another folder with --dense",
        )


def bench(
    model: Path,
    dense: Path | None,
    tokens: Sequence[int],
    *,
    threads: int,
    rounds: int = 15,
    seconds: float = 20.0,
    memory: bool = True,
    report: Callable[[PairedSpeed], None] | None = None,
) -> Bench:
    """Measures a model against a dense one.

    Args:
        model: An ONNX file.
        dense: What it is held against; None makes its own dense form, for as long as it takes.
        tokens: Lengths of input.
        threads: Within an operator.
        rounds: At most so many for each length.
        seconds: About so long for each length.
        memory: Whether memory and load time are measured, in a process for each form.
        report: Called with each length that is done.

    Raises:
        CompileError: One of them cannot be opened or run.
    """
    from zeroskip.runtime.machine import cpu_name
    from zeroskip.runtime.onnx.densify import densify
    from zeroskip.runtime.onnx.paired_speed import compare_speed

    with tempfile.TemporaryDirectory(prefix="zeroskip-bench-") as folder:
        against = dense
        if against is None:
            against = Path(folder) / MODEL_FILE
            densify(model, against)
        speeds = compare_speed(
            model, against, tokens, threads=threads, rounds=rounds, seconds=seconds, report=report
        )
        forms = [
            Form(shown, _bytes(path), _residence(path, tokens[0], threads) if memory else None)
            for shown, path in ((model, model), (dense, against))
        ]
    return Bench(forms[0], forms[1], tuple(speeds), threads, cpu_name())


def _residence(path: Path, tokens: int, threads: int) -> Residence | None:
    import sys

    from zeroskip.runtime.onnx.custom_ops import custom_ops_path, uses_sparse_linear
    from zeroskip.runtime.onnx.paired_speed import make_feeds, open_timed
    from zeroskip.runtime.resident import measure_residence

    if not sys.platform.startswith("linux"):
        return None
    feeds, _ = make_feeds(open_timed(path, threads), tokens)
    libraries = [Path(custom_ops_path())] if uses_sparse_linear(path) else []
    return measure_residence(path, feeds, threads=threads, libraries=libraries)


def _bytes(path: Path) -> int:
    """The size of a model and of what lies beside it under its name."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.is_file())


def parse_tokens(text: str) -> tuple[int, ...]:
    """Returns the lengths of a list such as "1,128", rising, each once.

    Raises:
        CompileError: Something in it is no whole number from 1 to 1,000,000.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 0 < int(part) <= 1_000_000 for part in parts):
        raise CompileError(
            f"--tokens {text} is no list of lengths", next_step="write it like --tokens 1,128"
        )
    return tuple(sorted({int(part) for part in parts}))


def _listed(speeds: Sequence[PairedSpeed]) -> str:
    def at(speed: PairedSpeed) -> str:
        count = "one token" if speed.tokens == 1 else f"{speed.tokens} tokens"
        return f"{speed.speedup.median:.2f}x at {count}"

    return ", ".join(map(at, speeds))
