"""Where the kernel library is: given by the user, installed, or built here at its first use.

| variable | what it does |
|---|---|
| ZEROSKIP_LIBRARY | this file is used, whatever else there is |
| ZEROSKIP_BUILD=0 | nothing is compiled, neither at install nor later |
| ZEROSKIP_CACHE | the folder for libraries that are built at first use |
| CXX, CXXFLAGS, LDFLAGS | as in every build |
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from zeroskip.ir.errors import KernelLibraryError
from zeroskip.runtime.kernels import build, compilers

COMPILER_ADVICE = {
    "linux": "install one (Debian and Ubuntu: `apt-get install g++`; Fedora: `dnf install gcc-c++`)",
    "darwin": "install one with `xcode-select --install`",
    "win32": "install the Build Tools for Visual Studio, with `Desktop development with C++`",
}
_LOG = logging.getLogger("zeroskip")


def library_path() -> Path:
    """Returns the shared library of CPU kernels; builds it when there is none yet.

    The first of these is taken: the file that ZEROSKIP_LIBRARY names; the library that pip built,
    if it is of the same sources; one in the cache; a new one, put into the cache. A build that
    fails is not tried again by the same process.

    Raises:
        KernelLibraryError: There is none and none can be built; says why and what to do.
    """
    if given := os.environ.get("ZEROSKIP_LIBRARY"):
        if not Path(given).is_file():
            raise KernelLibraryError(
                "ZEROSKIP_LIBRARY names a kernel library that is not there",
                where=given,
                next_step="correct the variable or remove it",
            )
        return Path(given).absolute()
    installed = installed_library()
    if installed and is_current(installed):
        return installed
    compiler = compilers.find_compiler()
    if compiler is None:
        if built := _built_before():
            return built
        raise KernelLibraryError(
            f"{_missing(installed)}, and there is no C++ compiler to build it with",
            where=os.environ.get("CXX"),
            next_step=f"{compiler_advice()}; it is then built at its first use",
        )
    target = cache_folder() / build.build_key(compiler) / build.LIBRARY
    if target.is_file():
        return target
    if not building_allowed():
        if built := _built_before():
            return built
        raise KernelLibraryError(
            f"{_missing(installed)}, and ZEROSKIP_BUILD=0 forbids building it",
            next_step="remove the variable, or install zeroskip again without it",
        )
    outcome = _build_once(target, compiler)
    if isinstance(outcome, str):
        raise KernelLibraryError(
            f"{_missing(installed)}, and it cannot be built: {outcome}",
            where=str(target.parent),
            next_step="run `zeroskip doctor`; CXX names another compiler, ZEROSKIP_CACHE "
            "another folder",
        )
    return outcome


@cache
def try_library_path() -> Path | None:
    """Returns the library, or None after one warning in the log that says why there is none."""
    try:
        return library_path()
    except KernelLibraryError as error:
        _LOG.warning("zeroskip runs without its CPU kernels, slower: %s", error)
        return None


def installed_library() -> Path | None:
    """Returns the library that pip put beside this file, be it of these sources or of others."""
    path = Path(build.__file__).parent / build.LIBRARY
    return path if path.is_file() else None


def is_current(library: Path) -> bool:
    """Returns whether a library was built from the sources that are installed."""
    return build.read_record(library).get("sources") == build.source_hash()


def building_allowed() -> bool:
    """Returns whether this process may compile."""
    return os.environ.get("ZEROSKIP_BUILD") != "0"


def cache_folder() -> Path:
    """Returns where libraries that are built at first use are kept. It may be deleted any time."""
    if given := os.environ.get("ZEROSKIP_CACHE"):
        return Path(given).absolute() / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "zeroskip" / "kernels"


def compiler_advice() -> str:
    """Returns how to get a C++ compiler on this system, or that CXX names none."""
    if os.environ.get("CXX"):
        return "CXX names no compiler that runs: correct it or remove it"
    return COMPILER_ADVICE.get(sys.platform, "install g++ or clang++")


def _missing(installed: Path | None) -> str:
    if installed:
        return "the installed kernel library is of other sources than those here"
    return "there is no kernel library"


def _built_before() -> Path | None:
    """The newest library in the cache of these sources and this platform, by any compiler."""
    found = []
    for path in cache_folder().glob(f"*/{build.LIBRARY}"):
        if (
            is_current(path)
            and build.read_record(path).get("platform") == compilers.this_platform()
        ):
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@cache  # A failure too: it is not tried again in this process.
def _build_once(target: Path, compiler: compilers.Compiler) -> Path | str:
    """Builds a library unless another process does; returns it, or why there is none."""
    folder = target.parent
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder.parent / f"{folder.name}.lock"):
            if not target.is_file():
                _LOG.warning(
                    "zeroskip compiles its CPU kernels, once, about a minute, into %s", folder
                )
                with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
                    made = Path(scratch) / "made"
                    build.compile_library(made / build.LIBRARY, compiler)
                    made.rename(folder)
    except (OSError, compilers.BuildError) as error:
        return str(error)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock that a file stands for, among processes; waits for it."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt
            import time

            while True:
                try:
                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.2)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            # On a file system without locks two processes may build the same library: no harm.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
