"""The folder beside OUT in which a compilation works: one run at a time, and the next one goes on.

.OUT.work/
lock       held by the run at work; gone with its process, however that ends
stages/    what is finished (see `zeroskip.ir.stage_files`)
out/       OUT while it is not complete
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.folders import check_target
from zeroskip.manifest import MANIFEST_FILE, ManifestError, read_manifest

STAGES = "stages"
PARTIAL = "out"
_ATTEMPTS = 100
"""Times that a folder may vanish between being made and being used."""


def is_complete(out: Path) -> bool:
    """Whether there is an artefact, of whatever it may be."""
    return (out / MANIFEST_FILE).is_file()


def is_up_to_date(out: Path, key: Mapping[str, Any]) -> bool:
    """Whether a folder holds what a compilation with this key would write.

    Args:
        out: It need not be there.
        key: What is computed from what; see `zeroskip.compile_key`.

    Raises:
        ArtifactError: It holds something else; names what differs.
    """
    if not is_complete(out):
        return False
    try:
        manifest = read_manifest(out)
    except ManifestError as error:
        raise ArtifactError(
            f"the target already holds something: {error.problem}",
            where=str(out),
            next_step="remove it, or choose another folder; nothing is overwritten",
        ) from error
    if differing := sorted(k for k in {*key, *manifest.key} if key.get(k) != manifest.key.get(k)):
        raise ArtifactError(
            f"the target was compiled from something else: another {', '.join(differing)}",
            where=str(out),
            next_step="remove it, or choose another folder; nothing is overwritten",
        )
    for name, entry in manifest.files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise ArtifactError(
                f"the target is not what was compiled: {name} is missing or of another size",
                where=str(out),
                next_step=f"see `zeroskip verify {out}`; remove it to compile again",
            )
    return True


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Locks the work folder of `out`, and yields it; removes it when the block is done.

    It stays when the block raises and stages were finished: the next run begins with them.

    Raises:
        ArtifactError: Another process works there, or it cannot be written.
    """
    check_target(out)
    with _locked(out) as place:
        yield place


def remove_leftovers(out: Path) -> None:
    """Removes the work folder of a run that was stopped when all but this was done."""
    if place_of(out).exists():
        with contextlib.suppress(ArtifactError), _locked(out):
            pass


def place_of(out: Path) -> Path:
    """Returns where the work folder of an artefact is."""
    # The folder itself, whatever links lead to it: one name for one lock.
    return Path(os.path.realpath(out.absolute().parent)) / f".{out.absolute().name}.work"


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[Path]:
    place = place_of(out)
    lock = _lock(place, out)
    try:
        yield place
    except BaseException:
        shutil.rmtree(place / PARTIAL, ignore_errors=True)
        if not any((place / STAGES).glob("*")):
            shutil.rmtree(place, ignore_errors=True)
        raise
    else:
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(place: Path, out: Path) -> int:
    """Returns the open file that holds the lock."""
    import fcntl  # Not on Windows, where nothing else of this module is missing.

    path = place / "lock"
    missing = 0
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError as error:
            # The run that held it has just finished and removed the folder, or no folder can be
            # made here at all (below /proc, say).
            missing += 1
            if missing < _ATTEMPTS:
                continue
            raise _unusable(place, error) from error
        except OSError as error:
            raise _unusable(place, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(lock, path):
                os.ftruncate(lock, 0)
                os.write(lock, json.dumps([os.getpid(), socket.gethostname()]).encode())
                return lock
        except OSError as error:
            holder = _holder(lock)
            os.close(lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ArtifactError(
                    f"another run is writing this folder: {holder}",
                    where=str(out),
                    next_step="wait until it ends, or choose another folder",
                ) from error
            with contextlib.suppress(OSError):  # Nothing else is in it, or it stays.
                path.unlink()
                place.rmdir()
            raise _unusable(place, error) from error
        os.close(lock)


def _unusable(place: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"the work folder cannot be used: {error}",
        where=str(place),
        next_step="free space or permissions there, or choose a folder on a file system that has locks",
    )


def _is_still_there(lock: int, path: Path) -> bool:
    """Whether the file that was locked is the one that others find."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(lock: int) -> str:
    try:
        process, host = json.loads(os.pread(lock, 4096, 0))
    except (OSError, ValueError):
        return "a process that has just begun"
    return f"process {process} on {host}"
