"""Shipped kernels compile for GPUs that are not here, to the machine code that they are meant to be.

Each configuration is compiled for one architecture, in turn, and the first of each kernel for all;
`python tests/kernels/gpu/offline.py` compiles everything for everything.
"""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from tests.kernels.gpu import offline
from zeroskip.runtime.gpu_dispatch import shipped_table
from zeroskip.runtime.kernels.gpu.compiling import CompileCase

CASES = [
    (kernel, architecture, at)
    for turn, kernel in enumerate(offline.KERNELS)
    for place, architecture in enumerate(offline.ARCHITECTURES)
    for at in range(len(offline.list_cases(kernel, architecture)))
    if at == 0 or (at + turn) % len(offline.ARCHITECTURES) == place
]


@pytest.mark.parametrize(("kernel", "architecture", "at"), CASES)
def test_compiles(kernel: str, architecture: str, at: int) -> None:
    case = offline.list_cases(kernel, architecture)[at]
    built = offline.build(case, architecture)
    assert not offline.find_faults(case, architecture, built), case.name


def a_case(required: str | None) -> CompileCase:
    return CompileCase("a", None, {}, {}, set(), {}, required)


def a_result(stack: int = 0, shared: int = 1000, **instructions: int) -> offline.Built:
    found = Counter({"IADD3": 200, **instructions})
    return offline.Built(90, stack, shared, found, 1.0)


@pytest.mark.parametrize(
    ("required", "built", "fault"),
    [
        (None, a_result(stack=16), "16 bytes of local memory"),
        (None, a_result(shared=232449), "232449 bytes of shared memory of 232448"),
        (None, a_result(IADD3=12), "no body"),
        ("HMMA.SP", a_result(HMMA=8), "no HMMA.SP"),
        ("MMA", a_result(FFMA=900), "no HGMMA or HMMA"),
    ],
)
def test_faults_are_found(required: str | None, built: offline.Built, fault: str) -> None:
    faults = offline.find_faults(a_case(required), "90", built)
    assert [each for each in faults if each.startswith(fault)] == faults != []


def test_sound_code_has_no_fault() -> None:
    built = a_result(**{"HMMA.SP.16832.F32.BF16": 8})
    assert offline.find_faults(a_case("HMMA.SP"), "90", built) == []


def test_winners_on_a_device_are_compiled_here() -> None:
    known = [dict(case.constexprs) for case in offline.list_cases("mma24", "90")]
    names = {
        "warps_n": "WARPS_N",
        "warps_k": "WARPS_K",
        "row_tiles": "ROW_TILES",
        "token_tiles": "TOKEN_TILES",
        "stages": "STAGES",
        "steps": "STEPS",
    }
    for found in shipped_table().entries.values():
        for entry in found.values():
            if entry.choice.kernel == "mma24":
                wanted = {names[k]: v for k, v in entry.choice.options.items() if k in names}
                assert any(wanted.items() <= each.items() for each in known), entry.choice
