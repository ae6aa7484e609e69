"""Finished stages on disk: each appears complete or not at all, and is checked when it is read.

    stages/002-00017/
        stage.json           graph, facts and where weights live; which stage of what this is
        facts.safetensors    the tensors of facts and of wrapped weights: masks, scales
        weights.safetensors  weights with new values
        SHA256SUMS           of the three; a stage without it, or another one, is thrown away

Stages are numbered in the order in which they are finished. One is used only together with all
before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.fact_files import FACTS, Decoder, Encoder, NotStorableError, storable
from zeroskip.ir.facts import Fact
from zeroskip.ir.folders import sync
from zeroskip.ir.graph_files import decode_graph, encode_graph, same_graph
from zeroskip.ir.program import Program
from zeroskip.ir.weights import OnDisk, Source

_RECORD = "stage.json"
_FACTS = "facts.safetensors"
_WEIGHTS = "weights.safetensors"
_SUMS = "SHA256SUMS"
_FINISHED = re.compile(r"\d{3}-\d{5}")


def digest_of(value: object) -> str:
    """Returns a digest of values: of containers what is in them, of a tensor every bit."""
    return hashlib.sha256(_text(value).encode()).hexdigest()


def _text(value: object) -> str:
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.tobytes()).hexdigest()
        return f"tensor {value.dtype} {tuple(value.shape)} {digest}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)


@dataclass(frozen=True)
class FinishedStage:
    """A stage as it was read back.

    Args:
        program: What the passes made of it.
        steps: What each pass noted, as plain values.
    """

    program: Program
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class StageFiles:
    """The finished stages of one compilation.

    Args:
        folder: Where they are; made when the first is written.
        key: What the compilation depends on, as a digest. Stages of another key are never used.
    """

    folder: Path
    key: str

    def identify(self, previous: str, *parts: object) -> str:
        """Returns the name of what is computed from all that went before, and these settings."""
        return digest_of([self.key, previous, *parts])

    def prepare(self) -> None:
        """Makes the folder, and removes what a stage that was never finished left in it.

        Raises:
            ArtifactError: It cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if not _FINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
        except OSError as error:
            raise ArtifactError(
                f"finished stages cannot be kept: {error}",
                where=str(self.folder),
                next_step="choose a folder that you may write to",
            ) from error

    def holds(self, number: tuple[int, int], identity: str) -> bool:
        """Whether a stage is there and as it was written; a damaged one and all behind it are removed."""
        place = self._place(number)
        if not place.exists():
            return False
        problem = _problem_with(place, identity)
        if problem is None:
            return True
        warnings.warn(
            f"the finished stage {place} cannot be used: {problem}; it and later ones are "
            "computed again",
            stacklevel=2,
        )
        self._remove_from(place.name)
        return False

    def read(self, number: tuple[int, int], before: Program) -> FinishedStage:
        """Reads a stage that `holds` found.

        Args:
            number: Of the run of passes, and of the stage in it.
            before: The stage as it was before the passes.

        Raises:
            ArtifactError: It does not fit this program.
        """
        return _read(self._place(number), before)

    def write(
        self,
        number: tuple[int, int],
        identity: str,
        before: Program,
        after: Program,
        steps: Sequence[Mapping[str, Any]],
    ) -> FinishedStage | None:
        """Writes a finished stage and reads it back: what goes on is what a later run would find.

        Returns:
            The stage; None where something in it has no form in files, so that nothing was written.

        Raises:
            ArtifactError: The disk is full, or may not be written to.
        """
        encoder = Encoder(_known(before))
        try:
            record = _encode(encoder, before, after)
            weights = {name: storable(source.load()) for name, source in encoder.sources.items()}
        except NotStorableError:
            return None
        record |= {"identity": identity, "steps": [dict(step) for step in steps]}
        place = self._place(number)
        partial = self.folder / f".{place.name}.partial"
        try:
            self._remove_from(place.name)  # What is behind it came out of one that is no more.
            partial.mkdir()
            _write(partial, record, encoder.tensors, weights)
            partial.replace(place)
            sync(self.folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the disk answers.
            shutil.rmtree(partial, ignore_errors=True)
            raise ArtifactError(
                f"a finished stage cannot be written: {error}",
                where=str(place),
                next_step="free disk space or permissions there and run the same command: it goes "
                "on behind the last stage that was written",
            ) from error
        return _read(place, before)

    def _place(self, number: tuple[int, int]) -> Path:
        return self.folder / f"{number[0]:03d}-{number[1]:05d}"

    def _remove_from(self, name: str) -> None:
        found = [path for path in self.folder.iterdir() if _FINISHED.fullmatch(path.name)]
        later = [path for path in found if path.name >= name]
        for path in sorted(later, reverse=True):  # Killed in between, no gap is left.
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise ArtifactError(
                    f"an old stage cannot be removed: {error}",
                    where=str(path),
                    next_step="remove the folder above it, and run again",
                ) from error


def _known(before: Program) -> dict[str, object]:
    """What a reader has: the weights and facts that the stage began with, by name."""
    weights = {f"weight {name}": before.weights.source(name) for name in before.weights}
    return {**weights, **{f"fact {kind.__name__}": fact for kind, fact in before.facts.items()}}


def _encode(encoder: Encoder, before: Program, after: Program) -> dict[str, Any]:
    sources = {n: after.weights.source(n) for n in after.weights.changed_since(before.weights)}
    removed = [name for name in before.weights if name not in after.weights]
    odd = [
        k for k, fact in after.facts.items() if k not in FACTS and before.facts.get(k) is not fact
    ]
    if removed or odd:
        raise NotStorableError(f"weights removed: {removed}, facts of other classes: {odd}")
    graph = encode_graph(before, after)
    if not same_graph(decode_graph(before, graph, sources), after):
        raise NotStorableError("the graph does not come back as it was")
    weights = {name: encoder.encode(source) for name, source in sources.items()}
    facts = {kind.__name__: encoder.encode(fact) for kind, fact in after.facts.items()}
    stored = {
        n: [encoder.encode(s.shape), encoder.encode(s.dtype)] for n, s in encoder.sources.items()
    }
    return {
        "graph": graph,
        "level": after.level,
        "is_first_lossy": after.dense is not None and before.dense is None,
        "weights": weights,
        "facts": facts,
        "objects": encoder.objects,
        "sources": stored,
    }


def _write(
    folder: Path,
    record: dict[str, Any],
    facts: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
) -> None:
    save_file(facts, folder / _FACTS)
    save_file(weights, folder / _WEIGHTS)
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    names = (_FACTS, _WEIGHTS, _RECORD)
    sums = "".join(f"{_digest(folder / name)}  {name}\n" for name in names)
    (folder / _SUMS).write_text(sums, encoding="utf-8")
    for name in (*names, _SUMS):
        sync(folder / name)
    sync(folder)


def _read(folder: Path, before: Program) -> FinishedStage:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return _decode(record, folder, before)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"a finished stage cannot be read: {error!r}",
            where=str(folder),
            next_step="remove it, and run again",
        ) from error


def _decode(record: Mapping[str, Any], folder: Path, before: Program) -> FinishedStage:
    plain = Decoder([], {}, {}, {})
    sources: dict[str, Source] = {
        name: OnDisk(folder / _WEIGHTS, name, *map(plain.decode, described))
        for name, described in record["sources"].items()
    }
    decoder = Decoder(record["objects"], _load(folder / _FACTS), sources, _known(before))
    weights = {name: decoder.decode(value) for name, value in record["weights"].items()}
    kinds: dict[str, type[Fact]] = {kind.__name__: kind for kind in before.facts}
    kinds.update({kind.__name__: kind for kind in FACTS})
    facts = {kinds[name]: decoder.decode(value) for name, value in record["facts"].items()}
    program = decode_graph(before, record["graph"], weights)
    dense = program.dense
    if record["is_first_lossy"]:
        dense = dataclasses.replace(
            before, facts={}, calibration=(), dense_outputs=(), dense_inputs=()
        )
    program = dataclasses.replace(program, facts=facts, level=record["level"], dense=dense)
    return FinishedStage(program, record["steps"])


def _load(path: Path) -> dict[str, torch.Tensor]:
    # Read, not mapped: what happens to the file later must not happen to the facts.
    with safe_open(path, framework="pt", backend="pread") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping.


def _problem_with(folder: Path, identity: str) -> str | None:
    """Why a stage cannot be used; None: it can."""
    try:
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in (_FACTS, _WEIGHTS, _RECORD):
            if sums.get(name) != _digest(folder / name):
                return f"{name} is not what was written"
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    if record["identity"] == identity:
        return None
    return "it was made from something else (recipe, model, calibration, version or threads)"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
