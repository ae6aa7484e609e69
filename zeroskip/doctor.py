"""`zeroskip doctor`: whether the fast kernels can be used on this machine, and what is missing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from zeroskip.doctor_gpu import GpuFinding, describe_gpu, examine_gpus
from zeroskip.ir.errors import KernelLibraryError, LoweringError
from zeroskip.runtime.kernels import build, compilers, location
from zeroskip.runtime.machine import cpu_name

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

    from rich.table import Table

PACKAGES = ("zeroskip", "torch", "transformers", "safetensors", "onnx", "onnxruntime", "triton")
VARIABLES = ("ZEROSKIP_LIBRARY", "ZEROSKIP_BUILD", "ZEROSKIP_CACHE", "CXX", "CXXFLAGS", "LDFLAGS")
ROWS_OF_X = (1, 4, 16, 128)
SIZE = 256  # rows and columns of the weight that the kernels are tried on


@dataclass
class Examination:
    """What `zeroskip doctor` found.

    Attributes:
        versions: Of Python and of the packages that matter.
        processor: The name of the CPU.
        instruction_sets: Those that the kernels can use here, best first.
        variables: The environment variables that were set and matter.
        library: The kernel library, if there is one.
        build: Compiler, instruction sets built and left out.
        kernels: Type of the values to rows of x to the kernel that serves them.
        worst_error: Of those kernels, relative to a product in float64.
        onnxruntime: Whether ONNX Runtime registers the library.
        compiler: The C++ compiler that would be used now.
        cache: Where libraries go that are built at first use.
        gpus: Those that PyTorch sees, and what would run a 2:4 linear on each.
        problem: Why the kernels cannot be used; None when they can.
        next_step: What to do about it.
    """

    versions: dict[str, str]
    processor: str
    variables: dict[str, str]
    compiler: str | None
    cache: str
    instruction_sets: list[str] = field(default_factory=list)
    library: str | None = None
    build: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[int, str]] = field(default_factory=dict)
    worst_error: float | None = None
    onnxruntime: bool = False
    gpus: list[GpuFinding] = field(default_factory=list)
    problem: str | None = None
    next_step: str | None = None


def examine() -> Examination:
    """Looks at this machine; builds the library if there is none and it can be built."""
    compiler = compilers.find_compiler()
    found = Examination(
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        processor=cpu_name(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        compiler=compiler.version if compiler else None,
        cache=str(location.cache_folder()),
    )
    found.gpus = examine_gpus()
    try:
        path = location.library_path()
        found.library = str(path)
        found.build = build.read_record(path)
        _try_kernels(found, path)
        _try_onnxruntime(found, path)
        _judge_kernels(found)
    except LoweringError as error:
        found.problem, found.next_step = error.problem, error.next_step
    return found


def findings_table(found: Examination) -> Table:
    """Returns the findings as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))  # Text: brackets in a path are not markup

    row("versions", ", ".join(f"{name} {value}" for name, value in found.versions.items()))
    row("processor", found.processor)
    row("instruction sets", ", ".join(found.instruction_sets) or "unknown without the library")
    row("kernel library", found.library or "none")
    if found.build:
        left_out = ", ".join(found.build.get("left_out", ()))
        built = ", ".join(["portable", *found.build.get("groups", ())])
        unknown = f"; unknown to the compiler: {left_out}" if left_out else ""
        row("built", f"{built}{unknown}, by {found.build.get('compiler')}")
        sets = tuple(found.instruction_sets)
        idle = [name for name in found.build.get("groups", ()) if not name.startswith(sets)]
        if idle and sets:
            row("not used", f"{', '.join(idle)}: this processor or its system does not have them")
    for name, kernels in found.kernels.items():
        row(f"{name} kernels", ", ".join(f"{kernels[m]} (M={m})" for m in kernels))
    if found.worst_error is not None:
        row("tried", f"largest error {found.worst_error:.1e} relative to float64")
    row("ONNX Runtime", "takes the library" if found.onnxruntime else "does not have the library")
    for gpu in found.gpus:
        row("GPU", describe_gpu(gpu))
    if not found.gpus:
        row("GPU", "none that PyTorch sees")
    row("C++ compiler", found.compiler or f"none: {location.compiler_advice()}")
    row("cache", found.cache)
    for name, value in found.variables.items():
        row(name, value)
    return table


def _try_kernels(found: Examination, path: Path) -> None:
    """Runs a small product of every type of values, and compares it with float64."""
    import torch

    from zeroskip.ir.formats import pack_bitmask
    from zeroskip.runtime.kernels.library import VALUE_TYPES, CpuLinear, load_library

    library: ctypes.CDLL = load_library(path)
    found.instruction_sets = library.zs_instruction_sets().decode().split()
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(SIZE, SIZE, generator=random)
    keep = torch.rand(SIZE, SIZE, generator=random) < 0.5
    scales = dense.abs().amax(1, keepdim=True) / 127
    worst = 0.0
    for dtype in VALUE_TYPES:
        int8 = dtype is torch.int8
        weight = pack_bitmask(dense, keep, dtype=dtype, scales=scales if int8 else None)
        linear = CpuLinear(library, weight, accuracy_level=0)
        served = found.kernels.setdefault(str(dtype).removeprefix("torch."), {})
        for m in ROWS_OF_X:
            x = torch.randn(m, SIZE, generator=random)
            served[m] = linear.kernel(m) or "none"
            expected = x.double() @ weight.unpack().double().T
            error = (linear(x).double() - expected).norm() / expected.norm()
            worst = max(worst, float(error)) if torch.isfinite(error) else float("inf")
    found.worst_error = worst
    if worst > 1e-5:
        raise KernelLibraryError(
            f"the kernels compute wrong numbers here: relative error {worst:.1e}",
            next_step="report this with the output of `zeroskip doctor --json`; until then set "
            "ZEROSKIP_LIBRARY to another build",
        )


def _try_onnxruntime(found: Examination, path: Path) -> None:
    import onnxruntime

    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(path))
    # ONNX Runtime raises a family of its own, derived from nothing more specific.
    except Exception as error:
        raise KernelLibraryError(
            f"ONNX Runtime {found.versions['onnxruntime']} does not take the library: {error}",
            next_step="install the version of onnxruntime that pyproject.toml names",
        ) from error
    found.onnxruntime = True


def _judge_kernels(found: Examination) -> None:
    names = {name for kernels in found.kernels.values() for name in kernels.values()}
    if all(name.startswith("portable") for name in names):
        raise KernelLibraryError(
            "the library has no kernels for the instruction sets of this CPU, only portable ones, "
            "which are slower than dense",
            next_step="build it with a newer compiler (CXX names one)"
            if found.build.get("left_out")
            else "the fast ones need AVX2 on x86-64, or ARM64",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
