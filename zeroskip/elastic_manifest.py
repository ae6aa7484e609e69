"""elastic.json: what an elastic artefact holds, how it was made, and what its sparsities are worth.

Whoever wrote a manifest is not trusted: values are checked one by one, names of files stay within
the folder, and digests say whether anything was changed since. A digest is no signature: it finds
damage and careless edits, not somebody who computes it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from zeroskip.ir.elastic import HIERARCHIES
from zeroskip.ir.errors import ArtifactError
from zeroskip.manifest_files import FileEntry, digest_of, is_inside, read_object, write_object

MANIFEST_FILE = "elastic.json"
TENSORS_FILE = "elastic.safetensors"
CHECKPOINT = "checkpoint"
FORMAT = "zeroskip-elastic"
VERSION = 1
_AGAIN = "make the artefact again with `zeroskip compile`, or copy it again from where it was made"


@dataclass(frozen=True)
class CurvePoint:
    """What is known of one sparsity.

    Args:
        sparsity: Share of weights that are pruned in each elastic linear.
        bytes: Of all weights, pruned linears as bitmask and kept values in their own dtype.
        perplexity: On the text that `Manifest.measured` names; None where it was not measured.
        latency: Milliseconds, under the conditions in `Manifest.measured`; None likewise.
    """

    sparsity: float
    bytes: int
    perplexity: float | None = None
    latency: float | None = None


@dataclass(frozen=True)
class LinearEntry:
    """What the manifest says of a linear: [out, in], and whether the lowest group adapts it."""

    shape: tuple[int, int]
    serves_lowest: bool


@dataclass(frozen=True)
class Manifest:
    """The content of elastic.json.

    Args:
        zeroskip: Version of the package that wrote it.
        groups: Upper edges of the groups of sparsities.
        family: `rows`, or M of n:M patterns.
        hierarchy: Which adapters a group uses.
        rank: Of the adapters.
        linears: By name.
        made_by: The passes that ran, in order: `{"pass": name, "options": {...}}`.
        curve: Rising in sparsity.
        measured: How perplexity and latency were measured, by these names.
        files: By path below the folder, with slashes.
    """

    zeroskip: str
    groups: tuple[float, ...]
    family: str
    hierarchy: str
    rank: int
    linears: Mapping[str, LinearEntry]
    made_by: Sequence[Mapping[str, Any]]
    curve: tuple[CurvePoint, ...]
    measured: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    @property
    def group_of_weights(self) -> int:
        """M of an n:M family; 0 for rows."""
        return 0 if self.family == "rows" else int(self.family)

    def with_curve(self, curve: Sequence[CurvePoint], measured: Mapping[str, Any]) -> Manifest:
        """Returns the manifest with another curve."""
        return replace(self, curve=tuple(curve), measured=dict(measured))


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes elastic.json beside the old one, then puts it in its place.

    Raises:
        ArtifactError: It cannot be written; the old one is as it was.
    """
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    content["sha256"] = digest_of(content)
    write_object(content, directory / MANIFEST_FILE)


def read_manifest(directory: Path) -> Manifest:
    """Reads elastic.json; the files that it names are not looked at.

    Raises:
        ArtifactError: It is missing, of another version, malformed, or was changed.
    """
    path = directory / MANIFEST_FILE
    content = _read(path)
    if content.get("format") != FORMAT:
        refuse(path, f"this is no elastic artefact: its format is {content.get('format')!r}")
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise ArtifactError(
            f"the artefact has another version: {content.get('version')!r}, and this is {VERSION}",
            where=str(path),
            next_step="use the version of zeroskip that wrote it, or make the artefact again",
        )
    try:
        manifest = _parse(content)
    except _MalformedError as error:
        refuse(path, f"{MANIFEST_FILE} is malformed: {error}")
    given = content.pop("sha256", None)
    if given != digest_of(content):
        refuse(path, f"{MANIFEST_FILE} was tampered with: its digest is another")
    return manifest


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(
            f"{MANIFEST_FILE} is missing: this is no elastic artefact",
            where=str(path),
            next_step="pass the folder that `zeroskip compile` wrote for a recipe that ends in train-elastic",
        )
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        refuse(path, f"{MANIFEST_FILE} is truncated or no JSON: {error}")


def refuse(path: Path, problem: str) -> NoReturn:
    """Raises an ArtifactError about a file of an artefact."""
    raise ArtifactError(problem, where=str(path), next_step=_AGAIN)


class _MalformedError(ValueError):
    """A value of the manifest is of another kind than it must be."""


def _parse(content: Mapping[str, Any]) -> Manifest:
    groups = tuple(_number(edge, "groups") for edge in _list(content, "groups"))
    edges = (0.0, *groups)
    rises = all(low < high for low, high in zip(edges, groups, strict=False))
    _need(bool(groups) and rises and groups[-1] < 1, f"groups {groups} do not rise within (0, 1)")
    family, hierarchy = _text(content, "family"), _text(content, "hierarchy")
    _need(family in ("rows", "2", "4", "8", "16", "32"), f"family {family!r}")
    _need(hierarchy in HIERARCHIES, f"hierarchy {hierarchy!r}")
    made_by = _list(content, "made_by")
    _need(all(isinstance(step, dict) for step in made_by), "made_by holds what is no object")
    curve = tuple(_point(point, groups[-1]) for point in _list(content, "curve"))
    rising = [point.sparsity for point in curve]
    _need(rising == sorted(set(rising)), "the curve does not rise in sparsity")
    return Manifest(
        zeroskip=_text(content, "zeroskip"),
        groups=groups,
        family=family,
        hierarchy=hierarchy,
        rank=_count(content.get("rank"), "rank", least=1),
        linears=_each(content, "linears", lambda name, value: _linear(name, value)),
        made_by=made_by,
        curve=curve,
        measured=_each(content, "measured", lambda _, value: value),
        files=_files(content),
    )


def _files(content: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = _each(content, "files", _file)
    for name in files:
        known = name == TENSORS_FILE or name.startswith(f"{CHECKPOINT}/")
        _need(known and is_inside(name), f"the file name {name!r} leads elsewhere")
    _need(TENSORS_FILE in files, f"files lack {TENSORS_FILE}")
    _need(f"{CHECKPOINT}/config.json" in files, f"files lack {CHECKPOINT}/config.json")
    return files


def _file(name: str, value: Any) -> FileEntry:
    _need(isinstance(value, dict), f"file {name!r}")
    digest = value.get("sha256")
    known = isinstance(digest, str) and len(digest) == 64
    _need(known, f"sha256 of {name!r}")
    return FileEntry(_count(value.get("bytes"), f"bytes of {name!r}"), digest)


def _linear(name: str, value: Any) -> LinearEntry:
    _need(isinstance(value, dict), f"linear {name!r}")
    shape, serves = value.get("shape"), value.get("serves_lowest")
    _need(isinstance(shape, list) and len(shape) == 2, f"shape of {name!r}")
    _need(isinstance(serves, bool), f"serves_lowest of {name!r}")
    out, width = (_count(size, f"shape of {name!r}", least=1) for size in shape)
    return LinearEntry((out, width), serves)


def _point(value: Any, last: float) -> CurvePoint:
    _need(isinstance(value, dict), "a point of the curve is no object")
    sparsity = _number(value.get("sparsity"), "sparsity of a point")
    _need(0 <= sparsity <= last, f"the curve has sparsity {sparsity}")
    found = {
        name: None if value.get(name) is None else _number(value[name], f"{name} of a point")
        for name in ("perplexity", "latency")
    }
    _need(all(x is None or x > 0 for x in found.values()), "a point below 0")
    return CurvePoint(sparsity, _count(value.get("bytes"), "bytes of a point"), **found)


def _each(content: Mapping[str, Any], key: str, read: Callable[[str, Any], Any]) -> dict[str, Any]:
    _need(isinstance(content.get(key), dict), f"{key} is no object")
    return {name: read(name, value) for name, value in content[key].items()}


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    _need(isinstance(found, list), f"{key} is no list")
    return found  # type: ignore[return-value]


def _text(content: Mapping[str, Any], key: str) -> str:
    found = content.get(key)
    _need(isinstance(found, str), f"{key} is no text")
    return str(found)


def _number(value: Any, what: str) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    _need(fits and abs(value) < 1e300 and math.isfinite(value), f"{what} is {value!r}")
    return float(value)


def _count(value: Any, what: str, least: int = 0) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62
    _need(fits, f"{what} is {value!r}")
    return int(value)


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise _MalformedError(problem)
