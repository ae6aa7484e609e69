"""What a machine is: told apart from others that hypervisors call by the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroskip.runtime import machine
from zeroskip.runtime.machine import (
    cache_bytes,
    cpu_instruction_sets,
    cpu_name,
    cpu_name_in,
    describe_machine,
)

XEON = """\
processor\t: {core}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: {model}
model name\t: Intel(R) Xeon(R)   Processor
stepping\t: {stepping}
flags\t\t: fpu sse2 avx2 fma {flags}
"""
ARM_CORE = """\
processor\t: {core}
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 0
"""


def xeon(model: int, stepping: int = 8, flags: str = "") -> str:
    cores = (XEON.format(core=i, model=model, stepping=stepping, flags=flags) for i in range(2))
    return "\n".join(cores)


def arm(*parts: str) -> str:
    cores = (ARM_CORE.format(core=i, part=part) for i, part in enumerate(parts))
    return "\n".join(cores)


def test_a_machine_says_what_it_is() -> None:
    described = describe_machine()
    assert described["packages"]["onnxruntime"]
    assert described["cores"] >= 1
    assert described["processor"] == cpu_name()
    assert described["instruction_sets"] == list(cpu_instruction_sets())
    level3 = cache_bytes(3)
    assert level3 is None or level3 > 2**16


def test_this_cpu_has_a_name_of_one_line() -> None:
    assert cpu_name()
    assert "\n" not in cpu_name()


def test_models_of_one_name_are_told_apart() -> None:
    assert cpu_name_in(xeon(143)) == "Intel(R) Xeon(R)   Processor (6/143/8)"
    names = {cpu_name_in(xeon(model, stepping)) for model in (85, 106, 143) for stepping in (6, 8)}
    assert len(names) == 6


def test_cores_without_a_name_have_numbers() -> None:
    assert cpu_name_in(arm("0xd0c", "0xd0c")) == "ARM (0x41/0x1/0xd0c/0)"
    assert cpu_name_in(arm("0xd0b", "0xd05")) == "ARM (0x41/0x1/0xd05/0, 0x41/0x1/0xd0b/0)"


@pytest.mark.parametrize("text", ["", "\n\n", "no colon", "processor\t: 0\n"])
def test_where_nothing_is_told_there_is_no_name(text: str) -> None:
    assert cpu_name_in(text) == ""


def test_a_name_without_numbers_is_taken_as_it_is() -> None:
    assert cpu_name_in("model name : Some CPU\n") == "Some CPU"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (xeon(143, flags="avx512f amx_tile avx512_vnni"), "avx2 fma avx512f avx512_vnni amx_tile"),
        (xeon(143), "avx2 fma"),
        (arm("0xd0c"), "asimd asimddp"),
        ("", ""),
    ],
)
def test_instruction_sets_are_those_that_the_system_tells(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_instruction_sets.__wrapped__() == tuple(expected.split())
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "absent")
    assert cpu_instruction_sets.__wrapped__() == ()
