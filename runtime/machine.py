"""What a machine is, as far as it decides how fast a model runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

# The instruction sets that kernels here, or those of ONNX Runtime, choose by.
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sme",
)
PACKAGES = ("zeroskip", "onnxruntime", "onnx", "torch", "numpy")
# What /proc/cpuinfo calls the numbers of a design: those of x86, those of ARM.
DESIGN = (
    "cpu family",
    "model",
    "stepping",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "CPU revision",
)
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe_machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Returns processor, instruction sets, caches, memory, load and versions, for JSON."""
    return {
        "processor": cpu_name(),
        "architecture": platform.machine(),
        "instruction_sets": list(cpu_instruction_sets()),
        "cores": available_cores(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


@cache
def cpu_name() -> str:
    """Returns what tells this CPU from others, such as "AMD EPYC 9654 96-Core Processor (25/17/1)".

    Hypervisors give different CPUs one name: the family, the model and the stepping tell them apart.
    """
    try:
        name = _cpu_name()
    except (OSError, subprocess.SubprocessError):
        name = ""
    return " ".join(name.split()) or platform.processor() or platform.machine() or "unknown"


@cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """Returns which INSTRUCTION_SETS this CPU has; none where the system does not tell."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(name for name in INSTRUCTION_SETS if name in flags)


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes(level: int) -> int | None:
    """The size of the data cache of a level; None where the system does not tell."""
    for index in sorted(CACHES.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            if kind != "Instruction" and int((index / "level").read_text()) == level:
                return int((index / "size").read_text().strip().rstrip("K")) * 1024
        except (OSError, ValueError):
            continue
    return None


def _cpu_name() -> str:
    if sys.platform == "win32":
        import winreg

        place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
            name, _ = winreg.QueryValueEx(key, "ProcessorNameString")
            numbers, _ = winreg.QueryValueEx(key, "Identifier")
        return f"{name} ({numbers})"
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return cpu_name_in(CPUINFO.read_text(encoding="utf-8", errors="replace"))


def cpu_name_in(cpuinfo: str) -> str:
    """Returns the name in the text of /proc/cpuinfo, empty where there is none."""
    cores = [_fields(block) for block in re.split(r"\n\s*\n", cpuinfo)]
    # ARM has no name there, only numbers, which differ between big and small cores.
    arm = "ARM" if any("CPU implementer" in core for core in cores) else ""
    name = next((core["model name"] for core in cores if "model name" in core), arm)
    kinds = {"/".join(core[key] for key in DESIGN if key in core) for core in cores} - {""}
    return f"{name} ({', '.join(sorted(kinds))})" if name and kinds else name


def _fields(block: str) -> dict[str, str]:
    """The lines `key : value` of one core."""
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
