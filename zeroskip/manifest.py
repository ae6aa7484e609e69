"""manifest.json: what lies in an artefact, what it was made from, and what its linears are.

Digests find damage and careless edits. They are no signature: whoever changes a file on purpose can
compute them anew. Compare `content_sha256` with what the build printed, or sign the manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.linears import find_linears
from zeroskip.manifest_files import (
    describe_files,
    digest_of,
    is_inside,
    read_object,
    write_object,
)
from zeroskip.manifest_inputs import InputFile, Role

if TYPE_CHECKING:
    from zeroskip.ir.program import Program

MANIFEST_FILE = "manifest.json"
FORMAT = "zeroskip-artefact"
VERSION = 1
REPORTS = ("report.json", "report.html")
"""Files that hold times: two runs on the same inputs write other ones."""
_PACKAGES = ("zeroskip", "torch", "transformers", "safetensors", "onnx", "onnxruntime")
# What a measurement on this machine says differently each time.
_MEASURED = ("speedup", "noise", "reason")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class FileRecord(_Part):
    """The size and digest of a file of the artefact."""

    bytes: Count
    sha256: Digest


class InputRecord(FileRecord):
    """A file that was read; its name is as it was given, relative to the working directory."""

    role: Role
    name: str


class PassRecord(_Part):
    """One pass that ran; its options are in recipe.yaml."""

    name: str
    modified: bool
    parts: Count
    drift: float | None


class LinearRecord(_Part):
    """One linear.

    Args:
        parameter: The weight that holds it, by its name in the checkpoint.
        transposed: It is stored [in, out].
        expert: Index into a 3-D weight.
        shape: [out, in].
        pattern: Of its zeros, or `dense`.
        density: Share of its weights that are not zero, counted.
        note: Why it is dense, or how it is lowered.
        error: How far pruning moved its output, where that was known.
        change: How far its weights moved, where that was known.
        verdict: Whether the zeros pay, and on what; measured times are in `timings`.
    """

    parameter: str
    transposed: bool
    expert: Count | None
    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    pattern: str
    density: Share
    note: str
    error: float | None
    change: float | None
    verdict: dict[str, Any] | None


class Manifest(_Part):
    """The content of manifest.json.

    Args:
        versions: Of zeroskip, of what it computed with, and of Python.
        seed: Of the calibration windows.
        recipe: As given: a file or the name of a preset; recipe.yaml has every option.
        key: What the compilation was known by when it was resumed.
        inputs: Every file that was read.
        inputs_from: The working directory of the names in `inputs`, from the artefact; None where
            the artefact lies elsewhere.
        passes: In order.
        linears: By name, in order of first use.
        drift: Of the program's outputs on the example inputs.
        density: Of the linears that follow a pattern.
        gates: What was demanded, and what came out.
        files: By path below the folder, with slashes.
        changed_by: Commands that changed files since, such as `tune`.
        timings: All that is not the same in each run.
        content_sha256: Digest of all but `timings`, the reports and the digests themselves: the
            same for the same inputs, seed and versions.
        sha256: Digest of all but itself.
    """

    format: Literal["zeroskip-artefact"]
    version: Literal[1]
    versions: dict[str, str]
    seed: Count
    recipe: str
    key: dict[str, Any]
    inputs: list[InputRecord]
    inputs_from: str | None
    passes: list[PassRecord]
    linears: dict[str, LinearRecord]
    drift: float | None
    density: Share
    gates: dict[str, Any]
    files: dict[str, FileRecord]
    changed_by: list[str]
    timings: dict[str, Any]
    content_sha256: Digest
    sha256: Digest


class ManifestError(ArtifactError):
    """A manifest cannot be used; `kind` says in which way."""

    kind: Literal["missing", "truncated", "tampered", "stale"]

    def __init__(self, kind: Any, problem: str, path: Path, next_step: str) -> None:
        super().__init__(problem, where=str(path), next_step=next_step)
        self.kind = kind


def write_manifest(
    folder: Path,
    program: Program,
    report: Mapping[str, Any],
    *,
    inputs: Sequence[InputFile],
    inputs_from: str | None,
    recipe: str,
    seed: int,
    gates: Mapping[str, Any] | None = None,
    key: Mapping[str, Any] | None = None,
    timings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes manifest.json into a folder whose other files are complete; returns what it says.

    Args:
        folder: Everything in it is hashed.
        program: The compiled one.
        report: As `Report.to_json` returns it.
        inputs: See `read_inputs`.
        inputs_from: See `Manifest`.
        recipe: See `Manifest`.
        seed: See `Manifest`.
        gates: Plain values, without times.
        key: Plain values.
        timings: What else is not the same in each run, by names of its own.

    Raises:
        ArtifactError: It cannot be written.
    """
    linears, measured = _linears(program, report["linears"])
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "seed": seed,
        "recipe": recipe,
        "key": dict(key or {}),
        "inputs": [one._asdict() for one in inputs],
        "inputs_from": inputs_from,
        "passes": [
            {
                "name": step["name"],
                "modified": step["modified"],
                "parts": step["stages"],
                "drift": step["drift"],
            }
            for step in report["passes"]
        ],
        "linears": linears,
        "drift": report["drift"],
        "density": report["density"],
        "gates": dict(gates or {}),
        "files": _files(folder),
        "changed_by": [],
        "timings": {
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": report["seconds"],
            "passes": [step["seconds"] for step in report["passes"]],
            "linears": measured,
            **(timings or {}),
        },
    }
    return sign(_finite(content), folder)


def sign(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes plain values as manifest.json with both digests; returns them.

    Raises:
        ArtifactError: It cannot be written; an old one is as it was.
    """
    content["content_sha256"] = content_digest(content)
    content["sha256"] = own_digest(content)
    write_object(content, folder / MANIFEST_FILE)
    return content


def content_digest(content: Mapping[str, Any]) -> str:
    """Returns the digest of what is the same in every run on the same inputs."""
    kept = {k: v for k, v in content.items() if k not in ("timings", "content_sha256", "sha256")}
    kept["files"] = {name: entry for name, entry in kept["files"].items() if name not in REPORTS}
    return digest_of(kept)


def own_digest(content: Mapping[str, Any]) -> str:
    """Returns the digest of everything in a manifest but that digest."""
    return digest_of({key: value for key, value in content.items() if key != "sha256"})


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json; the files that it names are not looked at.

    Raises:
        ManifestError: It is missing, truncated, of another version, malformed, or was changed.
    """
    path = folder / MANIFEST_FILE
    content = _read(path)
    version = content.get("version")
    if content.get("format") != FORMAT:
        raise _tampered(path, f"this is no manifest: its format is {content.get('format')!r}")
    if version != VERSION or isinstance(version, bool):
        raise ManifestError(
            "stale",
            f"the artefact has version {version!r} of the format, and this is {VERSION}",
            path,
            "use the version of zeroskip that wrote it, or compile again",
        )
    try:
        manifest = Manifest.model_validate(content)
    except (ValidationError, RecursionError) as error:
        raise _tampered(path, f"{MANIFEST_FILE} is malformed: {_first(error)}") from error
    for name in manifest.files:
        if not is_inside(name) or name == MANIFEST_FILE:
            raise _tampered(path, f"the file name {name!r} leads elsewhere")
    if (manifest.sha256, manifest.content_sha256) != (own_digest(content), content_digest(content)):
        raise _tampered(path, f"{MANIFEST_FILE} was changed: its digest is another")
    return manifest


def versions() -> dict[str, str]:
    """Returns the versions of everything that can make a difference to the bytes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ManifestError(
            "missing",
            f"there is no {MANIFEST_FILE} here",
            path,
            "pass the folder that `zeroskip compile` wrote",
        )
    try:
        return read_object(path)
    except UnicodeDecodeError as error:
        raise _tampered(path, f"{MANIFEST_FILE} is no UTF-8: {error}") from error
    except ValueError as error:
        # Every manifest ends in this; one that was cut short does not.
        if not path.read_bytes().endswith(b"}\n"):
            raise ManifestError(
                "truncated", f"{MANIFEST_FILE} is cut short: {error}", path, AGAIN
            ) from error
        raise _tampered(path, f"{MANIFEST_FILE} is no JSON: {error}") from error
    except OSError as error:
        raise ManifestError("missing", f"{MANIFEST_FILE}: {error}", path, AGAIN) from error


AGAIN = "copy it again from where it was made, or compile again; do not use it as it is"


def _tampered(path: Path, problem: str) -> ManifestError:
    return ManifestError("tampered", problem, path, AGAIN)


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}"


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    found = describe_files(folder, besides=MANIFEST_FILE)
    return {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in found.items()}


def _linears(
    program: Program, reported: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The records of linears, and what was measured of them."""
    places = {linear.name: linear for linear in find_linears(program)}
    records, measured = {}, {}
    for found in reported:
        name, verdict, note = found["name"], found["verdict"], found["note"]
        if verdict is not None and verdict["source"] == "measured":
            measured[name] = {key: verdict[key] for key in _MEASURED}
            verdict = {key: value for key, value in verdict.items() if key not in _MEASURED}
            note = verdict["choice"]
        records[name] = {
            "parameter": places[name].parameter,
            "transposed": places[name].transposed,
            "expert": places[name].expert,
            "shape": list(found["shape"]),
            "pattern": found["pattern"],
            "density": found["density"],
            "note": note,
            "error": found.get("error"),
            "change": found.get("change"),
            "verdict": verdict,
        }
    return records, measured


def _finite(value: Any) -> Any:
    """Plain values as JSON can hold them: what is no number is None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
