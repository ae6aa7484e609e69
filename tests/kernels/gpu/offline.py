"""Compiles kernels for GPUs that are not here, and reads their resources off the machine code.

    python tests/kernels/gpu/offline.py [--all] [--architectures 80 90 gfx942] [--markdown]

The tools are those of the Triton that is installed; no device and no driver is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Triton warns that its default will change; what is checked is what runs.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from zeroskip.runtime.kernels.gpu import (
    bitmap_gemv,
    decompress24,
    gemm24,
    gemv24,
    masked_gemm,
    mma24_launch,
)
from zeroskip.runtime.kernels.gpu.compiling import CompileCase

ARCHITECTURES = ("80", "89", "90", "100", "120", "gfx942")
KERNELS = {
    "mma24": mma24_launch,
    "gemv24": gemv24,
    "gemm24": gemm24,
    "decompress24": decompress24,
    "masked_gemm": masked_gemm,
    "bitmap_gemv": bitmap_gemv,
}
SHARED_LIMIT = {"80": 166912, "89": 101376, "90": 232448, "100": 232448, "120": 101376}
"""Bytes of shared memory that a block can opt into."""
TENSOR_CORES = {
    "80": ("HMMA",),
    "89": ("HMMA",),
    "90": ("HGMMA", "HMMA"),
    "100": ("UTCHMMA", "UTCQMMA", "HMMA"),
    "120": ("HMMA",),
    "gfx942": ("v_mfma",),
}
LOCAL_MEMORY = 8
"""Bytes of local memory of a thread that are let pass: kernels at the limit of registers keep the
address of a pointer there, and read it once in an iteration of over a thousand instructions."""
LEAST_INSTRUCTIONS = 64
"""Fewer mean that the compiler found the body of the kernel to be unreachable."""
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    """What the machine code of a kernel takes.

    Args:
        registers: Of a thread.
        stack: Bytes of local memory of a thread; spills take some.
        shared: Bytes of shared memory of a block.
        instructions: How often each occurs; on AMD only what is looked for.
        seconds: Of compilation.
    """

    registers: int
    stack: int
    shared: int
    instructions: Counter[str]
    seconds: float

    def count(self, prefix: str) -> int:
        """Returns how many instructions begin so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def build(case: CompileCase, architecture: str) -> Built:
    """Compiles one case for one architecture."""
    source_type = GluonASTSource if isinstance(case.function, GluonJITFunction) else ASTSource
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(case.signature)
        if name in case.divisible
    }
    source = source_type(
        fn=case.function, signature=case.signature, constexprs=case.constexprs, attrs=attributes
    )
    is_amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture), 32)
    )
    begin = time.perf_counter()
    compiled = triton.compile(source, target=target, options=dict(case.options))
    seconds = time.perf_counter() - begin
    if is_amd:
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared, seconds)
    return _read_nvidia(compiled.asm["cubin"], compiled.metadata.shared, seconds)


def _read_nvidia(binary: bytes, shared: int, seconds: float) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)

        def dump(option: str) -> str:
            command = [BINARIES / "cuobjdump", option, path]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, listing = dump("--dump-resource-usage"), dump("--dump-sass")
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return Built(registers, stack, shared, Counter(names), seconds)


def _read_amd(assembly: str, shared: int, seconds: float) -> Built:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    names = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", assembly, re.MULTILINE))
    stack = number("private_segment_fixed_size") + number("vgpr_spill_count")
    return Built(number("vgpr_count"), stack, shared, names, seconds)


def list_cases(kernel: str, architecture: str) -> list[CompileCase]:
    """Returns the cases of a kernel that are offered on an architecture."""
    is_amd = architecture.startswith("gfx")
    if kernel == "mma24":
        if is_amd:
            return []
        limit = SHARED_LIMIT[architecture]
        return [case for case in mma24_launch.compile_cases() if _shared_of(case) <= limit]
    return list(KERNELS[kernel].compile_cases("hip" if is_amd else "cuda"))


def _shared_of(case: CompileCase) -> int:
    sizes = (
        case.constexprs[key]
        for key in ("WARPS_N", "WARPS_K", "ROW_TILES", "TOKEN_TILES", "STAGES", "STEPS")
    )
    return mma24_launch.Config(*sizes).shared_bytes


def find_faults(case: CompileCase, architecture: str, built: Built) -> list[str]:
    """Returns what is wrong with a kernel that compiled."""
    faults = []
    if built.stack > LOCAL_MEMORY:
        faults.append(f"{built.stack} bytes of local memory")
    limit = SHARED_LIMIT.get(architecture)
    if limit is not None and built.shared > limit:
        faults.append(f"{built.shared} bytes of shared memory of {limit}")
    if limit is not None and built.instructions.total() < LEAST_INSTRUCTIONS:
        faults.append("no body: the compiler found it unreachable")
    if case.required == "MMA":
        if not any(built.count(name) for name in TENSOR_CORES[architecture]):
            faults.append(f"no {' or '.join(TENSOR_CORES[architecture])}")
    elif case.required and not built.count(case.required):
        faults.append(f"no {case.required}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="*", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print(
        "| kernel | architecture | registers | local bytes | shared bytes | instructions | tensor cores | loads of 16 bytes | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    wrong = 0
    for kernel in args.kernels:
        for architecture in args.architectures:
            for case in list_cases(kernel, architecture):
                try:
                    built = build(case, architecture)
                    faults = find_faults(case, architecture, built)
                except Exception as error:
                    print(
                        f"| {case.name} | {architecture} | {type(error).__name__}: {str(error)[:200]} |"
                    )
                    wrong += 1
                    continue
                wrong += bool(faults)
                cores = sum(built.count(name) for name in TENSOR_CORES[architecture])
                wide = sum(
                    n
                    for name, n in built.instructions.items()
                    if (("LDG" in name or "LDGSTS" in name) and "128" in name) or "dwordx4" in name
                )
                print(
                    f"| {case.name} | {architecture} | {built.registers} | {built.stack} | {built.shared} | "
                    f"{built.instructions.total()} | {cores} | {wide} | {built.seconds:.1f} |"
                    + (f" {'; '.join(faults)}" if faults else ""),
                    flush=True,
                )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
