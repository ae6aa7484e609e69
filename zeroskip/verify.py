"""verify: whether an artefact is still what `zeroskip compile` wrote, file by file.

Everything is judged by digests in manifest.json. A digest is no signature: who changes a file on
purpose can compute all digests anew. Then only what the weights themselves say is left, and that
they are zero in the right places does not make them the weights that were compiled. Where that
matters, compare `content_sha256` with what was noted at the build, or sign manifest.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zeroskip.ir.errors import CompileError
from zeroskip.manifest import AGAIN, MANIFEST_FILE, Manifest, ManifestError, read_manifest
from zeroskip.manifest_files import FileEntry, describe_file, files_of, is_linked

Kind = Literal["tampered", "truncated", "missing", "extra", "stale", "wrong"]

RECIPE_FILE = "recipe.yaml"
CHECKPOINT = "checkpoint"
_NEXT: dict[Kind, str] = {
    "tampered": AGAIN,
    "truncated": "copy it again, the copy was cut short; or compile again",
    "missing": "copy it again from where it was made, or compile again",
    "extra": "remove it, or keep it elsewhere; nobody knows what it does here",
    "stale": "the artefact is what it was; compile again to take the change in",
    "wrong": "do not use it: compile again, and report it if it comes out the same",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not what it was.

    Args:
        file: Its name below the artefact; of an input, as the manifest names it.
        kind: `tampered` (another content), `truncated` (shorter, or its end cannot be read),
            `missing`, `extra` (nobody recorded it), `stale` (an input is another by now, or the
            artefact has another version of the format), or `wrong` (digests hold, and what is in
            it contradicts the manifest, or the checkpoint).
        problem: What is the matter, in one sentence.
        next_step: What to do about it.
    """

    file: str
    kind: Kind
    problem: str
    next_step: str


@dataclass
class Verification:
    """What was looked at, and what was found.

    Args:
        findings: Empty where the artefact is what it was.
        checked: How many there were of each thing that was looked at.
        skipped: What was not looked at, and why.
        content_sha256: Of the manifest; empty where it cannot be read.
    """

    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    content_sha256: str = ""

    def add(self, file: str, kind: Kind, problem: str, next_step: str = "") -> None:
        """Adds a finding."""
        self.findings.append(Finding(file, kind, problem, next_step or _NEXT[kind]))

    def count(self, thing: str, number: int = 1) -> None:
        """Says that something was looked at."""
        self.checked[thing] = self.checked.get(thing, 0) + number

    def damaged(self, folder: str) -> bool:
        """Whether a file below a folder is not what it was; another one beside it harms nothing."""
        inside = (found for found in self.findings if found.file.startswith(f"{folder}/"))
        return any(found.kind != "extra" for found in inside)


def verify_artefact(directory: Path, *, run: bool = True) -> Verification:
    """Looks at every file of an artefact, then at what is in them.

    Args:
        directory: What `zeroskip compile` wrote.
        run: Whether to run the checkpoint and the ONNX model and compare what they compute.

    Raises:
        ManifestError: There is no manifest, so nothing can be said.
    """
    found = Verification()
    try:
        manifest = read_manifest(directory)
    except ManifestError as error:
        if error.kind == "missing":
            raise
        found.add(MANIFEST_FILE, error.kind, error.problem, error.next_step or "")
        found.skipped.append(f"all other files: {MANIFEST_FILE} says nothing that counts")
        return found
    found.content_sha256 = manifest.content_sha256
    check_files(manifest, directory, found)
    check_inputs(manifest, directory, found)
    _check_recipe(directory, found)
    if found.damaged(CHECKPOINT):
        found.skipped.append("weights: the checkpoint is damaged")
    else:
        # torch and transformers are loaded for whole files only.
        from zeroskip.verify_weights import check_weights

        check_weights(manifest, directory, found, run=run)
    return found


def check_files(manifest: Manifest, directory: Path, found: Verification) -> None:
    """Compares every file with its record, and finds those without one."""
    for name, record in manifest.files.items():
        found.count("files")
        path, expected = directory / name, FileEntry(record.bytes, record.sha256)
        if is_linked(directory, name):
            found.add(name, "tampered", "it is a link, and an artefact holds its files itself")
        elif not path.is_file():
            found.add(name, "missing", "it is not there")
        else:
            _check_file(name, path, expected, found)
    for path in files_of(directory):
        name = path.relative_to(directory).as_posix()
        if name != MANIFEST_FILE and name not in manifest.files:
            found.add(name, "extra", f"{MANIFEST_FILE} does not know it")


def check_inputs(manifest: Manifest, directory: Path, found: Verification) -> None:
    """Compares the files that the artefact was made from, as far as they are still there."""
    absent = 0
    for record in manifest.inputs:
        path = place_of(record.name, manifest, directory)
        try:
            if not path.is_file():
                absent += 1
                continue
            found.count("inputs")
            changed = describe_file(path) != FileEntry(record.bytes, record.sha256)
        except (OSError, ValueError):  # A name with a NUL in it is a ValueError.
            absent += 1
            continue
        if changed:
            found.add(record.name, "stale", f"the {record.role} changed since: {path}")
    if absent:
        found.skipped.append(f"{absent} inputs: they are not where they were")


def place_of(name: str, manifest: Manifest, directory: Path) -> Path:
    """Returns where an input was: from the artefact, where that lay below the working directory."""
    if manifest.inputs_from is None:
        return Path(name)
    return directory.resolve() / manifest.inputs_from / name


def _check_file(name: str, path: Path, expected: FileEntry, found: Verification) -> None:
    try:
        size = path.stat().st_size
        if size < expected.bytes:
            found.add(name, "truncated", f"{size} of {expected.bytes} bytes are there")
        elif size > expected.bytes:
            more = size - expected.bytes
            found.add(name, "tampered", f"there are {more} bytes more than {MANIFEST_FILE} says")
        elif describe_file(path) != expected:
            found.add(name, "tampered", f"its content is not what {MANIFEST_FILE} says")
    except PermissionError as error:
        found.add(name, "missing", f"it may not be read: {error}", "ask for the right to read it")
    except OSError as error:
        found.add(name, "truncated", f"its end cannot be read: {error}")


def _check_recipe(directory: Path, found: Verification) -> None:
    if any(one.file == RECIPE_FILE for one in found.findings):
        return
    from zeroskip.recipe import load_recipe

    checked(lambda: load_recipe(directory / RECIPE_FILE), RECIPE_FILE, found)
    found.count("recipe")


def checked(check: Callable[[], object], file: str, found: Verification) -> bool:
    """Runs a check that raises a CompileError where something is wrong; returns whether it held."""
    try:
        check()
    except CompileError as error:
        where = f" ({error.where})" if error.where else ""
        found.add(file, "wrong", f"{error.problem}{where}")
        return False
    return True
