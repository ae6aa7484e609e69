"""What pyproject.toml cannot say: the CPU kernels, one C++ library without Python in it.

The library is optional. Without a C++ compiler, or with ZEROSKIP_BUILD=0, the install succeeds
without it, and zeroskip builds it at first use when a compiler is there by then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("runtime", "kernels")
PACKAGE = Path("zeroskip", "runtime", "kernels")


def load_build() -> ModuleType:
    """Loads runtime/kernels/build.py by its path: zeroskip cannot be imported yet."""
    path = Path(__file__).resolve().parent / KERNELS / "build.py"
    spec = importlib.util.spec_from_file_location("zeroskip_kernels_build", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildKernels(build_ext):
    """Compiles the library into the built package; for an editable install, next to its sources."""

    library: Path | None = None  # where it lies after run(), unless it could not be built

    def run(self) -> None:
        folder = KERNELS if self._in_place() else Path(self.build_lib) / PACKAGE
        output = folder.absolute() / build.LIBRARY
        problem = self._build(output)
        if problem:
            for left in (output, output.with_suffix(".json")):
                left.unlink(missing_ok=True)
            self.warn(
                f"zeroskip is installed without its CPU kernels: {problem}. "
                "Models run without them, slower; `zeroskip doctor` says what to do."
            )
        else:
            self.library = output

    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _build(self, output: Path) -> str | None:
        """Returns why there is no library, or None."""
        if os.environ.get("ZEROSKIP_BUILD") == "0":
            return "ZEROSKIP_BUILD=0 forbids building them"
        compiler = build.compilers.find_compiler()
        if compiler is None:
            return "there is no C++ compiler"
        if output.is_file() and build.read_record(output).get("key") == build.build_key(compiler):
            return None
        try:
            record = build.compile_library(output, compiler)
        except (OSError, build.compilers.BuildError) as error:
            return f"they cannot be compiled: {error}"
        for name in record["left_out"]:
            self.warn(f"{record['compiler']} does not know {name}: its kernels are left out")
        return None

    def get_source_files(self) -> list[str]:
        """What a source distribution needs for the library."""
        return [str(path) for path in sorted((KERNELS / "cpu").iterdir()) if path.is_file()]

    def get_outputs(self) -> list[str]:
        if self.library is None or self._in_place():
            return []
        return [str(self.library), str(self.library.with_suffix(".json"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel for every Python 3: for this platform with the library, else for any."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.get_finalized_command("build_ext").library is None:
            self.root_is_pure = True
            return "py3", "none", "any"
        tag = super().get_tag()[2]
        machines = build.compilers.architectures()
        if sys.platform == "darwin" and len(machines) == 1:
            tag = tag.replace("universal2", machines[0])
        return "py3", "none", tag


class WithLibrary(Distribution):
    """What setuptools must be told of a package that has a library and no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(distclass=WithLibrary, cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
